"""Scoring and selecting tokens in bounded memory: the score matrix exists only a chunk of queries at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsparse import reference

SCORE_BYTES = 8 << 20  # of one chunk's scores on a CPU: they stay in its cache
ON_ACCELERATORS = 32  # times as many, so that products are large
UNROLLED_HEADS = 8  # more are looped over
PREFIXES = 4  # lengths of the key axis that a chunk's scores are computed for, so that causal chunks skip the future
SHORTEST_PREFIX = 256
MOST_PARTS = 8


def topk(scores: Float[Array, "R S"], k: int, lengths: Int[Array, " R"] | None = None) -> Int[Array, "R k"]:
    """`reference.topk` in as many parts as a CPU has cores: XLA gives each a single one."""
    parts = min(os.cpu_count() or 1, MOST_PARTS, scores.shape[0]) if jax.default_backend() == "cpu" else 1
    lengths = jnp.full(scores.shape[0], scores.shape[1]) if lengths is None else lengths
    pairs = zip(jnp.array_split(scores, parts), jnp.array_split(lengths, parts), strict=True)
    return jnp.concatenate([reference.topk(some, k, ends) for some, ends in pairs])


def indexer_topk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S H"],
    weights: Float[Array, "B T N"],
    ends: Int[Array, "B T"],
    starts: Int[Array, "B T"] | None,
    topk: int,
    select: Callable[[Float[Array, "R S"], int, Int[Array, " R"]], Int[Array, "R K"]],
) -> Int[Array, "B T K"]:
    """See `ops.indexer_topk`. select(scores, topk, lengths) is `ops.topk`."""

    def visible(q, weights, ends, starts, keys: int):
        scores = indexer_logits(q, k[:, :keys], weights)
        if starts is not None:
            scores = jnp.where(jnp.arange(keys) >= starts[..., None], scores, -jnp.inf)
        rows = ends.size
        selected = select(scores.reshape(rows, keys), topk, jnp.minimum(ends.reshape(rows), keys))
        selected = selected.reshape(*ends.shape, topk)
        return selected if starts is None else jnp.where(selected >= starts[..., None], selected, -1)

    def some(chunk):
        prefixes = _prefixes(k.shape[1], topk)
        branches = [lambda *args, keys=keys: visible(*args, keys) for keys in prefixes]
        needed = jnp.max(chunk[2])
        return jax.lax.switch(jnp.sum(needed > jnp.array(prefixes[:-1], jnp.int32)), branches, *chunk)

    batch, time = ends.shape
    budget = SCORE_BYTES * (1 if jax.default_backend() == "cpu" else ON_ACCELERATORS)
    size = min(time, max(1, budget // (4 * batch * k.shape[1])))
    arrays = (q, weights, ends, starts)
    if size == time:
        return some(arrays)
    count = -(-time // size)

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, count * size - time)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, count, size, *a.shape[2:]), 1, 0)

    selected = jax.lax.map(some, jax.tree.map(split, arrays))
    return jnp.moveaxis(selected, 0, 1).reshape(batch, count * size, topk)[:, :time]


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
