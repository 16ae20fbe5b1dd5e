"""Every op with more than one implementation, and the choice between them.

`implementation=None` takes the first that supports the arguments on this machine (on Hopper GPUs the "mosaic_gpu"
kernels and "cudnn", else "xla") and logs the choice once; a name means exactly that one, or the reason why not as
NotImplementedError. `dispatch.prefer` names one for all ops. References are in `dsparse.reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dsparse import banded, causal, dispatch, gathered, grouped, indexing, reference, selection, sharding
from dsparse.params import QUANTIZED
from dsparse.remat import keep

KEY_BLOCK = 512  # cached keys expanded at once
EXPANDED_BYTES = 4 << 30  # most memory for all cached keys and values expanded at once, where cuDNN takes them


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
    return reference.gradient_once(
        jax.lax.dot_general(x, weight, contract, preferred_element_type=out_dtype or x.dtype)
    )


# ---- dense attention ------------------------------------------------------------------------------------------------


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Causal softmax attention within segments. Differentiable; keeps no [T, S] matrix."""
    choices = {"cudnn": _causal_attention_cudnn, "xla": causal.causal_attention}
    return dispatch.call("causal_attention", implementation, choices, q, k, v, scale=scale, segment_ids=segment_ids)


def _causal_attention_cudnn(q, k, v, *, scale, segment_ids):
    kernel = dispatch.kernel("cudnn", "attention")

    def attend(q, k, v, segments):
        keep = None if segments is None else segments[:, :, None] == segments[:, None]
        return kernel(q, k, v, scale=scale, causal=True, keep=keep)

    heads = ("batch", None, "heads", None)
    segments = () if segment_ids is None else ("batch", None)
    return dispatch.on_each_device(attend, (heads, heads, heads, segments), heads, q, k, v, segment_ids)


def latent_attention(
    q: Float[Array, "B T N C"],
    latent: Float[Array, "B S C"],
    positions: Int[Array, "B T"],
    *,
    v_head_dim: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """A few queries over a cache of shared key-value rows; a query at position p sees slots 0..p."""
    choices = {"mosaic_gpu": _latent_attention_kernel, "xla": _latent_attention}
    return dispatch.call(
        "latent_attention", implementation, choices, q, latent, positions, v_head_dim=v_head_dim, scale=scale
    )


def _latent_attention(q, latent, positions, **options):
    keep = jnp.arange(latent.shape[1]) <= positions[..., None]
    return reference.latent_attention(q, latent, keep, **options)


def _latent_attention_kernel(q, latent, positions, **options):
    """Sparse attention to every slot up to the query's."""
    slot = jnp.arange(latent.shape[1])
    return _sparse_attention_kernel(q, latent, jnp.where(slot <= positions[..., None], slot, -1), **options)[0]


def cached_attention(
    q: Float[Array, "B T N H"],
    past: Float[Array, "B S C"],
    expand: Callable[[Array], tuple[Array, Array]],
    positions: Int[Array, "B T"],
    *,
    v_head_dim: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Many queries over a cache of latents that `expand` turns into keys and values. Not differentiable."""
    choices = {"cudnn": _cached_attention_cudnn, "xla": _cached_attention}
    return dispatch.call(
        "cached_attention", implementation, choices, q, past, expand, positions, v_head_dim=v_head_dim, scale=scale
    )


def _cached_attention_cudnn(q, past, expand, positions, *, v_head_dim, scale):
    kernel = dispatch.kernel("cudnn", "attention")
    batch, slots, _ = past.shape
    expanded = batch * slots * q.shape[2] * (q.shape[3] + v_head_dim) * q.dtype.itemsize
    if expanded > EXPANDED_BYTES:
        raise NotImplementedError(f"all keys and values of the cache would take {expanded >> 20} MiB")

    def attend(q, k, v, positions):
        keep = jnp.arange(slots) <= positions[..., None]
        lengths = jnp.max(positions, axis=1) + 1
        return kernel(q, k, v, scale=scale, causal=False, keep=keep, lengths=jnp.minimum(lengths, slots))

    heads = ("batch", None, "heads", None)
    return dispatch.on_each_device(attend, (heads, heads, heads, ("batch", None)), heads, q, *expand(past), positions)


def _cached_attention(q, past, expand, positions, *, v_head_dim, scale):
    """Online softmax over as many key blocks as the longest row needs.

    Work follows the filled part of the cache, not its size, and no [T, S] score matrix is kept.
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
        "mosaic_gpu": _sparse_attention_kernel,
        "xla": lambda q, kv, indices, *, v_head_dim, scale, sinks: gathered.sparse_attention(
            q, kv, indices, sinks, v_head_dim, scale
        ),
        "reference": reference.sparse_attention,
    }
    return dispatch.call(
        "sparse_attention", implementation, choices, q, kv, indices, v_head_dim=v_head_dim, scale=scale, sinks=sinks
    )


def _sparse_attention_kernel(q, kv, indices, *, v_head_dim, scale, sinks=None):
    kernel = dispatch.kernel("sparse_attention", "sparse_attention")
    queries, rows = ("batch", None, "heads", None), ("batch", None, None)
    return dispatch.on_each_device(
        lambda q, kv, indices, sinks: kernel(q, kv, indices, v_head_dim=v_head_dim, scale=scale, sinks=sinks),
        (queries, rows, rows, () if sinks is None else ("heads",)),
        (queries, queries[:-1]),
        *(q, kv, indices, sinks),
    )


def topk(
    scores: Float[Array, "R S"], k: int, lengths: Int[Array, " R"] | None = None, *, implementation: str | None = None
) -> Int[Array, "R K"]:
    """Positions of the k largest among each row's first `lengths` entries, in any order; -1 where there are fewer.

    Exact; of equal scores the lowest positions are taken, and 0.0 equals -0.0. An entry of -inf is never taken.
    """
    return dispatch.call(
        "topk", implementation, {"mosaic_gpu": _topk_kernel, "xla": selection.topk}, scores, k, lengths
    )


def _topk_kernel(scores, k, lengths):
    kernel = dispatch.kernel("topk", "topk")

    def select(scores, lengths):
        positions = kernel(scores, k, lengths)
        chosen = jnp.take_along_axis(scores, jnp.maximum(positions, 0), axis=1)
        return jnp.where(chosen > -jnp.inf, positions, -1)  # the kernel takes -inf where nothing else is left

    rows = ("batch", None)
    return dispatch.on_each_device(select, (rows, () if lengths is None else ("batch",)), rows, scores, lengths)


def indexer_topk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S H"],
    weights: Float[Array, "B T N"],
    topk: int,
    *,
    ends: Int[Array, "B T"],
    starts: Int[Array, "B T"] | None = None,
    own_keys: bool = False,
    implementation: str | None = None,
) -> Int[Array, "B T K"]:
    """The `topk` keys with the highest lightning indexer scores, sum over heads of weights * relu(q . k), of each query.

    A query sees the keys from `starts` (default 0) to before `ends`; -1 fills where these are fewer than `topk`.
    Scores exist for a bounded chunk of queries at a time. Passes no gradient.

    own_keys: the keys are of the queries' own tokens, in their order: query t's end is at most ceil(S (t + 1) / T).
    """
    choices = {"mosaic_gpu": _indexer_topk_kernel, "xla": _indexer_topk}

    def select(q, k, weights, ends, starts):
        options = {"ends": ends, "starts": starts, "own_keys": own_keys}
        return dispatch.call("indexer_topk", implementation, choices, q, k, weights, topk, **options)

    return keep(_without_gradient(select)(q, k, weights, ends, starts))


def _without_gradient(select: Callable[..., Array]) -> Callable[..., Array]:
    """`select`, known to have no derivative: stop_gradient alone lets JAX save the scores for a backward pass."""
    wrapped = jax.custom_jvp(select)

    @wrapped.defjvp
    def _(primals, tangents):
        indices = wrapped(*primals)
        return indices, np.zeros(indices.shape, jax.dtypes.float0)

    return wrapped


def _indexer_topk_kernel(q, k, weights, count, *, ends, starts, own_keys):
    del own_keys  # it skips what no query of a block sees
    kernel = dispatch.kernel("indexer", "indexer_topk")
    rows = ("batch", None)
    return dispatch.on_each_device(
        lambda q, k, weights, ends, starts: kernel(q, k, weights, ends, count, starts=starts),
        ((*rows, None, None), (*rows, None), (*rows, None), rows, () if starts is None else rows),
        (*rows, None),
        *(q, k, weights, ends, starts),
    )


def _indexer_topk(q, k, weights, count, *, ends, starts, own_keys):
    return indexing.indexer_topk(q, k, weights, ends, starts, count, own_keys, topk)


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
    choices = {"mosaic_gpu": _window_attention_kernel, "xla": banded.banded_attention}
    options = {"window": window, "scale": scale, "sinks": sinks, "start": start, "segment_ids": segment_ids}
    return dispatch.call("window_attention", implementation, choices, q, kv, entries, **options)


def _window_attention_kernel(q, kv, entries, *, window, scale, sinks, start, segment_ids):
    rows, indices = banded.index_lists(kv, entries, window=window, start=start, segment_ids=segment_ids)
    return _sparse_attention_kernel(q, rows, indices, v_head_dim=q.shape[-1], scale=scale, sinks=sinks)[0]


# ---- mixture of experts ---------------------------------------------------------------------------------------------


def grouped_matmul(
    x: Float[Array, "M D"],
    weights: Float[Array, "E F D"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """Rows sorted by group times their group's W^T (W is [out, in]); rows past the last group give 0. Differentiable."""
    choices = {"mosaic_gpu": dispatch.kernel("grouped_matmul", "grouped_matmul"), "xla": grouped.grouped_matmul}
    return dispatch.call("grouped_matmul", implementation, choices, x, weights, group_sizes)


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
    return dispatch.call("expert_mlp", implementation, choices, x, choice, weights, experts, limit)


def _expert_mlp_kernel(x, choice, weights, experts, limit):
    if sharding.current_mesh() is not None:  # `moe` calls this on every device alone
        raise NotImplementedError("does not split over a mesh by itself")
    if experts.gate_up_scale_inv is not None:
        return _fp8_expert_mlp_kernel(x, choice, weights, experts, limit)
    swiglu, matmul = (dispatch.kernel("grouped_matmul", name) for name in ("grouped_swiglu", "grouped_matmul"))
    return grouped.sorted_expert_mlp(
        x,
        choice,
        weights,
        experts,
        lambda rows, experts, sizes: swiglu(rows, experts.gate_up.astype(rows.dtype), sizes, limit),
        lambda rows, experts, sizes: matmul(rows, experts.down.astype(rows.dtype), sizes),
    )


def _fp8_expert_mlp_kernel(x, choice, weights, experts, limit):
    """Rows are quantized too, 128 values to a scale, as DeepSeek-V3 computes (section 3.3.2). Its gradient is XLA's."""
    if x.dtype != jnp.bfloat16 or experts.gate_up.dtype != jnp.float8_e4m3fn:
        raise NotImplementedError(f"no kernel for {x.dtype} rows and experts stored as {experts.gate_up.dtype}")
    names = ("quantize_rows", "grouped_matmul_fp8")
    quantize, matmul = (dispatch.kernel("grouped_matmul_quantized", name) for name in names)

    def product(rows, weight, scale_inv, sizes):
        return matmul(*quantize(rows), weight, scale_inv.astype(jnp.float32), sizes)

    def swiglu(rows, experts, sizes):
        gate_up = product(rows, experts.gate_up, experts.gate_up_scale_inv, sizes)
        return reference.swiglu(gate_up[:, 0], gate_up[:, 1], limit)

    def down(rows, experts, sizes):
        return product(rows, experts.down, experts.down_scale_inv, sizes)

    def forward(x, choice, weights, experts):
        return grouped.sorted_expert_mlp(x, choice, weights, experts, swiglu, down)

    differentiable = functools.partial(grouped.expert_mlp, limit=limit)
    return _differentiated_as(differentiable, forward)(x, choice, weights, experts)


def _differentiated_as(slow: Callable, fast: Callable) -> Callable:
    """`fast`, but where a gradient is asked for `slow`, which computes the same and has one."""
    both = jax.custom_vjp(fast)
    both.defvjp(lambda *args: jax.vjp(slow, *args), lambda pull, gradient: pull(gradient))
    return both
