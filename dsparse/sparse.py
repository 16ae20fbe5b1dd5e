"""DeepSeek Sparse Attention (DeepSeek-V3.2, section 2.1): MLA over the tokens that a lightning indexer selects."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsparse import ops
from dsparse.attention import LatentAttention
from dsparse.cache import Arrays, CacheLayer
from dsparse.config import LayerSpec, ModelConfig
from dsparse.context import Context, segment_starts
from dsparse.layers import LayerNorm, Linear, apply_rope
from dsparse.params import Scope, normal


class Indexer(nnx.Module):
    """Lightning indexer: a few cheap heads that score every earlier token for every query (equation 1).

    Its rotary slice leads, half-split in DeepSeek-V3.2 and interleaved in GLM-5 (`indexer_rope_interleave`). Selecting
    passes no gradient.
    """

    def __init__(self, scope: Scope, config: ModelConfig):
        c, init = config, normal(config.initializer_range)
        heads, dim = c.index_n_heads, c.index_head_dim
        self.wq_b = Linear(scope["wq_b"], c.q_lora_rank or c.hidden_size, heads * dim, (None, "latent"), init)
        self.wk = Linear(scope["wk"], c.hidden_size, dim, (None, "embed"), init)
        self.k_norm = LayerNorm(scope["k_norm"], dim)
        self.weights_proj = Linear(
            scope["weights_proj"], c.hidden_size, heads, (None, "embed"), init, minimum=jnp.float32
        )
        self.config = config

    def queries(self, residual: Float[Array, "B T L"], context: Context) -> Float[Array, "B T N H"]:
        """residual: what the attention's own queries are projected from."""
        q = self.wq_b(residual).reshape(*residual.shape[:2], self.config.index_n_heads, -1)
        return self._rotate(q, context)

    def keys(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T H"]:
        return self._rotate(self.k_norm(self.wk(x)), context)

    def head_weights(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N"]:
        """Each head's say, float32, with the scales of heads and of the dot product folded in."""
        c = self.config
        return self.weights_proj(x.astype(jnp.float32)) * (c.index_n_heads**-0.5 * c.index_head_dim**-0.5)

    def _rotate(self, x: Array, context: Context) -> Array:
        rope, rest = jnp.split(x, [self.config.qk_rope_head_dim], axis=-1)
        rope = apply_rope(rope, context.rope, self.config.indexer_rope_interleave)
        return jnp.concatenate([rope, rest], axis=-1)


class IndexedLatentAttention(LatentAttention):
    """MLA, in latent space, over the index_topk tokens with the highest indexer scores; ties go to the earliest.

    A layer whose spec says "shared" has no indexer and takes the indices that the last full layer selected. Where
    top-k covers every token there can be, the attention is dense and nothing is scored.

    Cache: the latents, and an index key of index_head_dim a token.
    """

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec):
        super().__init__(scope, config, spec)
        self.indexer = Indexer(scope["indexer"], config) if spec.indexer == "full" else None
        self.topk, self.mixer = spec.index_topk, spec.mixer

    @staticmethod
    def init_cache(config: ModelConfig, spec: LayerSpec, layers: int, batch: int, slots: int, dtype) -> Arrays:
        cache = LatentAttention.init_cache(config, spec, layers, batch, slots, dtype)
        if spec.indexer == "full" and slots > spec.index_topk:
            cache["index_key"] = jnp.zeros((layers, batch, slots, config.index_head_dim), dtype)
        return cache

    @staticmethod
    def selected_width(spec: LayerSpec, length: int, cache: Arrays | None, empty: bool) -> int | None:
        tokens = length if cache is None or empty else cache["latent"].shape[2]
        return spec.index_topk if spec.indexer == "full" and tokens > spec.index_topk else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: CacheLayer | None
    ) -> tuple[Float[Array, "B T D"], CacheLayer | None, Int[Array, "B T K"] | None]:
        residual = self.query_residual(x)
        q_nope, q_rope = self.queries(residual, context)
        latent = self.latents(x, context)
        if cache is not None:
            cache = cache.write("latent", latent, context.slots)
            if "index_key" in cache.arrays:
                cache = cache.write("index_key", self.indexer.keys(x, context), context.slots)
        past = None if context.empty_cache else cache
        if (x.shape[1] if past is None else past.arrays["latent"].shape[2]) <= self.topk:
            return self.attend_to_all(q_nope, q_rope, latent, context, cache), cache, None
        selected = None if self.indexer is None else self.select(x, residual, context, past)
        indices = context.selected[self.mixer] if selected is None else selected
        kv = latent if past is None else past.read("latent").astype(latent.dtype)

        def attend(q):
            return ops.sparse_attention(q, kv, indices, v_head_dim=self.config.kv_lora_rank, scale=self.scale)[0]

        out = self.absorbed(q_nope, q_rope, attend)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache, selected

    def select(self, x: Array, residual: Array, context: Context, past: CacheLayer | None) -> Int[Array, "B T K"]:
        """The tokens each query attends to: slots of the cache `past`, or rows of `x` without one; -1 for nothing."""
        x, residual = jax.lax.stop_gradient((x, residual))
        q, weights = self.indexer.queries(residual, context), self.indexer.head_weights(x)
        if past is not None:
            k = past.read("index_key").astype(q.dtype)
            return ops.indexer_topk(q, k, weights, self.topk, ends=context.positions + 1)
        row = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        starts = None if context.segment_ids is None else segment_starts(context.segment_ids)
        k = self.indexer.keys(x, context)
        return ops.indexer_topk(q, k, weights, self.topk, ends=row + 1, starts=starts, own_keys=True)
