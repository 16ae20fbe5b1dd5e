"""Sparse attention on Hopper GPUs: each query attends to the key and value rows that its index list names.

One head of keys and values serves all query heads (MLA in its absorbed form, V4's shared-KV attention): a key is a
whole row of `kv`, its value the row's first `v_head_dim` columns. Limits, beyond which NotImplementedError says why:
bfloat16, `v_head_dim` 512, rows of 512 or 576. Any number of heads (they are padded to 64), of queries, of indices.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import BFloat16, Float, Int

from . import mosaic
from . import sparse_attention_backward as backward_kernel
from . import sparse_attention_forward as forward_kernel

_UNIT_BITS = 35  # fixed point below the largest gradient; the 28 bits above it hold the sum


def sparse_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    indices: Int[Array, "B T K"],
    *,
    v_head_dim: int,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
    deterministic: bool = False,
) -> tuple[BFloat16[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention of each query over `kv[b, indices[b, t]]`; differentiable in q, kv and sinks.

    Args:
      q: queries.
      kv: key rows, whose first `v_head_dim` columns are the values.
      indices: rows of kv, in any order; -1 (or anything outside [0, S)) stands for nothing.
      v_head_dim: 512.
      scale: of the logits.
      sinks: a logit a head that takes part in the softmax and has no value.
      deterministic: sum the gradient of kv in 64-bit fixed point, so that runs agree bit for bit; slower.

    Returns:
      The output, and the natural log of the sum of exponentials of the scaled logits, sink included. A query with no
      row gives 0 and -inf (or its sink).

    Raises:
      NotImplementedError: for what this kernel does not do, before anything runs.
    """
    check(q, kv, indices, v_head_dim, sinks)
    logits_of_sinks = jnp.full(q.shape[2], -jnp.inf) if sinks is None else sinks
    return _attention(q, kv, indices, logits_of_sinks.astype(jnp.float32), float(scale), deterministic)


def check(q, kv, indices, v_head_dim, sinks) -> None:
    mosaic.require_hopper()
    batch, queries, heads, head_dim = q.shape
    if q.dtype != jnp.bfloat16 or kv.dtype != jnp.bfloat16:
        raise NotImplementedError(f"sparse attention needs bfloat16, and q is {q.dtype}, kv {kv.dtype}")
    if v_head_dim != forward_kernel.V_DIM or head_dim not in (512, 576):
        raise NotImplementedError(
            f"sparse attention needs rows of 512 or 576 with values of 512, and got {head_dim} with {v_head_dim}"
        )
    if kv.shape[::2] != (batch, head_dim) or indices.shape[:2] != (batch, queries):
        raise ValueError(f"shapes do not fit: q {q.shape}, kv {kv.shape}, indices {indices.shape}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks needs one logit for each of {heads} heads, and has shape {sinks.shape}")
    if 0 in (batch, queries, heads, kv.shape[1], indices.shape[2]):
        raise NotImplementedError(f"sparse attention needs something in every axis: q {q.shape}, kv {kv.shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, kv, indices, sinks, scale, deterministic):
    return _forward(q, kv, indices, sinks, scale, deterministic)[0]


def pad_to(x: Array, axis: int, multiple: int, value=0) -> Array:
    extra = -x.shape[axis] % multiple
    if not extra:
        return x
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)], constant_values=value)


def _rows(x: Array) -> Array:
    """[B, T, ...] -> [B * T, ...]."""
    return x.reshape(-1, *x.shape[2:])


def index_rows(indices: Array, num_keys: int, step: int) -> tuple[Array, Array]:
    """Index lists padded to whole loop steps, and how many steps (one at least) reach each list's last valid index."""
    lists = pad_to(_rows(indices.astype(jnp.int32)), 1, step, -1)
    valid = (lists >= 0) & (lists < num_keys)
    used = jnp.max(jnp.where(valid, jnp.arange(1, lists.shape[1] + 1, dtype=jnp.int32), 0), axis=1)
    return lists, jnp.maximum((used + step - 1) // step, 1)


def _forward(q, kv, indices, sinks, scale, deterministic):
    del deterministic
    batch, queries, heads, _ = q.shape
    lists, steps = index_rows(indices, kv.shape[1], forward_kernel.STEP)
    out, lse = forward_kernel.forward(
        pad_to(_rows(q), 1, forward_kernel.HEADS),
        kv,
        lists,
        steps,
        pad_to(sinks, 0, forward_kernel.HEADS, -jnp.inf),
        num_blocks=mosaic.num_multiprocessors(),
        scale=scale,
    )
    out = out[:, :heads].reshape(batch, queries, heads, -1)
    lse = lse[:, :heads].reshape(batch, queries, heads)
    return (out, lse), (q, kv, indices, sinks, out, lse)


def _backward(scale, deterministic, saved, gradients):
    q, kv, indices, sinks, out, lse = saved
    dout, dlse = gradients
    heads = q.shape[2]
    delta = jnp.einsum("btnv,btnv->btn", dout, out, preferred_element_type=jnp.float32) - dlse
    some = lse > -jnp.inf
    safe_lse = jnp.where(some, lse, 0.0)
    dsinks = -jnp.sum(jnp.where(some, jnp.exp(sinks - safe_lse) * delta, 0.0), axis=(0, 1))

    lists, steps = index_rows(indices, kv.shape[1], backward_kernel.STEP)
    unit = _fixed_point_unit(dout) if deterministic else jnp.ones((1,), jnp.float32)
    pad = functools.partial(pad_to, axis=1, multiple=forward_kernel.HEADS)
    dq, dkv = backward_kernel.backward(
        pad(_rows(q)),
        kv,
        lists,
        steps,
        pad(_rows(dout.astype(q.dtype))),
        pad(_rows(safe_lse)),
        pad(_rows(delta)),
        unit,
        scale=scale,
        deterministic=deterministic,
    )
    if deterministic:
        dkv = _from_fixed_point(dkv.reshape(*kv.shape, 2), unit)
    return dq[:, :heads].reshape(q.shape), dkv.astype(kv.dtype), None, dsinks


def _fixed_point_unit(dout: Array) -> Array:
    largest = jnp.maximum(jnp.max(jnp.abs(dout.astype(jnp.float32))), jnp.finfo(jnp.float32).tiny)
    return jnp.exp2(jnp.minimum(_UNIT_BITS - jnp.ceil(jnp.log2(largest)), 120.0))[None]


def _from_fixed_point(pairs: Int[Array, "B S H 2"], unit: Array) -> Array:
    """64-bit integers, low word first, to float32; through the magnitude, which keeps small negative values exact."""
    low, high = pairs[..., 0].astype(jnp.uint32), pairs[..., 1]
    negative = high < 0
    magnitude_low = jnp.where(negative, ~low + 1, low)
    magnitude_high = jnp.where(negative, ~high + (low == 0), high)
    magnitude = magnitude_high.astype(jnp.float32) * 2.0**32 + magnitude_low.astype(jnp.float32)
    return jnp.where(negative, -magnitude, magnitude) / unit


_attention.defvjp(_forward, _backward)
