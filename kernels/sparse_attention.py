"""Sparse attention on Hopper GPUs: each query attends to the key and value rows that its index list names.

One head of keys and values serves all query heads (MLA in its absorbed form, V4's shared-KV attention): a key is a
whole row of `kv`, its value the row's first `v_head_dim` columns. Limits, beyond which NotImplementedError says why:
bfloat16 or float16, `v_head_dim` up to 512, rows up to 576. Any number of heads (they are padded to 64), of queries, of
indices. The kernels know rows of 512 and 576 with values of 512: narrower ones get columns of zeros, at the full cost.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from . import mosaic
from . import sparse_attention_backward as backward_kernel
from . import sparse_attention_forward as forward_kernel

ROW_WIDTHS = (512, 576)
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
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention of each query over `kv[b, indices[b, t]]`; differentiable in q, kv and sinks.

    Args:
      q: queries.
      kv: key rows, whose first `v_head_dim` columns are the values.
      indices: rows of kv, in any order; -1 (or anything outside [0, S)) stands for nothing.
      v_head_dim: how many of a row's columns are the value.
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
    q, kv = widened(q), widened(kv)
    out, lse = _attention(q, kv, indices, sink_logits(sinks, q.shape[2]), float(scale), deterministic)
    return out[..., :v_head_dim], lse


def check(q, kv, indices, v_head_dim, sinks) -> None:
    mosaic.require_hopper()
    batch, queries, heads, head_dim = q.shape
    if q.dtype != kv.dtype or q.dtype not in mosaic.SIXTEEN_BITS:
        raise NotImplementedError(f"sparse attention needs bfloat16 or float16, and q is {q.dtype}, kv {kv.dtype}")
    if v_head_dim > min(forward_kernel.V_DIM, head_dim) or head_dim > ROW_WIDTHS[-1]:
        raise NotImplementedError(
            f"sparse attention takes rows up to 576 with values up to 512, and got {head_dim} with {v_head_dim}"
        )
    if kv.shape[::2] != (batch, head_dim) or indices.shape[:2] != (batch, queries):
        raise ValueError(f"shapes do not fit: q {q.shape}, kv {kv.shape}, indices {indices.shape}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks needs one logit for each of {heads} heads, and has shape {sinks.shape}")
    if 0 in (batch, queries, heads, kv.shape[1], indices.shape[2]):
        raise NotImplementedError(f"sparse attention needs something in every axis: q {q.shape}, kv {kv.shape}")


def widened(rows: Array) -> Array:
    """With zeros up to the next width that the kernels know: they change no logit."""
    width = next(width for width in ROW_WIDTHS if width >= rows.shape[-1])
    return pad_to(rows, rows.ndim - 1, width)


def sink_logits(sinks: Array | None, heads: int) -> Float[Array, " N"]:
    return jnp.full(heads, -jnp.inf) if sinks is None else sinks.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, kv, indices, sinks, scale, deterministic):
    del deterministic
    return attend(q, kv, indices, sinks, scale)


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


def attend(q, kv, indices, sinks, scale: float) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """The forward pass. Lists of so few queries that one block a query would leave the GPU idle are split."""
    batch, queries, heads, _ = q.shape
    blocks = mosaic.num_multiprocessors()
    head_blocks = mosaic.cdiv(heads, forward_kernel.HEADS)
    longest = mosaic.cdiv(indices.shape[2], forward_kernel.STEP)
    splits = max(1, min(longest, blocks // (batch * queries * head_blocks)))
    part = mosaic.cdiv(longest, splits) * forward_kernel.STEP
    splits = mosaic.cdiv(indices.shape[2], part)

    parts = pad_to(indices, 2, part, -1).reshape(batch, queries * splits, part) if splits > 1 else indices
    lists, steps = index_rows(parts, kv.shape[1], forward_kernel.STEP)
    out, lse = forward_kernel.forward(
        pad_to(jnp.repeat(_rows(q), splits, axis=0) if splits > 1 else _rows(q), 1, forward_kernel.HEADS),
        kv,
        lists,
        steps,
        pad_to(sinks if splits == 1 else jnp.full_like(sinks, -jnp.inf), 0, forward_kernel.HEADS, -jnp.inf),
        num_blocks=blocks,
        scale=scale,
    )
    out = out[:, :heads].reshape(batch, queries, splits, heads, -1)
    lse = lse[:, :heads].reshape(batch, queries, splits, heads)
    return (out[:, :, 0], lse[:, :, 0]) if splits == 1 else _joined(out, lse, sinks)


def _joined(out: Float[Array, "B T splits N V"], lse: Float[Array, "B T splits N"], sinks: Float[Array, " N"]):
    """Output and log-sum-exp over all parts of a list, and the sinks."""
    total = jnp.logaddexp(jax.nn.logsumexp(lse, axis=2), sinks)
    weights = jnp.where(lse > -jnp.inf, jnp.exp(lse - jnp.where(total > -jnp.inf, total, 0.0)[:, :, None]), 0.0)
    return jnp.einsum("btsn,btsnv->btnv", weights, out.astype(jnp.float32)).astype(out.dtype), total


def _forward(q, kv, indices, sinks, scale, deterministic):
    del deterministic
    out, lse = checkpoint_name(attend(q, kv, indices, sinks, scale), "kept")  # see `dsparse.remat`
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
