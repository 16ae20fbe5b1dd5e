"""Sparse attention for XLA: gather the selected rows, a bounded chunk of queries at a time; or, where the table is so
short that its products cost less than copying rows from it over and over, mask it.

Memory, forward and backward, is that of the inputs plus one chunk of gathered rows; the backward pass gathers again
and adds each row's gradient back where it came from.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsparse import grouped, remat, sharding, shared_rows

GATHERED_BYTES = 16 << 20  # rows gathered at once on a CPU: they stay in its cache
ON_ACCELERATORS = 16  # times as many, so that products are large
MASKED_UP_TO = 4  # rows of the table for each selected one


def masked(q: Float[Array, "B T N H"], kv: Float[Array, "B S H"], indices: Int[Array, "B T K"]) -> bool:
    """Whether the table is short: at most `MASKED_UP_TO` times as long as a selection, and no longer than the queries."""
    return kv.shape[1] <= min(MASKED_UP_TO * indices.shape[-1], q.shape[1])


def sparse_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"],
    indices: Int[Array, "B T K"],
    sinks: Float[Array, " N"] | None,
    v_head_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """See `ops.sparse_attention`."""
    if not masked(q, kv, indices):
        # asked here: the backward pass is traced where the mesh is no longer set
        return _gathered(q, kv, indices, sinks, v_head_dim, scale, sharding.current_mesh() is not None)

    @shared_rows.keep_results
    def some(q, indices):
        keep = shared_rows.selection_mask(indices, kv.shape[1])
        return shared_rows.attend(q, kv, keep, sinks, v_head_dim, scale)

    size = shared_rows.queries_at_once(q.shape[0], q.shape[2], kv.shape[1])
    return _scan_chunks(lambda carry, chunk: (carry, some(*chunk)), None, size, (q, indices))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _gathered(q, kv, indices, sinks, v_head_dim, scale, sharded):
    return _forward(q, kv, indices, sinks, v_head_dim, scale)


def _forward(q, kv, indices, sinks, v_head_dim, scale):
    def some(q, indices):
        rows, keep = _rows(kv, indices)
        logits = jnp.einsum("BTNH,BTKH->BTNK", q, rows, preferred_element_type=jnp.float32) * scale
        logits = jnp.where(keep, logits, -jnp.inf)
        lse = _logsumexp(logits, sinks)
        weights = _weights(logits, lse).astype(kv.dtype)
        # slicing the output instead of the rows saves a copy of them
        return jnp.einsum("BTNK,BTKH->BTNH", weights, rows)[..., :v_head_dim].astype(q.dtype), lse

    size = _chunk_size(indices.shape, kv)
    return _scan_chunks(lambda carry, chunk: (carry, some(*chunk)), None, size, (q, indices))[1]


def _forward_with_residuals(q, kv, indices, sinks, v_head_dim, scale, sharded):
    out, lse = remat.keep(_forward(q, kv, indices, sinks, v_head_dim, scale))
    return (out, lse), (q, kv, indices, sinks, out, lse)


def _backward(v_head_dim, scale, sharded, residuals, gradients):
    q, kv, indices, sinks, out, lse = residuals
    d_out, d_lse = gradients
    # d logits = weights * (d weights - shift): the softmax's own term, and the gradient that reaches lse itself
    shift = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse

    def some(d_kv, chunk):
        q, indices, d_out, lse, shift = chunk
        rows, keep = _rows(kv, indices)
        # queries meet keys as output gradients meet values: stacked, each product passes over the rows once
        d_out = jnp.pad(d_out, [(0, 0)] * 3 + [(0, kv.shape[-1] - v_head_dim)])
        both = jnp.concatenate([q, d_out.astype(q.dtype)], axis=2)
        products = jnp.einsum("BTMH,BTKH->BTMK", both, rows, preferred_element_type=jnp.float32)
        logits, d_weights = jnp.split(products, 2, axis=2)
        weights = _weights(jnp.where(keep, logits * scale, -jnp.inf), lse)
        d_logits = (weights * (d_weights - shift[..., None]) * scale).astype(q.dtype)
        d_q = jnp.einsum("BTNK,BTKH->BTNH", d_logits, rows, preferred_element_type=jnp.float32)
        factors = jnp.concatenate([d_logits, weights.astype(q.dtype)], axis=2)
        d_rows = jnp.einsum("BTMK,BTMH->BTKH", factors, both, preferred_element_type=jnp.float32)
        return _scatter_add(d_kv, indices, d_rows, sharded), d_q.astype(q.dtype)

    d_kv = jnp.zeros(kv.shape, jnp.float32)
    d_kv, d_q = _scan_chunks(some, d_kv, _chunk_size(indices.shape, kv), (q, indices, d_out, lse, shift))
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(jnp.float32) - lse)
        d_sinks = -jnp.sum(weight * shift, axis=(0, 1)).astype(sinks.dtype)
    return d_q, d_kv.astype(kv.dtype), np.zeros(indices.shape, jax.dtypes.float0), d_sinks


_gathered.defvjp(_forward_with_residuals, _backward)


def _rows(kv, indices) -> tuple[Float[Array, "B T K H"], Bool[Array, "B T 1 K"]]:
    """The selected rows, and which indices are not -1."""
    rows = jax.vmap(lambda table, index: table.at[index].get(mode="promise_in_bounds"))(kv, jnp.maximum(indices, 0))
    return rows, (indices >= 0)[:, :, None]


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


def _scatter_add(
    table: Float[Array, "B S H"], indices: Int[Array, "B T K"], rows: Float[Array, "B T K H"], sharded: bool
) -> Float[Array, "B S H"]:
    """Add each row where its index says; -1 is dropped."""
    batch, slots, width = table.shape
    add = functools.partial(grouped.add_rows, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)
    if sharded:  # this one XLA splits over the batch, but on a CPU it copies the rows first
        return jax.vmap(add)(table, jnp.where(indices < 0, slots, indices), rows)
    flat = jnp.where(indices < 0, batch * slots, indices + slots * jnp.arange(batch)[:, None, None])
    return add(table.reshape(-1, width), flat, rows).reshape(table.shape)


def _chunk_size(shape: tuple[int, int, int], kv: Array) -> int:
    batch, _, selected = shape
    row_bytes = batch * selected * kv.shape[-1] * kv.dtype.itemsize
    budget = GATHERED_BYTES * (1 if jax.default_backend() == "cpu" else ON_ACCELERATORS)
    return max(1, budget // row_bytes)


def _scan_chunks(some, carry, size: int, arrays):
    """Scan `some(carry, arrays of a chunk) -> carry, outputs` over chunks of `size` of the time axis (1) of all arrays."""
    time = arrays[0].shape[1]
    if size >= time:
        return some(carry, arrays)
    count = -(-time // size)
    size = -(-time // count)

    def split(a):
        fill = -1 if jnp.issubdtype(a.dtype, jnp.integer) else 0
        a = jnp.pad(a, [(0, 0), (0, count * size - time)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)
        return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)

    def join(a):
        a = jnp.moveaxis(a, 0, 1)
        return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :time]

    carry, outputs = jax.lax.scan(some, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, outputs)
