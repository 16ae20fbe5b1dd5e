"""Pooling windows of tokens into compressed entries, and choosing entries by index (DeepSeek-V4, section 2.3).

Windows start at multiples of `rate` in each sequence's own positions. `Windows` says which tokens make up which
entry, whether they stand in one pass, in packed segments, or partly in a cache.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsparse import ops
from dsparse.cache import Arrays, CacheLayer
from dsparse.config import ModelConfig
from dsparse.context import Context
from dsparse.layers import Linear, RMSNorm, apply_rope_to_tail, rope_cos_sin
from dsparse.params import Scope, normal, zeros

RETRACTABLE = 8  # newest tokens of a row that later calls may replace (rejected drafts): rings keep that much more


@dataclasses.dataclass(frozen=True)
class Windows:
    """The entries that one pass pools, and the entries its queries see.

    sources: rows an entry is pooled from, as indices into (what the cache kept open, then this pass's tokens); for an
        overlapping window, the tokens before it come first; -1: none. None: consecutive tokens from the first on.
    positions: of each entry's first token. slots: where a cache stores each entry; -1: not complete, not stored.
    first, last: query t sees entries first[t] <= e < last[t].
    """

    sources: Int[Array, "B E W"] | None
    positions: Int[Array, "B E"]
    slots: Int[Array, "B E"]
    first: Int[Array, "B T"]
    last: Int[Array, "B T"]


def whole_windows(context: Context, rate: int, series: int) -> Windows:
    """Windows of a pass that begins with the first token of every sequence."""
    if context.segment_ids is not None:
        return _segment_windows(context, rate, series)
    batch, length = context.positions.shape
    count = length // rate
    entry = jnp.broadcast_to(jnp.arange(count), (batch, count))
    tokens = jnp.sum(context.slots >= 0, axis=1)[:, None]
    slots = jnp.where((entry + 1) * rate <= tokens, entry, -1)
    last = jnp.broadcast_to((jnp.arange(length) + 1) // rate, (batch, length))
    return Windows(None, context.positions[:, : count * rate : rate], slots, jnp.zeros_like(last), last)


def _segment_windows(context: Context, rate: int, series: int) -> Windows:
    """Windows that restart with every packed segment; a row's entries are numbered in order of their last tokens."""
    segments = context.segment_ids
    length = segments.shape[1]
    changed = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    token = jnp.arange(length)
    index = token - jax.lax.cummax(jnp.where(changed, token, 0), axis=1)  # of the token in its segment
    last = jnp.cumsum((index + 1) % rate == 0, axis=1)
    first = last - (index + 1) // rate
    entry = jnp.arange(length // rate)
    end = jax.vmap(lambda closed: jnp.searchsorted(closed, entry + 1))(last)  # the token that completes each entry
    end = jnp.minimum(end, length - 1)
    offset = jnp.arange(series * rate) - (series * rate - 1)
    sources = end[..., None] + offset
    sources = jnp.where(jnp.take_along_axis(index, end, axis=1)[..., None] + offset >= 0, sources, -1)
    start = jnp.maximum(end - (rate - 1), 0)
    return Windows(sources, jnp.take_along_axis(context.positions, start, axis=1), jnp.full_like(end, -1), first, last)


def cached_windows(context: Context, rate: int, series: int) -> Windows:
    """Windows that this chunk completes; their first tokens may stand in the ring of open windows.

    Each row's tokens stand at the front of the chunk at consecutive positions, padding (slot -1) after them.
    """
    positions, length = context.positions, context.positions.shape[1]
    start = positions[:, :1]
    end = start + jnp.sum(context.slots >= 0, axis=1, keepdims=True)
    entry = start // rate + jnp.arange(-(-length // rate))
    position = (entry[..., None] - (series - 1)) * rate + jnp.arange(series * rate)
    ring = ring_size(rate * series)
    in_chunk = ring + jnp.minimum(position - start[..., None], length - 1)
    sources = jnp.where(position < start[..., None], position % ring, in_chunk)
    sources = jnp.where(position < 0, -1, sources)
    slots = jnp.where((entry + 1) * rate <= end, entry, -1)
    last = (positions + 1) // rate
    return Windows(sources, entry * rate, slots, jnp.zeros_like(last), last)


def ring_size(tokens: int) -> int:
    """Slots of a ring, addressed by position modulo its size, that must remember the last `tokens` tokens."""
    return tokens + RETRACTABLE - 1


def ring_slots(slots: Int[Array, "B T"], size: int) -> Int[Array, "B T"]:
    """Where a ring stores the tokens whose positions are `slots`; -1 for padding and what the chunk replaces."""
    end = jnp.max(slots, axis=1, keepdims=True) + 1
    return jnp.where((slots >= 0) & (slots >= end - size), slots % size, -1)


def _least(x: Array) -> float:
    """The gate of nothing: finite in x's number type, so that a window without any token stays free of NaN."""
    return float(jnp.finfo(x.dtype).min)


class Compressor(nnx.Module):
    """Softmax-gated pooling of windows (equations 9-12 and 20-23), per channel, with a learned bias per place.

    series: 1, or 2 for overlapping windows: a token offers one value to its own window's entry and another to the next.
    Cache: `open`, a ring of the newest tokens' values and gates.
    """

    open_name = "open"

    def __init__(self, scope: Scope, config: ModelConfig, rate: int, head_dim: int, series: int):
        d, width, init = config.hidden_size, series * head_dim, normal(config.initializer_range)
        self.kv_proj = Linear(scope["kv_proj"], d, width, ("latent", "embed"), init)
        self.gate_proj = Linear(scope["gate_proj"], d, width, ("latent", "embed"), init)
        self.position_bias = scope.param("position_bias", (rate, width), (None, None), zeros, minimum=jnp.float32)
        self.kv_norm = RMSNorm(scope["kv_norm"], head_dim, config.rms_norm_eps)
        self.rate, self.series, self.head_dim = rate, series, head_dim
        self.rope = config.compress_rope_parameters or config.rope_parameters
        self.rope_dim = config.qk_rope_head_dim

    @classmethod
    def open_cache(cls, rate: int, head_dim: int, series: int, layers: int, batch: int, dtype) -> Arrays:
        return {cls.open_name: jnp.zeros((layers, batch, ring_size(rate * series), 2 * series * head_dim), dtype)}

    def pool(
        self, x: Float[Array, "B T D"], windows: Windows, context: Context, cache: CacheLayer | None
    ) -> tuple[Float[Array, "B E H"], CacheLayer | None]:
        """The entries of `windows`, normed and rotated to their first token's position; the cache with these tokens."""
        tokens = jnp.concatenate([self.kv_proj(x), self.gate_proj(x)], axis=-1)
        rows = tokens
        if cache is not None:
            if windows.sources is not None:
                rows = jnp.concatenate([cache.read(self.open_name).astype(x.dtype), tokens], axis=1)
            slots = ring_slots(context.slots, ring_size(self.rate * self.series))
            cache = cache.write(self.open_name, tokens, slots)
        values, gates = self._in_order(rows) if windows.sources is None else self._gathered(rows, windows.sources)
        weights = jax.nn.softmax(gates.astype(jnp.float32) + self._bias(), axis=2)
        entries = self.kv_norm(jnp.sum(values * weights.astype(values.dtype), axis=2))
        return apply_rope_to_tail(entries, rope_cos_sin(self.rope, self.rope_dim, windows.positions)), cache

    def _bias(self) -> Float[Array, "W H"]:
        bias = self.position_bias[...].astype(jnp.float32).reshape(self.rate, self.series, self.head_dim)
        return jnp.swapaxes(bias, 0, 1).reshape(self.series * self.rate, self.head_dim)

    def _in_order(self, rows: Float[Array, "B T C"]) -> tuple[Float[Array, "B E W H"], Float[Array, "B E W H"]]:
        """Values and gates of consecutive windows."""
        batch, count = rows.shape[0], rows.shape[1] // self.rate
        rows = rows[:, : count * self.rate].reshape(batch, count, self.rate, 2, self.series, self.head_dim)
        own = rows[..., -1, :]
        if self.series == 2:
            before = jnp.roll(rows[..., 0, :], 1, axis=1)  # each window's predecessor; the first has none
            nothing = jnp.array([0.0, _least(rows)], rows.dtype)[:, None]
            first = jnp.arange(count)[:, None, None, None] == 0
            own = jnp.concatenate([jnp.where(first, nothing, before), own], axis=2)
        return own[..., 0, :], own[..., 1, :]

    def _gathered(
        self, rows: Float[Array, "B L C"], sources: Int[Array, "B E W"]
    ) -> tuple[Float[Array, "B E W H"], Float[Array, "B E W H"]]:
        """Values and gates of the rows that `sources` name."""
        rows = rows.reshape(*rows.shape[:2], 2, self.series, self.head_dim)
        parts = [
            jax.vmap(lambda table, index: table[index])(rows[:, :, :, s], jnp.maximum(part, 0))
            for s, part in enumerate(jnp.split(sources, self.series, axis=-1))
        ]
        chosen = jnp.concatenate(parts, axis=2)
        present = (sources >= 0)[..., None]
        return chosen[..., 0, :], jnp.where(present, chosen[..., 1, :], _least(rows))


class Scorer(nnx.Module):
    """How much each indexer head counts, by token."""

    def __init__(self, scope: Scope, config: ModelConfig):
        init = normal(config.initializer_range)
        self.weights_proj = Linear(
            scope["weights_proj"], config.hidden_size, config.index_n_heads, (None, "embed"), init
        )


class Indexer(Compressor):
    """Lightning indexer over entries of its own (equations 13-17): sum over heads of weight * relu(q . key).

    Cache: `index_open` and `index_keys`, one key an entry. No gradient passes through the choice.
    """

    open_name = "index_open"

    def __init__(self, scope: Scope, config: ModelConfig, rate: int, series: int, topk: int):
        super().__init__(scope, config, rate, config.index_head_dim, series)
        heads, init = config.index_n_heads, normal(config.initializer_range)
        self.q_b_proj = Linear(scope["q_b_proj"], config.q_lora_rank, heads * self.head_dim, ("heads", "latent"), init)
        self.scorer = Scorer(scope["scorer"], config)
        self.heads, self.topk = heads, topk

    def choose(
        self,
        x: Float[Array, "B T D"],
        q_latent: Float[Array, "B T C"],
        rope: Float[Array, "2 B T half"],
        windows: Windows,
        context: Context,
        cache: CacheLayer | None,
    ) -> tuple[Int[Array, "B T K"] | None, CacheLayer | None]:
        """The index_topk entries of each query, -1 where fewer are visible; None where all entries fit."""
        keys, cache = self.pool(x, windows, context, cache)
        if cache is not None:
            cache = cache.write("index_keys", keys, windows.slots)
            keys = cache.read("index_keys").astype(x.dtype)
        if keys.shape[1] <= self.topk:
            return None, cache
        q = self.q_b_proj(q_latent).reshape(*x.shape[:2], self.heads, self.head_dim)
        weights = self.scorer.weights_proj(x).astype(jnp.float32) * (self.head_dim * self.heads) ** -0.5
        starts = None if context.segment_ids is None else windows.first
        q = apply_rope_to_tail(q, rope)
        own = cache is None or context.empty_cache
        if own:
            keys = keys[:, : -(-x.shape[1] // self.rate)]  # of a cache, the rest is empty
        return ops.indexer_topk(q, keys, weights, self.topk, starts=starts, ends=windows.last, own_keys=own), cache
