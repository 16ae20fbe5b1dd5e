"""DeepSeek-V4's attention: a sliding window plus compressed entries of everything older (V4 report, section 2.3).

Queries have many heads of `head_dim`; one row per token is key and value of all of them. Every `compress_rate` tokens
are pooled into one more such row, an *entry*, which is visible once its last token is past:

- sliding_attention: the window alone.
- compressed_sparse_attention (CSA): small, overlapping windows of tokens an entry; a lightning indexer picks the
  `index_topk` entries of each query, or the layer shares those that the last such layer picked.
- heavily_compressed_attention (HCA): large windows; every entry is seen.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsparse import compression, ops
from dsparse.attention import Mixer
from dsparse.banded import Entries
from dsparse.cache import Arrays, CacheLayer
from dsparse.compression import Compressor, Indexer, ring_size, ring_slots
from dsparse.config import LayerSpec, ModelConfig
from dsparse.context import Context
from dsparse.layers import GroupedLinear, Linear, RMSNorm, apply_rope_to_tail, rms_normalize
from dsparse.params import Scope, normal, zeros

SERIES = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 1}


class IndexedCompressor(Compressor):
    """Overlapping windows, and the indexer that chooses among their entries."""

    def __init__(self, scope: Scope, config: ModelConfig, rate: int, head_dim: int, series: int, topk: int):
        super().__init__(scope, config, rate, head_dim, series)
        self.indexer = Indexer(scope["indexer"], config, rate, series, topk)


class CompressedAttention(Mixer):
    """Shared key-value attention over a window and, where the layer compresses, over entries.

    Cache: `kv` holds a ring of the newest rows, addressed by position, then the entries; `open` what `Compressor`
    keeps of unfinished windows; the indexer's `index_open` and `index_keys`.
    """

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec):
        c, init = config, normal(config.initializer_range)
        heads, width = c.num_attention_heads, c.num_attention_heads * c.head_dim
        self.q_a_proj = Linear(scope["q_a_proj"], c.hidden_size, c.q_lora_rank, ("latent", "embed"), init)
        self.q_a_norm = RMSNorm(scope["q_a_norm"], c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = Linear(scope["q_b_proj"], c.q_lora_rank, width, ("heads", "latent"), init)
        self.kv_proj = Linear(scope["kv_proj"], c.hidden_size, c.head_dim, ("latent", "embed"), init)
        self.kv_norm = RMSNorm(scope["kv_norm"], c.head_dim, c.rms_norm_eps)
        self.o_a_proj = GroupedLinear(scope["o_a_proj"], width, c.o_groups, c.o_lora_rank, ("heads", None), init)
        self.o_b_proj = Linear(scope["o_b_proj"], c.o_groups * c.o_lora_rank, c.hidden_size, ("embed", "heads"), init)
        self.sinks = scope.param("sinks", (heads,), (None,), zeros, minimum=jnp.float32)
        self.compressor = self._compressor(scope["compressor"], c, spec) if spec.compress_rate else None
        self.mixer, self.topk = spec.mixer, spec.index_topk
        self.config = config
        self.scale = c.head_dim**-0.5

    @staticmethod
    def _compressor(scope: Scope, config: ModelConfig, spec: LayerSpec) -> Compressor:
        shape = (spec.compress_rate, config.head_dim, SERIES[spec.mixer])
        if spec.indexer == "full":
            return IndexedCompressor(scope, config, *shape, spec.index_topk)
        return Compressor(scope, config, *shape)

    @staticmethod
    def init_cache(config: ModelConfig, spec: LayerSpec, layers: int, batch: int, slots: int, dtype) -> Arrays:
        c, rate = config, spec.compress_rate
        entries = slots // rate if rate else 0
        arrays = {"kv": jnp.zeros((layers, batch, ring_size(c.sliding_window) + entries, c.head_dim), dtype)}
        if rate:
            arrays |= Compressor.open_cache(rate, c.head_dim, SERIES[spec.mixer], layers, batch, dtype)
        if spec.indexer == "full":
            arrays |= Indexer.open_cache(rate, c.index_head_dim, SERIES[spec.mixer], layers, batch, dtype)
            arrays["index_keys"] = jnp.zeros((layers, batch, entries, c.index_head_dim), dtype)
        return arrays

    @staticmethod
    def selected_width(spec: LayerSpec, length: int, cache: Arrays | None, empty: bool) -> int | None:
        if spec.indexer != "full":
            return None
        entries = length // spec.compress_rate if cache is None else cache["index_keys"].shape[2]
        return spec.index_topk if entries > spec.index_topk else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: CacheLayer | None
    ) -> tuple[Float[Array, "B T D"], CacheLayer | None, Int[Array, "B T K"] | None]:
        c = self.config
        rope = context.rope if self.compressor is None or context.compress_rope is None else context.compress_rope
        q_latent = self.q_a_norm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).reshape(*x.shape[:2], c.num_attention_heads, c.head_dim)
        q = apply_rope_to_tail(rms_normalize(q, c.rms_norm_eps), rope)
        kv = apply_rope_to_tail(self.kv_norm(self.kv_proj(x)), rope)
        attend = self._whole if cache is None else self._cached
        out, indices, cache = attend(q, kv, x, q_latent, rope, context, cache)
        inverse = rope * jnp.array([1.0, -1.0], rope.dtype).reshape(2, 1, 1, 1)
        out = apply_rope_to_tail(out, inverse)  # values are rotated as keys are: take the query's rotation off again
        selected = indices if isinstance(self.compressor, IndexedCompressor) else None
        return self.o_b_proj(self.o_a_proj(out)), cache, selected

    def _whole(self, q, kv, x, q_latent, rope, context: Context, cache: None):
        """Tokens that attend among themselves only."""
        entries = indices = None
        if self.compressor is not None and q.shape[1] >= self.compressor.rate:
            windows = compression.whole_windows(context, self.compressor.rate, self.compressor.series)
            rows, _ = self.compressor.pool(x, windows, context, None)
            indices, _ = self._choose(x, q_latent, rope, windows, rows.shape[1], context, None)
            entries = Entries(rows, windows.first, windows.last, indices)
        window = self.config.sliding_window
        kv = jnp.pad(kv, ((0, 0), (window - 1, 0), (0, 0)))
        start = jnp.full(len(q), window - 1)
        out = ops.window_attention(
            q,
            kv,
            entries,
            window=window,
            scale=self.scale,
            sinks=self.sinks[...],
            start=start,
            segment_ids=context.segment_ids,
        )
        return out, indices, cache

    def _cached(self, q, kv, x, q_latent, rope, context: Context, cache: CacheLayer):
        """Tokens that also see what the cache holds. They are added to it, so later tokens see them."""
        window, first = self.config.sliding_window, context.positions[:, :1]
        ring = ring_size(window)
        few = (
            q.shape[1] <= compression.RETRACTABLE
        )  # so few that the ring, when it holds them too, still has every window
        if not few:
            earlier = cache.read("kv")[:, :ring].astype(kv.dtype)
            order = (first + jnp.arange(1 - window, 0)) % ring
            earlier = jnp.take_along_axis(earlier, order[..., None], axis=1)
        cache = cache.write("kv", kv, ring_slots(context.slots, ring))
        windows = indices = None
        if self.compressor is not None:
            windows = compression.cached_windows(context, self.compressor.rate, self.compressor.series)
            new, cache = self.compressor.pool(x, windows, context, cache)
            cache = cache.write("kv", new, jnp.where(windows.slots < 0, -1, ring + windows.slots))
            stored = cache.arrays["kv"].shape[2] - ring
            indices, cache = self._choose(x, q_latent, rope, windows, stored, context, cache)
        rows = cache.read("kv").astype(q.dtype)
        if few:
            joint = self._joint_indices(context, windows, indices, rows.shape[1] - ring)
            out, _ = ops.sparse_attention(
                q, rows, joint, v_head_dim=q.shape[-1], scale=self.scale, sinks=self.sinks[...]
            )
            return out, indices, cache
        entries = windows and Entries(rows[:, ring:], windows.first, windows.last, indices)
        kv, start = jnp.concatenate([earlier, kv], axis=1), jnp.maximum(window - 1 - first[:, 0], 0)
        out = ops.window_attention(q, kv, entries, window=window, scale=self.scale, sinks=self.sinks[...], start=start)
        return out, indices, cache

    def _choose(self, x, q_latent, rope, windows, entries: int, context: Context, cache):
        """Which of the `entries` each query attends to, None: all it can see; and the cache."""
        if isinstance(self.compressor, IndexedCompressor):
            return self.compressor.indexer.choose(x, q_latent, rope, windows, context, cache)
        shared = self.topk is not None and entries > self.topk
        return context.selected[self.mixer] if shared else None, cache

    def _joint_indices(self, context: Context, windows, indices, entries: int) -> Int[Array, "B T K"]:
        """Indices into the cached `kv`: each query's window in the ring, then its entries."""
        ring = ring_size(self.config.sliding_window)
        position = context.positions[..., None] - jnp.arange(self.config.sliding_window)
        joint = [jnp.where(position < 0, -1, position % ring)]
        if windows is not None:
            if indices is None:
                indices = jnp.arange(entries)
                indices = jnp.where(indices < windows.last[..., None], indices, -1)
            joint.append(jnp.where(indices < 0, -1, ring + indices))
        return jnp.concatenate(joint, axis=-1)
