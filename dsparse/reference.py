"""Plain jax.numpy references of the ops in `dsparse.ops`, written to be read.

The models run these where no kernel serves; the tests hold every kernel against them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dsparse.params import FP4_BLOCK, FP8_BLOCK, PACKED_FP4

NEG_INF = -1e30  # finite, so that a row without any key stays free of NaN


def dequantize(
    weight: Shaped[Array, "*lead F _"], scale_inv: Shaped[Array, "*lead _ _"] | None, dtype
) -> Float[Array, "*lead F D"]:
    """The weight in `dtype`: 8-bit blocks of 128x128 times their scales (DeepSeek-V3, section 3.3.2); ragged edges allowed.

    A packed FP4 weight [F, D/2] has one scale for 32 values of a row.
    """
    if scale_inv is None:
        return weight.astype(dtype)
    scale = scale_inv.astype(jnp.float32)
    if weight.dtype == PACKED_FP4:
        values = jax.lax.bitcast_convert_type(weight, jnp.float4_e2m1fn).astype(
            jnp.float32
        )  # [..., D/2, 2], low nibble first
        values = values.reshape(*weight.shape[:-1], 2 * weight.shape[-1])
        return (values * jnp.repeat(scale, FP4_BLOCK, axis=-1)[..., : values.shape[-1]]).astype(dtype)
    rows, columns = weight.shape[-2:]
    scale = jnp.repeat(scale, FP8_BLOCK, axis=-2)[..., :rows, :]
    scale = jnp.repeat(scale, FP8_BLOCK, axis=-1)[..., :columns]
    return (weight.astype(jnp.float32) * scale).astype(dtype)


@jax.custom_vjp
def gradient_once(y: Array) -> Array:
    """`y`, whose gradient is computed before anything reads it.

    A product's gradient is read twice, once transposed; XLA on CPU would compute it again there, walking across memory.
    """
    return y


gradient_once.defvjp(lambda y: (y, None), lambda _, g: (jax.lax.optimization_barrier(g),))


# Of work that moves memory rather than multiplies: the backward pass does it again from its inputs, which costs less
# than keeping what lies between them and the output.
recomputed = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)


def swiglu(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], limit: float | None = None
) -> Float[Array, "*batch F"]:
    """silu(gate) * up; with a limit, gate is at most that and up within +-limit (DeepSeek-V4)."""

    @recomputed
    def activate(gate, up):
        if limit is not None:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return jax.nn.silu(gate) * up

    return activate(gate, up)


def masked_softmax(logits: Float[Array, "*batch S"], keep: Array) -> Float[Array, "*batch S"]:
    """float32 softmax over the kept entries; rows that keep nothing are all zero."""
    logits = jnp.where(keep, logits.astype(jnp.float32), NEG_INF)
    weights = jnp.where(keep, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N V"], keep: Array, scale: float
) -> Float[Array, "B T N V"]:
    """Softmax attention under a mask `keep` [B|1, T, S] that leaves every query a key.

    Heads come first in both products, and the sum divides the output: on CPU anything else copies or rewrites [T, S].
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    logits = jnp.einsum("BNTH,BNSH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(keep[:, None], logits, NEG_INF)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    out = jnp.einsum("BNTS,BNSV->BNTV", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return jnp.swapaxes(out / jnp.sum(weights, axis=-1, keepdims=True), 1, 2).astype(v.dtype)


def latent_attention(
    q: Float[Array, "B T N C"], latent: Float[Array, "B S C"], keep: Array, *, v_head_dim: int, scale: float
) -> Float[Array, "B T N V"]:
    """Attention of many heads over one shared key-value row per token, whose first `v_head_dim` columns are the values."""
    # latent first: XLA on CPU then reads it as it lies; slicing the result instead of the latent saves a copy of it
    logits = jnp.einsum("BSC,BTNC->BSTN", latent, q, preferred_element_type=jnp.float32) * scale
    weights = masked_softmax(jnp.moveaxis(logits, 1, -1), keep[:, :, None])
    return jnp.einsum("BTNS,BSC->BTNC", weights.astype(latent.dtype), latent)[..., :v_head_dim]


def sparse_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    indices: Int[Array, "B T K"],
    *,
    v_head_dim: int,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention of each query over the rows of `kv` that its indices name (-1: nothing); see `ops.sparse_attention`."""
    valid = indices >= 0
    rows = jax.vmap(lambda table, index: table[index])(kv, jnp.maximum(indices, 0))
    logits = jnp.einsum("BTNH,BTKH->BTNK", q, rows, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(valid[:, :, None], logits, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, sink], axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])[..., : indices.shape[-1]]
    return jnp.einsum("BTNK,BTKV->BTNV", weights.astype(kv.dtype), rows[..., :v_head_dim]), lse


def indexer_logits(
    q: Float[Array, "B T N H"], k: Float[Array, "B S H"], weights: Float[Array, "B T N"]
) -> Float[Array, "B T S"]:
    """Lightning indexer scores: sum over heads of weight * relu(q . k), float32 (DeepSeek-V3.2, equation 1)."""
    scores = jnp.einsum("BTNH,BSH->BTNS", q, k, preferred_element_type=jnp.float32)
    return jnp.einsum("BTN,BTNS->BTS", weights.astype(jnp.float32), jax.nn.relu(scores))


def topk(scores: Float[Array, "R S"], k: int, lengths: Int[Array, " R"] | None = None) -> Int[Array, "R k"]:
    """Positions of the k largest among each row's first `lengths` entries; ties go to the lowest position, -1 fills."""
    if lengths is not None:
        scores = jnp.where(jnp.arange(scores.shape[-1]) < lengths[:, None], scores, -jnp.inf)
    values, positions = jax.lax.top_k(jnp.where(scores == 0, 0.0, scores), k)  # top_k orders -0.0 below 0.0
    return jnp.where(values > -jnp.inf, positions, -1)


def grouped_matmul(
    x: Float[Array, "M D"], weights: Float[Array, "E F D"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Each row times its group's matrix; rows past the last group give 0. One dense product a group: for tests."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])[:, None]
    products = jnp.einsum("MD,EFD->EMF", x, weights)
    inside = (rows[None] < ends[:, None, None]) & (rows[None] >= (ends - group_sizes)[:, None, None])
    return jnp.sum(jnp.where(inside, products, 0), axis=0)
