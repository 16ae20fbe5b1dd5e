"""Sparse attention for XLA: gather the selected rows, a bounded chunk of queries at a time.

Memory, forward and backward, is that of the inputs plus one chunk of gathered rows; the backward pass gathers again
and adds each row's gradient back where it came from.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

GATHERED_BYTES = 16 << 20  # rows gathered at once on a CPU: they stay in its cache
ON_ACCELERATORS = 16  # times as many, so that products are large


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def sparse_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    indices: Int[Array, "B T K"],
    sinks: Float[Array, " N"] | None,
    v_head_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """See `ops.sparse_attention`."""
    return _forward(q, kv, indices, sinks, v_head_dim, scale)


def _forward(q, kv, indices, sinks, v_head_dim, scale):
    def some(q, indices):
        rows, logits = _logits(q, kv, indices, scale)
        lse = _logsumexp(logits, sinks)
        weights = _weights(logits, lse).astype(kv.dtype)
        return jnp.einsum("BTNK,BTKV->BTNV", weights, rows[..., :v_head_dim]).astype(q.dtype), lse

    return _in_chunks(some, indices.shape, kv, (q, indices))


def _forward_with_residuals(q, kv, indices, sinks, v_head_dim, scale):
    out, lse = _forward(q, kv, indices, sinks, v_head_dim, scale)
    return (out, lse), (q, kv, indices, sinks, out, lse)


def _backward(v_head_dim, scale, residuals, gradients):
    q, kv, indices, sinks, out, lse = residuals
    d_out, d_lse = gradients
    # d logits = weights * (d weights - shift): the softmax's own term, and the gradient that reaches lse itself
    shift = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse

    def some(d_kv, chunk):
        q, indices, d_out, lse, shift = chunk
        rows, logits = _logits(q, kv, indices, scale)
        weights = _weights(logits, lse)
        d_weights = jnp.einsum("BTNV,BTKV->BTNK", d_out, rows[..., :v_head_dim], preferred_element_type=jnp.float32)
        d_logits = (weights * (d_weights - shift[..., None]) * scale).astype(q.dtype)
        d_q = jnp.einsum("BTNK,BTKH->BTNH", d_logits, rows, preferred_element_type=jnp.float32)
        d_rows = jnp.einsum("BTNK,BTNH->BTKH", d_logits, q, preferred_element_type=jnp.float32)
        d_values = jnp.einsum("BTNK,BTNV->BTKV", weights.astype(q.dtype), d_out, preferred_element_type=jnp.float32)
        d_rows = d_rows.at[..., :v_head_dim].add(d_values)
        return _scatter_add(d_kv, indices, d_rows), d_q.astype(q.dtype)

    d_kv = jnp.zeros(kv.shape, jnp.float32)
    d_kv, d_q = _scan_chunks(some, d_kv, indices.shape, kv, (q, indices, d_out, lse, shift))
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(jnp.float32) - lse)
        d_sinks = -jnp.sum(weight * shift, axis=(0, 1)).astype(sinks.dtype)
    return d_q, d_kv.astype(kv.dtype), np.zeros(indices.shape, jax.dtypes.float0), d_sinks


sparse_attention.defvjp(_forward_with_residuals, _backward)


def _logits(q, kv, indices, scale) -> tuple[Float[Array, "B T K H"], Float[Array, "B T N K"]]:
    """The selected rows, and each query's logits with them: -inf where the index is -1."""
    rows = jax.vmap(lambda table, index: table.at[index].get(mode="promise_in_bounds"))(kv, jnp.maximum(indices, 0))
    logits = jnp.einsum("BTNH,BTKH->BTNK", q, rows, preferred_element_type=jnp.float32) * scale
    return rows, jnp.where((indices >= 0)[:, :, None], logits, -jnp.inf)


def _logsumexp(logits: Float[Array, "B T N K"], sinks: Float[Array, " N"] | None) -> Float[Array, "B T N"]:
    peak = jnp.max(logits, axis=-1)
    if sinks is not None:
        peak = jnp.maximum(peak, sinks.astype(jnp.float32))
    peak = jnp.where(peak > -jnp.inf, peak, 0.0)
    total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(jnp.float32) - peak)
    return jnp.log(total) + peak


def _weights(logits: Float[Array, "B T N K"], lse: Float[Array, "B T N"]) -> Float[Array, "B T N K"]:
    return jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])


def _scatter_add(table: Float[Array, "B S H"], indices: Int[Array, "B T K"], rows: Float[Array, "B T K H"]) -> Array:
    """Add each row where its index says; -1 is dropped."""
    indices = jnp.where(indices < 0, table.shape[1], indices)  # negative would wrap around
    return jax.vmap(lambda t, i, r: t.at[i].add(r, mode="drop"))(table, indices, rows)


def _chunk_size(shape: tuple[int, int, int], kv: Array) -> int:
    batch, time, selected = shape
    row_bytes = batch * selected * kv.shape[-1] * kv.dtype.itemsize
    budget = GATHERED_BYTES * (1 if jax.default_backend() == "cpu" else ON_ACCELERATORS)
    return min(time, max(1, budget // row_bytes))


def _in_chunks(some, shape, kv, arrays):
    return _scan_chunks(lambda carry, chunk: (carry, some(*chunk)), None, shape, kv, arrays)[1]


def _scan_chunks(some, carry, shape, kv, arrays):
    """Scan `some(carry, arrays of a chunk) -> carry, outputs` over chunks of the time axis (1) of all arrays."""
    size, time = _chunk_size(shape, kv), shape[1]
    if size == time:
        return some(carry, arrays)
    count = -(-time // size)

    def split(a):
        fill = -1 if jnp.issubdtype(a.dtype, jnp.integer) else 0
        a = jnp.pad(a, [(0, 0), (0, count * size - time)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)
        return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)

    def join(a):
        a = jnp.moveaxis(a, 0, 1)
        return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :time]

    carry, outputs = jax.lax.scan(some, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, outputs)
