"""Scoring and selecting tokens in bounded memory: the score matrix exists only a chunk of queries at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SCORE_BYTES = 8 << 20  # of one chunk's scores on a CPU: they stay in its cache
ON_ACCELERATORS = 32  # times as many, so that products are large
UNROLLED_HEADS = 8  # more are looped over
PREFIXES = 4  # lengths of the key axis that a chunk's scores are computed for, so that causal chunks skip the future
SHORTEST_PREFIX = 256
PARTS = 4  # of the queries, each with its own number of keys where that is known
SHORTEST_PART = 64

Select = Callable[[Float[Array, "R S"], int, Int[Array, " R"]], Int[Array, "R K"]]  # `ops.topk`


def indexer_topk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S H"],
    weights: Float[Array, "B T N"],
    ends: Int[Array, "B T"],
    starts: Int[Array, "B T"] | None,
    topk: int,
    own_keys: bool,
    select: Select,
) -> Int[Array, "B T K"]:
    """See `ops.indexer_topk`."""
    time, keys = q.shape[1], k.shape[1]
    arrays = (q, weights, ends, starts)
    if not own_keys:
        return _in_chunks(functools.partial(_select_from_prefix, k=k, topk=topk, select=select), arrays, keys)
    parts, selected = max(1, min(PARTS, time // SHORTEST_PART)), []
    for part in range(parts):
        start, stop = time * part // parts, time * (part + 1) // parts
        seen = k[:, : -(-keys * stop // time)]
        queries = tuple(None if a is None else a[:, start:stop] for a in arrays)
        choose = functools.partial(_select, k=seen, topk=topk, select=select)
        selected.append(_in_chunks(choose, queries, seen.shape[1]))
    return jnp.concatenate(selected, axis=1)


def _select(q, weights, ends, starts, k, topk: int, select: Select) -> Int[Array, "B T K"]:
    keys, rows = k.shape[1], ends.size
    scores = indexer_logits(q, k, weights)
    if starts is not None:
        scores = jnp.where(jnp.arange(keys) >= starts[..., None], scores, -jnp.inf)
    chosen = select(scores.reshape(rows, keys), min(topk, keys), jnp.minimum(ends.reshape(rows), keys))
    chosen = chosen.reshape(*ends.shape, -1)
    if starts is not None:
        chosen = jnp.where(chosen >= starts[..., None], chosen, -1)
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, topk - chosen.shape[-1])), constant_values=-1)


def _select_from_prefix(q, weights, ends, starts, k, topk: int, select: Select) -> Int[Array, "B T K"]:
    """`_select` from the shortest of a few prefixes that holds all these queries see."""
    prefixes = _prefixes(k.shape[1], topk)
    branches = [functools.partial(_select, k=k[:, :keys], topk=topk, select=select) for keys in prefixes]
    needed = jnp.max(ends)
    return jax.lax.switch(jnp.sum(needed > jnp.array(prefixes[:-1], jnp.int32)), branches, q, weights, ends, starts)


def _in_chunks(choose: Callable[..., Int[Array, "B T K"]], arrays, keys: int) -> Int[Array, "B T K"]:
    """`choose(*arrays)`, a bounded chunk of queries at a time."""
    batch, time = arrays[2].shape
    budget = SCORE_BYTES * (1 if jax.default_backend() == "cpu" else ON_ACCELERATORS)
    size = min(time, max(1, budget // (4 * batch * keys)))
    if size == time:
        return choose(*arrays)
    count = -(-time // size)

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, count * size - time)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, count, size, *a.shape[2:]), 1, 0)

    selected = jax.lax.map(lambda chunk: choose(*chunk), jax.tree.map(split, arrays))
    return jnp.moveaxis(selected, 0, 1).reshape(batch, count * size, -1)[:, :time]


def indexer_logits(
    q: Float[Array, "B T N H"], k: Float[Array, "B S H"], weights: Float[Array, "B T N"]
) -> Float[Array, "B T S"]:
    """`reference.indexer_logits` one head at a time: several times faster on a CPU, and no [T, N, S] in between."""

    def head(q, weights):
        scores = jnp.einsum("BTH,BSH->BTS", q, k, preferred_element_type=jnp.float32)
        return weights.astype(jnp.float32)[..., None] * jax.nn.relu(scores)

    heads = q.shape[2]
    if heads <= UNROLLED_HEADS:
        return functools.reduce(jnp.add, [head(q[:, :, n], weights[:, :, n]) for n in range(heads)])
    by_head = jnp.moveaxis(q, 2, 0), jnp.moveaxis(weights, 2, 0)
    start = jnp.zeros((*q.shape[:2], k.shape[1]), jnp.float32)
    return jax.lax.scan(lambda total, one: (total + head(*one), None), start, by_head)[0]


def _prefixes(keys: int, topk: int) -> tuple[int, ...]:
    """Lengths of the key axis to choose from, the whole one last."""
    lengths = {-(-keys * part // PREFIXES) for part in range(1, PREFIXES)}
    return (*sorted(length for length in lengths if length >= max(topk, SHORTEST_PREFIX)), keys)
