"""Dense causal attention for XLA, by blocks of queries, with a backward pass of its own.

Nothing of size [T, S] outlives a block: the backward pass makes each block's weights again from the log-sum-exp
(FlashAttention-2, arXiv:2307.08691, section 3.1). It makes them keys first, [S, T], so that two of its three gradients
are plain products: on CPU a product whose large left side must be transposed runs at half speed. Heads come before time
for the same reason.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsparse import remat
from dsparse.reference import NEG_INF

QUERY_BLOCK = 128  # queries attended at once: bounds the score matrix
PARTS = 8  # of a sequence, each with its own number of keys: saves almost half the products


class _Plan(NamedTuple):
    """`length` queries in `parts` of `count` blocks of `block` rows; a part sees the keys up to its end."""

    length: int
    parts: int
    count: int
    block: int

    @classmethod
    def of(cls, length: int) -> _Plan:
        blocks = -(-length // QUERY_BLOCK)
        parts = min(PARTS, blocks)
        count = -(-blocks // parts)
        return cls(length, parts, count, -(-length // (parts * count)))

    def cut(self, x: Array) -> Array:
        """[B, N, T, ...] as [parts, count, B, N, block, ...]."""
        padding = self.parts * self.count * self.block - self.length
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), *((0, 0),) * (x.ndim - 3)))
        x = x.reshape(*x.shape[:2], self.parts, self.count, self.block, *x.shape[3:])
        return jnp.moveaxis(x, (2, 3), (0, 1))

    def join(self, parts: list[Array]) -> Array:
        """The reverse of `cut`, of a list of [count, B, N, block, ...]."""
        x = jnp.moveaxis(jnp.stack(parts), (0, 1), (2, 3))
        return x.reshape(*x.shape[:2], -1, *x.shape[5:])[:, :, : self.length]

    def rows(self) -> Int[Array, "parts count block"]:
        """Each query's place in the sequence; padding stands at the last."""
        rows = jnp.minimum(jnp.arange(self.parts * self.count * self.block), self.length - 1)
        return rows.reshape(self.parts, self.count, self.block)

    def stop(self, part: int) -> int:
        return min((part + 1) * self.count * self.block, self.length)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T N V"]:
    """See `ops.causal_attention`."""
    return _causal_attention(q, k, v, segment_ids, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal_attention(q, k, v, segment_ids, scale):
    return _forward(q, k, v, segment_ids, scale)[0]


def _forward(q, k, v, segment_ids, scale):
    """The output, and the log-sum-exp of every query's scaled logits [B, N, T]."""
    plan = _Plan.of(q.shape[1])
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    queries, rows = plan.cut(q), plan.rows()
    parts = []
    for part in range(plan.parts):
        keys, values = k[:, :, : plan.stop(part)], v[:, :, : plan.stop(part)]

        def block(inputs, keys=keys, values=values):
            q, row = inputs
            return _attend(q, keys, values, _keep(row, keys.shape[2], segment_ids), scale)

        parts.append(_each(block, (queries[part], rows[part])))
    out, lse = (plan.join(list(xs)) for xs in zip(*parts, strict=True))
    return jnp.swapaxes(out, 1, 2), lse


def _each(block, inputs):
    """`block` over the leading axis of the inputs."""
    if jax.tree.leaves(inputs)[0].shape[0] > 1:
        return jax.lax.map(block, inputs)
    return jax.tree.map(lambda x: x[None], block(jax.tree.map(lambda x: x[0], inputs)))


def _keep(
    row: Int[Array, " block"], keys: int, segment_ids: Int[Array, "B T"] | None, keys_first: bool = False
) -> Bool[Array, "B _ _"]:
    """Which keys each query sees, [B, block, S] or [B, S, block]: made as it is read, since a transposed read of bytes
    costs more than the exponentials it masks."""
    by_query, by_key = (..., slice(None), None), (..., None, slice(None))
    if keys_first:
        by_query, by_key = by_key, by_query
    keep = (row[by_query] >= jnp.arange(keys)[by_key])[None]
    if segment_ids is None:
        return keep
    return keep & (segment_ids[:, row][by_query] == segment_ids[:, :keys][by_key])


def _attend(q, k, v, keep, scale) -> tuple[Float[Array, "B N block V"], Float[Array, "B N block"]]:
    logits = jnp.einsum("BNTH,BNSH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(keep[:, None], logits, NEG_INF)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # the sum divides the output: dividing the weights would write [T, S] once more
    out = jnp.einsum("BNTS,BNSV->BNTV", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.astype(v.dtype), (peak + jnp.log(total))[..., 0]


def _forward_with_residuals(q, k, v, segment_ids, scale):
    out, lse = remat.keep(_forward(q, k, v, segment_ids, scale))
    return out, (q, k, v, segment_ids, out, lse)


def _backward(scale, residuals, d_out):
    q, k, v, segment_ids, out, lse = residuals
    plan = _Plan.of(q.shape[1])
    shift = jnp.swapaxes(jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1), 1, 2)
    lse, shift = jax.lax.optimization_barrier((lse, shift))  # written by head: read by token they would be strided
    q, k, v, d_out = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, d_out))
    blocks = *(plan.cut(x) for x in (q, d_out, lse, shift)), plan.rows()
    d_k, d_v, d_q = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32), []
    for part in range(plan.parts):
        stop = plan.stop(part)
        keys, values = k[:, :, :stop], v[:, :, :stop]

        def block(sums, inputs, keys=keys, values=values):
            q, d_out, lse, shift, row = inputs
            keep = _keep(row, keys.shape[2], segment_ids, keys_first=True)
            d_q, *d_kv = _attend_backward(q, keys, values, keep, scale, d_out, lse, shift)
            return tuple(map(jnp.add, sums, d_kv)), d_q

        sums, part_q = _scan(block, (d_k[:, :, :stop], d_v[:, :, :stop]), tuple(x[part] for x in blocks))
        d_k, d_v = d_k.at[:, :, :stop].set(sums[0]), d_v.at[:, :, :stop].set(sums[1])
        d_q.append(part_q)
    gradients = zip((plan.join(d_q), d_k, d_v), (q, k, v), strict=True)
    return *(jnp.swapaxes(gradient, 1, 2).astype(x.dtype) for gradient, x in gradients), None


def _scan(block, carry, inputs):
    """`jax.lax.scan`, without a loop where there is one step."""
    if inputs[0].shape[0] > 1:
        return jax.lax.scan(block, carry, inputs)
    carry, out = block(carry, jax.tree.map(lambda x: x[0], inputs))
    return carry, out[None]


def _attend_backward(q, k, v, keep, scale, d_out, lse, shift):
    """Gradients of q [B, N, block, H], k [B, N, S, H] and v [B, N, S, V]."""
    logits = jnp.einsum("BNSH,BNTH->BNST", k, q, preferred_element_type=jnp.float32) * scale
    weights = jnp.exp(jnp.where(keep[:, None], logits - lse[:, :, None], NEG_INF))
    d_weights = jnp.einsum("BNSV,BNTV->BNST", v, d_out, preferred_element_type=jnp.float32)
    d_logits = (weights * (d_weights - shift[:, :, None]) * scale).astype(q.dtype)
    d_v = jnp.einsum("BNST,BNTV->BNSV", weights.astype(d_out.dtype), d_out, preferred_element_type=jnp.float32)
    d_k = jnp.einsum("BNST,BNTH->BNSH", d_logits, q, preferred_element_type=jnp.float32)
    d_q = jnp.einsum("BNST,BNSH->BNTH", d_logits, k, preferred_element_type=jnp.float32)
    return d_q, d_k, d_v


_causal_attention.defvjp(_forward_with_residuals, _backward)
