"""Attention over a sliding window and compressed entries, for XLA: index lists to select, a band for the window.

A window's indices are the same for neighbouring queries, so blocks of queries multiply with the one slice of rows
that covers their windows: memory and work are O(T * (window + K)), never T x T.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsparse import gathered, shared_rows

QUERY_BLOCK = 64


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

    copied = (
        entries is not None and entries.indices is not None and not gathered.masked(q, entries.rows, entries.indices)
    )
    inputs = {"q": blocks(q), "kv": blocks_with_earlier(kv), "number": jnp.arange(count)}
    if segment_ids is not None:
        inputs["segments"] = blocks_with_earlier(jnp.pad(segment_ids, ((0, 0), (window - 1, 0))))
    if entries is not None and not copied:
        inputs |= {
            name: blocks(value) for name, value in entries._asdict().items() if name != "rows" and value is not None
        }

    @shared_rows.keep_results
    def attend(inputs: dict[str, Array]) -> tuple[Float[Array, "B block N H"], Float[Array, "B block N"]]:
        rows, keep = inputs["kv"], _window_mask(inputs, window, start)
        if "first" in inputs:
            rows = jnp.concatenate([rows, entries.rows], axis=1)
            keep = jnp.concatenate([keep, _entry_mask(inputs, entries.rows.shape[1])], axis=-1)
        return shared_rows.attend(inputs["q"], rows, keep, sinks, width, scale)

    columns = block + window - 1 + (entries.rows.shape[1] if "first" in inputs else 0)
    at_once = min(count, max(1, shared_rows.queries_at_once(batch, heads, columns) // block))
    out, lse = jax.lax.map(attend, inputs, batch_size=at_once) if at_once < count else jax.vmap(attend)(inputs)
    out, lse = (jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length] for x in (out, lse))
    if not copied:
        return out
    chosen = gathered.sparse_attention(q, entries.rows, entries.indices, None, width, scale)
    return shared_rows.join((out, lse), chosen)


def _window_mask(inputs: dict[str, Array], window: int, start: Int[Array, " B"]) -> Bool[Array, "B block L"]:
    """Which rows of a block, and of those before it, each of the block's queries sees."""
    block, count = inputs["q"].shape[1], inputs["kv"].shape[1]
    row, query = jnp.arange(count), jnp.arange(block)[:, None]
    keep = (row >= query) & (row < query + window)
    keep = keep & (row + inputs["number"] * block >= start[:, None, None])
    if "segments" in inputs:
        segments = inputs["segments"]
        keep = keep & (segments[:, None, :] == segments[:, window - 1 :, None])
    return keep


def _entry_mask(inputs: dict[str, Array], count: int) -> Bool[Array, "B block E"]:
    if "indices" in inputs:
        return shared_rows.selection_mask(inputs["indices"], count)
    entry = jnp.arange(count)
    return (entry >= inputs["first"][..., None]) & (entry < inputs["last"][..., None])


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
