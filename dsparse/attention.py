"""Multi-head latent attention (MLA, DeepSeek-V2 section 2.1), dense.

Two equal formulations: *expanded* keys and values per head (training, prefill: fewest operations), and *absorbed*,
where the queries move into the latent space and every head reads the same cached latent (decode: fewest bytes).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsparse import ops
from dsparse.cache import Arrays, CacheLayer
from dsparse.config import LayerSpec, ModelConfig
from dsparse.context import Context
from dsparse.layers import Linear, RMSNorm, apply_rope, softmax_scale
from dsparse.params import Scope, normal
from dsparse.sharding import constrain

LATENT_NORM_EPS = 1e-6  # the latent norms keep this value whatever rms_norm_eps says, in every published family
ABSORB_UP_TO = 8  # queries a row: beyond, expanding the cached latents costs less than attending in latent space


class Mixer(nnx.Module):
    """What mixes tokens in a layer. The contract with `blocks.Block`; see `LatentAttention` for an example.

    __init__(scope, config, spec); __call__(x, context, cache) -> output, the cache with these tokens, and the indices
    it selected (None: it selects nothing).
    """

    @staticmethod
    def init_cache(config: ModelConfig, spec: LayerSpec, layers: int, batch: int, slots: int, dtype) -> Arrays:
        """An empty cache of `layers` scanned layers: name -> [layers, batch, ...]."""
        raise NotImplementedError

    @staticmethod
    def selected_width(spec: LayerSpec, length: int, cache: Arrays | None, empty: bool) -> int | None:
        """How many indices it selects for each of `length` tokens, None where it selects nothing.

        cache: where the tokens are stored, if at all. empty: it holds nothing yet.
        """
        return None


class LatentAttention(Mixer):
    """MLA over all earlier tokens. Cache: the normed latent and the rotated key, kv_lora_rank + qk_rope_head_dim a token."""

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec):
        c, init = config, normal(config.initializer_range)
        heads = c.num_attention_heads
        if c.q_lora_rank is None:
            self.q_proj = Linear(scope["q_proj"], c.hidden_size, heads * c.qk_head_dim, ("heads", "embed"), init)
        else:
            self.q_a_proj = Linear(
                scope["q_a_proj"], c.hidden_size, c.q_lora_rank, ("latent", "embed"), init, bias=c.attention_bias
            )
            self.q_a_layernorm = RMSNorm(scope["q_a_layernorm"], c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(scope["q_b_proj"], c.q_lora_rank, heads * c.qk_head_dim, ("heads", "latent"), init)
        latent_dim = c.kv_lora_rank + c.qk_rope_head_dim
        self.kv_a_proj_with_mqa = Linear(
            scope["kv_a_proj_with_mqa"], c.hidden_size, latent_dim, ("latent", "embed"), init, bias=c.attention_bias
        )
        self.kv_a_layernorm = RMSNorm(scope["kv_a_layernorm"], c.kv_lora_rank, LATENT_NORM_EPS)
        expanded = heads * (c.qk_nope_head_dim + c.v_head_dim)
        self.kv_b_proj = Linear(scope["kv_b_proj"], c.kv_lora_rank, expanded, ("heads", "latent"), init)
        self.o_proj = Linear(
            scope["o_proj"], heads * c.v_head_dim, c.hidden_size, ("embed", "heads"), init, bias=c.attention_bias
        )
        self.config = config
        self.scale = softmax_scale(c.rope_parameters, c.qk_head_dim)

    @staticmethod
    def init_cache(config: ModelConfig, spec: LayerSpec, layers: int, batch: int, slots: int, dtype) -> Arrays:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        return {"latent": jnp.zeros((layers, batch, slots, width), dtype)}

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: CacheLayer | None
    ) -> tuple[Float[Array, "B T D"], CacheLayer | None, None]:
        q_nope, q_rope = self.queries(self.query_residual(x), context)
        latent = self.latents(x, context)
        if cache is not None:
            cache = cache.write("latent", latent, context.slots)
        return self.attend_to_all(q_nope, q_rope, latent, context, cache), cache, None

    def attend_to_all(
        self, q_nope: Array, q_rope: Array, latent: Array, context: Context, cache: CacheLayer | None
    ) -> Float[Array, "B T D"]:
        """Dense attention to every earlier token, those in the cache included."""
        if cache is None or context.empty_cache:
            out = self._expanded(q_nope, q_rope, latent, context)
        else:
            past = cache.read("latent").astype(latent.dtype)
            attend = self._absorbed if latent.shape[1] <= ABSORB_UP_TO else self._expanded_cached
            out = attend(q_nope, q_rope, past, context)
        return self.o_proj(out.reshape(*out.shape[:2], -1))

    def query_residual(self, x: Float[Array, "B T D"]) -> Float[Array, "B T L"]:
        """What queries are projected from: the normed query latent, or `x` itself where there is none."""
        return x if self.config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))

    def queries(self, residual: Array, context: Context) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N R"]]:
        """Per-head queries: the part that meets the latent, and the rotated part."""
        c = self.config
        q = self.q_proj(residual) if c.q_lora_rank is None else self.q_b_proj(residual)
        q = constrain(
            q.reshape(*residual.shape[:2], c.num_attention_heads, c.qk_head_dim), "batch", None, "heads", None
        )
        q_nope, q_rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
        return q_nope, apply_rope(q_rope, context.rope, c.rope_interleave)

    def latents(self, x: Array, context: Context) -> Float[Array, "B T C"]:
        """What is cached of each token: the normed latent, then the rotated key all heads share."""
        c = self.config
        latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x), [c.kv_lora_rank], axis=-1)
        k_rope = apply_rope(k_rope, context.rope, c.rope_interleave)
        return jnp.concatenate([self.kv_a_layernorm(latent), k_rope], axis=-1)

    def kv_b(self, dtype) -> Float[Array, "N K C"]:
        """The up-projection by head: rows of keys (qk_nope_head_dim), then of values (v_head_dim)."""
        c = self.config
        weight = self.kv_b_proj.dense_weight(dtype)
        return weight.reshape(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)

    def expand(self, latent: Float[Array, "B S C"]) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N V"]]:
        """Per-head keys and values of latents, with the shared rotated key appended to each head's."""
        c = self.config
        compressed, k_rope = jnp.split(latent, [c.kv_lora_rank], axis=-1)
        heads = (*latent.shape[:2], c.num_attention_heads)
        kv = self.kv_b_proj(compressed).reshape(*heads, -1)
        k_nope, v = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
        k_rope = jnp.broadcast_to(k_rope[:, :, None], (*heads, c.qk_rope_head_dim))
        k = jnp.concatenate([k_nope, k_rope], axis=-1)
        return constrain(k, "batch", None, "heads", None), constrain(v, "batch", None, "heads", None)

    def _expanded(self, q_nope: Array, q_rope: Array, latent: Array, context: Context) -> Float[Array, "B T N V"]:
        k, v = self.expand(latent)
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        return ops.causal_attention(q, k, v, scale=self.scale, segment_ids=context.segment_ids)

    def _expanded_cached(self, q_nope: Array, q_rope: Array, past: Array, context: Context) -> Float[Array, "B T N V"]:
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        return ops.cached_attention(
            q, past, self.expand, context.positions, v_head_dim=self.config.v_head_dim, scale=self.scale
        )

    def _absorbed(self, q_nope: Array, q_rope: Array, past: Array, context: Context) -> Float[Array, "B T N V"]:
        def attend(q):
            return ops.latent_attention(
                q, past, context.positions, v_head_dim=self.config.kv_lora_rank, scale=self.scale
            )

        return self.absorbed(q_nope, q_rope, attend)

    def absorbed(
        self, q_nope: Array, q_rope: Array, attend: Callable[[Float[Array, "B T N C"]], Float[Array, "B T N V"]]
    ) -> Float[Array, "B T N V"]:
        """Move the queries into latent space, `attend` to latents there, and bring the values back to heads."""
        keys, values = jnp.split(self.kv_b(q_nope.dtype), [self.config.qk_nope_head_dim], axis=1)
        q = jnp.concatenate([jnp.einsum("BTNH,NHC->BTNC", q_nope, keys), q_rope], axis=-1)
        return jnp.einsum("BTNC,NVC->BTNV", attend(q), values)
