"""Attention of all heads over one table of shared key-value rows under a mask, for XLA, with a backward pass of its own.

For masks that keep a good share of the table: windows, and selections from a table not much longer than they are.
Heads and queries are one axis of plain products. The backward pass makes the weights again from the log-sum-exp
(FlashAttention-2, arXiv:2307.08691, section 3.1), rows first, [S, T N]: what it then transposes is small.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsparse import remat

SCORE_BYTES = 4 << 20  # of the scores made at once on a CPU: they stay in its cache
ON_ACCELERATORS = 32  # times as many, so that products are large

# Of a function that makes rows and masks and attends, the backward pass keeps inputs and results, and makes those again.
keep_results = functools.partial(jax.checkpoint, policy=remat.POLICIES["selective"])


def queries_at_once(batch: int, heads: int, rows: int) -> int:
    """Queries of every sequence whose scores with `rows` rows fit into the budget."""
    budget = SCORE_BYTES * (1 if jax.default_backend() == "cpu" else ON_ACCELERATORS)
    return max(1, budget // (batch * heads * rows * 4))


def selection_mask(indices: Int[Array, "B T K"], rows: int) -> Bool[Array, "B T S"]:
    """Which of the `rows` rows each query's indices name; -1 names none."""

    def of_query(index: Int[Array, " K"]) -> Bool[Array, " S"]:
        return jnp.zeros(rows, bool).at[jnp.where(index < 0, rows, index)].set(True, mode="drop")

    return jax.vmap(jax.vmap(of_query))(indices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    q: Float[Array, "B T N H"],
    rows: Float[Array, "B S H"],
    keep: Bool[Array, "B T S"],
    sinks: Float[Array, " N"] | None,
    v_head_dim: int,
    scale: float,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Softmax attention to the rows that `keep` says, values being their first `v_head_dim` columns; and the
    log-sum-exp of the scaled logits, sinks included: `ops.sparse_attention` with a mask instead of indices."""
    logits = jnp.einsum("BTNH,BSH->BTNS", q, rows, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(keep[:, :, None], logits, -jnp.inf)
    peak = jnp.max(logits, axis=-1)
    if sinks is not None:
        peak = jnp.maximum(peak, sinks.astype(jnp.float32))
    peak = jnp.where(peak > -jnp.inf, peak, 0.0)
    weights = jnp.exp(logits - peak[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(jnp.float32) - peak)
    values = rows[..., :v_head_dim]
    out = jnp.einsum("BTNS,BSV->BTNV", weights.astype(rows.dtype), values, preferred_element_type=jnp.float32)
    # the sum divides the output: dividing the weights would write [T, S] once more
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.astype(q.dtype), jnp.log(total) + peak


def _forward(q, rows, keep, sinks, v_head_dim, scale):
    out, lse = remat.keep(attend(q, rows, keep, sinks, v_head_dim, scale))
    return (out, lse), (q, rows, keep, sinks, out, lse)


def _backward(v_head_dim, scale, residuals, gradients):
    q, rows, keep, sinks, out, lse = residuals
    d_out, d_lse = gradients
    # d logits = weights * (d weights - shift): the softmax's own term, and the gradient that reaches lse itself
    shift = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    finite = jnp.where(lse > -jnp.inf, lse, 0.0)
    values = rows[..., :v_head_dim]
    logits = jnp.einsum("BSH,BTNH->BSTN", rows, q, preferred_element_type=jnp.float32) * scale
    weights = jnp.exp(jnp.where(jnp.swapaxes(keep, 1, 2)[..., None], logits - finite[:, None], -jnp.inf))
    d_weights = jnp.einsum("BSV,BTNV->BSTN", values, d_out, preferred_element_type=jnp.float32)
    # each is read by several products: computed once
    d_logits, weights = jax.lax.optimization_barrier(
        ((weights * (d_weights - shift[:, None]) * scale).astype(q.dtype), weights.astype(q.dtype))
    )
    d_rows = jnp.einsum("BSTN,BTNH->BSH", d_logits, q, preferred_element_type=jnp.float32)
    d_values = jnp.einsum("BSTN,BTNV->BSV", weights, d_out, preferred_element_type=jnp.float32)
    d_rows = d_rows.at[..., :v_head_dim].add(d_values)
    d_q = jnp.einsum("BSH,BSTN->BHTN", rows, d_logits)  # XLA on a CPU has none of bfloat16 with a float32 result
    d_sinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(jnp.float32) - lse)
        d_sinks = -jnp.sum(weight * shift, axis=(0, 1)).astype(sinks.dtype)
    return jnp.moveaxis(d_q, 1, -1).astype(q.dtype), d_rows.astype(rows.dtype), None, d_sinks


attend.defvjp(_forward, _backward)


def join(
    first: tuple[Float[Array, "B T N V"], Float[Array, "B T N"]],
    second: tuple[Float[Array, "B T N V"], Float[Array, "B T N"]],
) -> Float[Array, "B T N V"]:
    """The output of one softmax over two sets of rows, from each set's output and log-sum-exp (`first`'s is finite)."""
    (out, lse), (other, other_lse) = first, second
    peak = jax.lax.stop_gradient(jnp.maximum(lse, other_lse))
    share, other_share = (jnp.exp(x - peak)[..., None] for x in (lse, other_lse))
    return ((share * out + other_share * other) / (share + other_share)).astype(out.dtype)
