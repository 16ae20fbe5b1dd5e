"""Cross-entropy of the next token, without ever holding the logits of all tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_BYTES = 8 << 20  # float32 logits held at once, on each part of a sharded batch


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    batch_ways: int = 1,
) -> Float[Array, ""]:
    """Sum over tokens of weight * -log softmax(hidden head^T)[target], in float32.

    The logits exist for one chunk of time steps at once. Their gradient is taken while they are there (no second
    product with the head in the backward pass) and accumulated in float32.

    hidden: after the final norm. weights: 0 leaves a token out. batch_ways: devices the batch is split over.
    """
    batch, time, _ = hidden.shape
    count = min(time, max(1, -(-batch * time * head.shape[0] * 4 // (CHUNK_BYTES * batch_ways))))
    size = -(-time // count)
    pad = count * size - time

    def chunks(x):  # [count, B, size, ...]: cut along time, so that a sharded batch stays where it is
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    return _chunked(chunks(hidden), head, chunks(targets), chunks(weights))


@jax.custom_vjp
def _chunked(hidden, head, targets, weights):
    def step(total, chunk):
        h, t, w = chunk
        return total + _chunk_loss(_logits(h, head), t, w)[0], None

    return jax.lax.scan(step, jnp.zeros(()), (hidden, targets, weights))[0]


def _logits(hidden: Float[Array, "B T D"], head: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    return jnp.einsum("BTD,VD->BTV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _chunk_loss(logits, targets, weights):
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (normalizer - target)), normalizer


def _chunked_fwd(hidden, head, targets, weights):
    def step(carry, chunk):
        total, head_gradient = carry
        h, t, w = chunk
        logits = _logits(h, head)
        loss, normalizer = _chunk_loss(logits, t, w)
        hit = t[..., None] == jnp.arange(head.shape[0], dtype=t.dtype)
        gradient = (jnp.exp(logits - normalizer[..., None]) - hit) * w[..., None]
        gradient = jax.lax.optimization_barrier(gradient.astype(h.dtype))  # else computed again for each product
        # hidden first: the small factor is the one that gets transposed
        head_gradient += jnp.einsum("BTD,BTV->DV", h, gradient, preferred_element_type=jnp.float32)
        return (total + loss, head_gradient), jnp.einsum("BTV,VD->BTD", gradient, head.astype(h.dtype))

    start = jnp.zeros(()), jnp.zeros(head.shape[::-1], jnp.float32)
    (total, head_gradient), hidden_gradient = jax.lax.scan(step, start, (hidden, targets, weights))
    return total, (hidden_gradient, head_gradient.T.astype(head.dtype))


def _chunked_bwd(gradients, g):
    hidden_gradient, head_gradient = gradients
    return hidden_gradient * g.astype(hidden_gradient.dtype), head_gradient * g.astype(head_gradient.dtype), None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
