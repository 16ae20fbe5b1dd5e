"""Every op with more than one implementation, and the choice between them.

`implementation=None` takes the first that supports the arguments on this machine ("mosaic_gpu" kernels on Hopper
GPUs, else "xla") and logs the choice once; a name means exactly that one, or the reason why not as
NotImplementedError. References are in `dsparse.reference`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dsparse import banded, gathered, grouped, indexing, reference, sharding
from dsparse.params import QUANTIZED

logger = logging.getLogger("dsparse.ops")
_chosen: set[tuple[str, str]] = set()

QUERY_BLOCK = 256  # queries attended at once by the XLA path: bounds its score matrix
CAUSAL_PARTS = 8  # of a sequence, each with its own number of keys
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
    x: Float[Array, "*batch D"],
    weight: Shaped[Array, "F _"],
    scale_inv: Shaped[Array, "_ _"] | None = None,
    out_dtype=None,
) -> Float[Array, "*batch F"]:
    """x W^T for W [out, in] in floating point, FP8 blocks or packed FP4; in x's dtype unless `out_dtype` says otherwise."""
    if weight.dtype in QUANTIZED and scale_inv is None:
        raise ValueError("an 8- or 4-bit weight needs its block scales")
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
    """Causal softmax attention within segments, by blocks of queries.

    Rows are cut into up to CAUSAL_PARTS parts that see only the keys up to their end, which saves almost half the
    products; within a part blocks follow one another. The backward pass computes each block's weights again: no [T, S]
    matrix outlives its block.
    """
    length = q.shape[1]
    size = -(-length // min(CAUSAL_PARTS, -(-length // QUERY_BLOCK)))
    parts = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        segments = None if segment_ids is None else segment_ids[:, :stop]
        parts.append(_attention_part(q[:, start:stop], k[:, :stop], v[:, :stop], segments, start, scale))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _attention_part(q: Array, k: Array, v: Array, segment_ids: Array | None, start: int, scale: float) -> Array:
    """Causal attention of the last rows of a sequence, from row `start` on, over all its keys."""
    batch, rows = q.shape[:2]
    index = jnp.arange(k.shape[1])

    @jax.checkpoint
    def block(q: Array, row: Array) -> Array:
        keep = (row[:, None] >= index)[None]
        if segment_ids is not None:
            keep = keep & (segment_ids[:, row, None] == segment_ids[:, None])
        return reference.causal_attention(q, k, v, keep, scale)

    if rows <= QUERY_BLOCK:
        return block(q, start + jnp.arange(rows))
    blocks = -(-rows // QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - rows
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(batch, blocks, QUERY_BLOCK, *q.shape[2:])
    row = jnp.minimum(start + jnp.arange(blocks * QUERY_BLOCK), k.shape[1] - 1).reshape(blocks, QUERY_BLOCK)
    out = jax.lax.map(lambda block_inputs: block(*block_inputs), (jnp.moveaxis(q, 1, 0), row))
    return jnp.moveaxis(out, 0, 1).reshape(batch, blocks * QUERY_BLOCK, *out.shape[3:])[:, :rows]


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


# ---- sparse attention -----------------------------------------------------------------------------------------------


def _kernel(module: str, name: str) -> Callable:
    """A kernel of `dsparse.kernels`, imported when it is called; refuses where there is no GPU."""

    def call(*args, **kwargs):
        mesh = sharding.current_mesh()
        if jax.default_backend() != "gpu":
            raise NotImplementedError(f"needs a GPU, found {jax.default_backend()}")
        if mesh is not None and mesh.size > 1:
            raise NotImplementedError("does not split over a mesh")
        try:
            found = getattr(importlib.import_module(f"dsparse.kernels.{module}"), name)
        except (ImportError, AttributeError) as error:
            raise NotImplementedError(f"kernel {module}.{name} is not there ({error})") from error
        return found(*args, **kwargs)

    return call


def sparse_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    indices: Int[Array, "B T K"],
    *,
    v_head_dim: int,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention of each query over the rows of `kv` that its indices name: the one op of every sparse family.

    indices: rows of `kv`, in any order, each at most once a query; -1: nothing. A key is a whole row, its value the
        first `v_head_dim` columns (MLA in latent space, DeepSeek-V2 section 2.1.2).
    sinks: a logit for each head that takes part in the softmax and adds nothing to the output.

    Returns the output and the float32 log-sum-exp of the scaled logits (sinks included). A query without any index
    gives 0 and -inf (or its sink). Differentiable in q, kv and sinks, in memory proportional to T*K.
    """
    choices = {
        "mosaic_gpu": _kernel("sparse_attention", "sparse_attention"),
        "xla": lambda q, kv, indices, *, v_head_dim, scale, sinks: gathered.sparse_attention(
            q, kv, indices, sinks, v_head_dim, scale
        ),
        "reference": reference.sparse_attention,
    }
    return _dispatch(
        "sparse_attention", implementation, choices, q, kv, indices, v_head_dim=v_head_dim, scale=scale, sinks=sinks
    )


def topk(
    scores: Float[Array, "R S"], k: int, lengths: Int[Array, " R"] | None = None, *, implementation: str | None = None
) -> Int[Array, "R K"]:
    """Positions of the k largest among each row's first `lengths` entries, in any order; -1 where there are fewer.

    Exact; of equal scores the lowest positions are taken, and 0.0 equals -0.0. An entry of -inf is never taken.
    """
    return _dispatch(
        "topk", implementation, {"mosaic_gpu": _kernel("topk", "topk"), "xla": reference.topk}, scores, k, lengths
    )


def indexer_topk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S H"],
    weights: Float[Array, "B T N"],
    topk: int,
    *,
    ends: Int[Array, "B T"],
    starts: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Int[Array, "B T K"]:
    """The `topk` keys with the highest lightning indexer scores, sum over heads of weights * relu(q . k), of each query.

    A query sees the keys from `starts` (default 0) to before `ends`; -1 fills where these are fewer than `topk`.
    Scores exist for a bounded chunk of queries at a time. Passes no gradient.
    """
    choices = {"mosaic_gpu": _indexer_topk_kernel, "xla": _indexer_topk}

    def select(q, k, weights, ends, starts):
        return _dispatch("indexer_topk", implementation, choices, q, k, weights, topk, ends=ends, starts=starts)

    return _without_gradient(select)(q, k, weights, ends, starts)


def _without_gradient(select: Callable[..., Array]) -> Callable[..., Array]:
    """`select`, known to have no derivative: stop_gradient alone lets JAX save the scores for a backward pass."""
    wrapped = jax.custom_jvp(select)

    @wrapped.defjvp
    def _(primals, tangents):
        indices = wrapped(*primals)
        return indices, np.zeros(indices.shape, jax.dtypes.float0)

    return wrapped


def _indexer_topk_kernel(q, k, weights, count, *, ends, starts):
    if starts is not None:
        raise NotImplementedError("every query sees the keys from 0 on")
    return _kernel("indexer", "indexer_topk")(q, k, weights, ends, count)


def _indexer_topk(q, k, weights, count, *, ends, starts):
    return indexing.indexer_topk(q, k, weights, ends, starts, count, topk)


# ---- windows and compressed entries ---------------------------------------------------------------------------------


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
    choices = {"mosaic_gpu": _kernel("grouped_matmul", "grouped_matmul"), "xla": grouped.grouped_matmul}
    return _dispatch("grouped_matmul", implementation, choices, x, weights, group_sizes)


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
    choices = {"mosaic_gpu": _expert_mlp_kernel, "xla": grouped.expert_mlp}
    return _dispatch("expert_mlp", implementation, choices, x, choice, weights, experts, limit)


def _expert_mlp_kernel(x, choice, weights, experts, limit):
    if limit is not None or experts.gate_up_scale_inv is not None:
        raise NotImplementedError("no kernel for clamped activations or 8-bit weights")
    swiglu, matmul = (_kernel("grouped_matmul", name) for name in ("grouped_swiglu", "grouped_matmul"))
    return grouped.sorted_expert_mlp(x, choice, weights, experts, swiglu, matmul)
