"""Every op with more than one implementation, and the choice between them.

`implementation=None` takes the first that supports the arguments on this machine ("mosaic_gpu" kernels on Hopper
GPUs, else "xla") and logs the choice once; a name means exactly that one, or the reason why not as
NotImplementedError. References are in `dsparse.reference`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsparse import banded, grouped, reference
from dsparse.params import FLOAT8

logger = logging.getLogger("dsparse.ops")
_chosen: set[tuple[str, str]] = set()

QUERY_BLOCK = 256  # queries attended at once by the XLA path: bounds its score matrix
KEY_BLOCK = 512  # cached keys expanded at once


def _dispatch(op: str, implementation: str | None, choices: dict[str, Callable], *args, **kwargs):
    """Call the named implementation, or the first of `choices` that does not refuse."""
    if implementation is not None and implementation not in choices:
        raise NotImplementedError(f"{op} has no implementation {implementation!r} (known: {', '.join(choices)})")
    names = [implementation] if implementation else list(choices)
    for name in names:
        try:
            result = choices[name](*args, **kwargs)
        except NotImplementedError as refusal:
            if name == names[-1]:
                raise
            logger.debug("%s: %s refused: %s", op, name, refusal)
            continue
        if (op, name) not in _chosen:
            _chosen.add((op, name))
            logger.info("%s is served by %s", op, name)
        return result
    raise AssertionError("unreachable")


# ---- linear maps ----------------------------------------------------------------------------------------------------


def linear(
    x: Float[Array, "*batch D"], weight: Float[Array, "F D"], scale_inv: Float[Array, "Fb Db"] | None = None, out_dtype=None
) -> Float[Array, "*batch F"]:
    """x W^T for W [out, in] in floating point or FP8 blocks; in x's dtype unless `out_dtype` says otherwise."""
    if weight.dtype in FLOAT8 and scale_inv is None:
        raise ValueError("an 8-bit weight needs its block scales")
    weight = reference.dequantize(weight, scale_inv, x.dtype)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=out_dtype or x.dtype)


# ---- dense attention ------------------------------------------------------------------------------------------------


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N V"]:
    """Causal softmax attention within segments. Query blocks see only the keys up to their end: half the products."""
    length = q.shape[1]
    index = jnp.arange(length)

    def block(start: int, stop: int) -> Array:
        keep = (index[None, start:stop, None] >= index[None, None, :stop])
        if segment_ids is not None:
            keep = keep & (segment_ids[:, start:stop, None] == segment_ids[:, None, :stop])
        return reference.causal_attention(q[:, start:stop], k[:, :stop], v[:, :stop], keep, scale)

    size = max(QUERY_BLOCK, -(-length // 32))  # at most 32 blocks are traced
    blocks = [block(start, min(start + size, length)) for start in range(0, length, size)]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def latent_attention(
    q: Float[Array, "B T N C"],
    latent: Float[Array, "B S C"],
    positions: Int[Array, "B T"],
    *,
    v_head_dim: int,
    scale: float,
) -> Float[Array, "B T N V"]:
    """A few queries over a cache of shared key-value rows; a query at position p sees slots 0..p."""
    keep = jnp.arange(latent.shape[1]) <= positions[..., None]
    return reference.latent_attention(q, latent, keep, v_head_dim=v_head_dim, scale=scale)


def cached_attention(
    q: Float[Array, "B T N H"],
    past: Float[Array, "B S C"],
    expand: Callable[[Array], tuple[Array, Array]],
    positions: Int[Array, "B T"],
    *,
    v_head_dim: int,
    scale: float,
) -> Float[Array, "B T N V"]:
    """Many queries over a cache of latents that `expand` turns into keys and values, block by block.

    Online softmax over as many key blocks as the longest row needs: work follows the filled part of the cache,
    not its size, and no [T, S] score matrix is kept. Not differentiable.
    """
    size = min(KEY_BLOCK, past.shape[1])
    slots = jnp.arange(past.shape[1])

    def step(i, carry):
        peak, total, out = carry
        start = jnp.minimum(i * size, past.shape[1] - size)  # the last block may overlap the one before
        k, v = expand(jax.lax.dynamic_slice_in_dim(past, start, size, axis=1))
        slot = jax.lax.dynamic_slice_in_dim(slots, start, size)
        keep = (slot <= positions[..., None]) & (slot >= i * size)
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
        logits = jnp.where(keep[:, None], logits, reference.NEG_INF)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        weights = jnp.where(keep[:, None], jnp.exp(logits - new_peak[..., None]), 0.0)
        decay = jnp.exp(peak - new_peak)
        total = total * decay + jnp.sum(weights, axis=-1)
        block = jnp.einsum("BNTS,BSNV->BNTV", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_peak, total, out * decay[..., None] + block

    batch, length, heads, _ = q.shape
    rows = (batch, heads, length)
    start = (jnp.full(rows, reference.NEG_INF), jnp.zeros(rows), jnp.zeros((*rows, v_head_dim)))
    blocks = jnp.minimum(jnp.max(positions) // size + 1, -(-past.shape[1] // size))
    _, total, out = jax.lax.fori_loop(0, blocks, step, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


sparse_attention = reference.sparse_attention

# ---- windows and compressed entries ---------------------------------------------------------------------------------

INDEX_SCORE_BYTES = 64 << 20  # per-head scores that choosing entries keeps at once


def choose_entries(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B E H"],
    weights: Float[Array, "B T N"],
    k: int,
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
) -> Int[Array, "B T k"]:
    """The k best-scored entries e of each query with first <= e < last, ties to the lowest; -1 where there are fewer."""
    batch, length, heads, _ = q.shape
    entry = jnp.arange(keys.shape[1])

    def choose(q, weights, first, last):
        scores = reference.indexer_logits(q, keys, weights)
        visible = (entry >= first[..., None]) & (entry < last[..., None])
        scores = jnp.where(visible, scores, -jnp.inf).reshape(-1, len(entry))
        return reference.topk(scores, k).reshape(*first.shape, k)

    size = max(1, INDEX_SCORE_BYTES // (batch * heads * len(entry) * 4))
    if size >= length:
        return choose(q, weights, first, last)
    count = -(-length // size)
    chunks = jax.tree.map(
        lambda x: jnp.moveaxis(
            jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2))).reshape(batch, count, size, *x.shape[2:]), 1, 0
        ),
        (q, weights, first, last),
    )
    chosen = jax.lax.map(lambda chunk: choose(*chunk), chunks)
    return jnp.moveaxis(chosen, 0, 1).reshape(batch, count * size, k)[:, :length]


def window_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B L H"],
    entries: banded.Entries | None,
    *,
    window: int,
    scale: float,
    sinks: Float[Array, " N"],
    start: Int[Array, " B"],
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention over the last `window` rows, the visible entries and a sink per head (`banded.banded_attention`)."""
    choices = {"xla": banded.banded_attention}
    options = {"window": window, "scale": scale, "sinks": sinks, "start": start, "segment_ids": segment_ids}
    return _dispatch("window_attention", implementation, choices, q, kv, entries, **options)


# ---- mixture of experts ---------------------------------------------------------------------------------------------


def grouped_matmul(
    x: Float[Array, "M D"],
    weights: Float[Array, "E F D"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """Rows sorted by group times their group's W^T (W is [out, in]); rows past the last group give 0. Differentiable."""
    return _dispatch("grouped_matmul", implementation, {"xla": grouped.grouped_matmul}, x, weights, group_sizes)


def expert_mlp(
    x: Float[Array, "T D"],
    choice: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    experts: grouped.Experts,
    *,
    limit: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Each token through its K chosen SwiGLU experts, summed with their weights; choice E adds nothing. Differentiable.

    limit: clamps gate and up before the activation (`reference.swiglu`).
    """
    return _dispatch("expert_mlp", implementation, {"xla": grouped.expert_mlp}, x, choice, weights, experts, limit)
