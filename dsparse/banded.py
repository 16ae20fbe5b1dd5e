"""Attention over a sliding window and compressed entries, for XLA: index lists to select, a band for the window.

A window's indices are the same for neighbouring queries, so blocks of queries multiply with the one slice of rows
that covers their windows: memory and work are O(T * (window + K)), never T x T.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsparse.reference import NEG_INF

QUERY_BLOCK = 128
SCORE_BYTES = 128 << 20  # scores kept at once; more query blocks than that are taken in turns


class Entries(NamedTuple):
    """Compressed entries and which of them each query sees.

    rows: [B, E, H]. Query t sees entries first[t] <= e < last[t]; with `indices`, only those it lists (-1: none).
    """

    rows: Float[Array, "B E H"]
    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    indices: Int[Array, "B T K"] | None = None


def banded_attention(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B L H"],
    entries: Entries | None,
    *,
    window: int,
    scale: float,
    sinks: Float[Array, " N"],
    start: Int[Array, " B"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax over the last `window` rows, the visible entries and a sink per head; rows are keys and values at once.

    kv: window - 1 earlier rows, then the queries' own; query t sees rows t .. t + window - 1 that are >= start.
    segment_ids: rows of other segments are hidden; then no earlier rows may be visible.
    """
    batch, length, heads, width = q.shape
    block = min(max(QUERY_BLOCK, window - 1), length)
    count = -(-length // block)
    padding = count * block - length

    def blocks(x: Array) -> Array:
        """[B, T, ...] as [count, B, block, ...]."""
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, block, *x.shape[2:]), 1, 0)

    def blocks_with_earlier(x: Array) -> Array:
        """[B, window - 1 + T, ...] as [count, B, window - 1 + block, ...]: each block after the rows before it."""
        if count == 1:
            return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))[None]
        own = blocks(x[:, window - 1 :])
        earlier = jnp.concatenate([x[None, :, : window - 1], own[:-1, :, block - (window - 1) :]])
        return jnp.concatenate([earlier, own], axis=2)

    inputs = {"q": blocks(q), "kv": blocks_with_earlier(kv), "number": jnp.arange(count)}
    if segment_ids is not None:
        inputs["segments"] = blocks_with_earlier(jnp.pad(segment_ids, ((0, 0), (window - 1, 0))))
    if entries is not None:
        inputs |= {
            name: blocks(value) for name, value in entries._asdict().items() if name != "rows" and value is not None
        }

    @jax.checkpoint  # the backward pass computes a block's scores, and gathers its entries, again
    def attend(inputs: dict[str, Array]) -> Float[Array, "B block N H"]:
        rows = entries and entries.rows
        return _attend_block(inputs, rows, window=window, scale=scale, sinks=sinks, start=start)

    columns = block + window - 1
    if entries is not None:
        columns += (
            entries.rows.shape[1] if entries.indices is None else entries.indices.shape[-1] * (1 + width // heads)
        )
    at_once = max(1, SCORE_BYTES // (batch * heads * block * columns * 4))
    out = jax.vmap(attend)(inputs) if at_once >= count else jax.lax.map(attend, inputs)
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * block, heads, width)[:, :length]


def index_lists(
    kv: Float[Array, "B L H"],
    entries: Entries | None,
    *,
    window: int,
    start: Int[Array, " B"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B S H"], Int[Array, "B T K"]]:
    """The rows and entries of `banded_attention` in one table, and which of them each query sees: what kernels take."""
    row = jnp.arange(kv.shape[1] - (window - 1))[:, None] + jnp.arange(window)
    keep = row >= start[:, None, None]
    if segment_ids is not None:
        segments = jnp.pad(segment_ids, ((0, 0), (window - 1, 0)))
        keep = keep & (segments[:, row] == segment_ids[..., None])
    lists = [jnp.where(keep, row, -1)]
    if entries is None:
        return kv, lists[0]
    indices = entries.indices
    if indices is None:
        entry = jnp.arange(entries.rows.shape[1])
        seen = (entry >= entries.first[..., None]) & (entry < entries.last[..., None])
        indices = jnp.where(seen, entry, -1)
    lists.append(jnp.where(indices < 0, -1, kv.shape[1] + indices))
    return jnp.concatenate([kv, entries.rows], axis=1), jnp.concatenate(lists, axis=-1)


def _attend_block(inputs, rows, *, window, scale, sinks, start) -> Float[Array, "B block N H"]:
    q, kv = inputs["q"], inputs["kv"]
    block, count = q.shape[1], kv.shape[1]
    row, query = jnp.arange(count), jnp.arange(block)[:, None]
    keep = (row >= query) & (row < query + window)
    keep = keep & (row + inputs["number"] * block >= start[:, None, None])
    if "segments" in inputs:
        segments = inputs["segments"]
        keep = keep & (segments[:, None, :] == segments[:, window - 1 :, None])
    parts = [(kv, "S", jnp.broadcast_to(keep[:, :, None], (q.shape[0], block, 1, count)))]
    if "indices" in inputs:
        indices = inputs["indices"]
        chosen = jax.vmap(lambda table, index: table[index])(rows, jnp.maximum(indices, 0))
        parts.append((chosen, "TS", (indices >= 0)[:, :, None]))
    elif rows is not None:
        entry = jnp.arange(rows.shape[1])
        seen = (entry >= inputs["first"][..., None]) & (entry < inputs["last"][..., None])
        parts.append((rows, "S", seen[:, :, None]))
    return _joint_attention(q, parts, scale, sinks)


def _joint_attention(
    q: Float[Array, "B T N H"], parts, scale: float, sinks: Float[Array, " N"]
) -> Float[Array, "B T N H"]:
    """One softmax over groups of rows, each (rows [B, S, H] or [B, T, S, H], its letters, keep [B, T, 1, S])."""
    sinks = sinks.astype(jnp.float32)
    logits = []
    for rows, letters, keep in parts:
        score = jnp.einsum(f"BTNH,B{letters}H->BTNS", q, rows, preferred_element_type=jnp.float32) * scale
        logits.append(jnp.where(keep, score, NEG_INF))
    peak = sinks[:, None]
    for score in logits:
        peak = jnp.maximum(peak, jnp.max(score, axis=-1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    weights = [jnp.exp(score - peak) for score in logits]
    total = jnp.exp(sinks[:, None] - peak) + sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    out = sum(
        jnp.einsum(f"BTNS,B{letters}H->BTNH", w.astype(q.dtype), rows, preferred_element_type=jnp.float32)
        for w, (rows, letters, _) in zip(weights, parts, strict=True)
    )
    return (out / total).astype(q.dtype)
