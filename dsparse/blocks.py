"""Blocks and stacks: a layer is residual(mixer) then residual(mlp); runs of equal layers are stacked and scanned.

To add a kind of attention: write its module (see `attention.LatentAttention`: `__init__(scope, config, spec)`,
`init_cache`, `__call__(x, context, cache)`) and name it in `MIXERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from dsparse.attention import LatentAttention
from dsparse.compressed import CompressedAttention
from dsparse.cache import Arrays, CacheLayer
from dsparse.config import LayerSpec, ModelConfig
from dsparse.context import Context
from dsparse.hyper import HyperConnection, HyperHead
from dsparse.layers import GatedMLP, Linear, RMSNorm
from dsparse.moe import MixtureOfExperts, Routing
from dsparse.params import Scope, normal
from dsparse.sharding import constrain

MIXERS = {
    "full_attention": LatentAttention,
    "sliding_attention": CompressedAttention,
    "compressed_sparse_attention": CompressedAttention,
    "heavily_compressed_attention": CompressedAttention,
}

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Embedding(nnx.Module):
    """A row for each token id."""

    def __init__(self, scope: Scope, config: ModelConfig):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = scope.param("weight", shape, ("vocab", "embed"), normal(config.initializer_range))


class Block(nnx.Module):
    """One layer, its attributes named as Hugging Face names its tensors.

    The residual x is [B, T, D], or the streams [B, T, M, D] of hyper-connections where the config has them.
    """

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec):
        self.attn_hc = HyperConnection(scope["attn_hc"], config) if config.hc_mult else None
        self.ffn_hc = HyperConnection(scope["ffn_hc"], config) if config.hc_mult else None
        self.input_layernorm = RMSNorm(scope["input_layernorm"], config.hidden_size, config.rms_norm_eps)
        self.self_attn = MIXERS[spec.mixer](scope["self_attn"], config, spec)
        self.post_attention_layernorm = RMSNorm(scope["post_attention_layernorm"], config.hidden_size, config.rms_norm_eps)
        if spec.mlp == "dense":
            self.mlp = GatedMLP(scope["mlp"], config, config.intermediate_size)
        else:
            self.mlp = MixtureOfExperts(scope["mlp"], config, hashed=spec.mlp == "hash_moe")

    def __call__(
        self, x: Float[Array, "B T *M D"], context: Context, cache: CacheLayer | None
    ) -> tuple[Float[Array, "B T *M D"], CacheLayer | None, Routing | None]:
        routing = None

        def mix(hidden):
            nonlocal cache
            out, cache = self.self_attn(self.input_layernorm(hidden), context, cache)
            return out

        def feed_forward(hidden):
            nonlocal routing
            hidden = self.post_attention_layernorm(hidden)
            if not isinstance(self.mlp, MixtureOfExperts):
                return self.mlp(hidden)
            out, routing = self.mlp(hidden, context.tokens)
            return out

        x = residual(self.attn_hc, x, mix)
        x = residual(self.ffn_hc, x, feed_forward)
        return x, cache, routing


def residual(
    connection: HyperConnection | None, x: Float[Array, "B T *M D"], sublayer: Callable[[Array], Array]
) -> Float[Array, "B T *M D"]:
    """x plus what the sublayer makes of it: the plain sum, or through a hyper-connection."""
    if connection is None:
        x = x + sublayer(x)
    else:
        hidden, weights = connection.read(x)
        x = connection.write(x, sublayer(hidden), weights)
    return constrain(x, "batch", *(None,) * (x.ndim - 1))


class MTPLayer(nnx.Module):
    """Multi-token prediction module (DeepSeek-V3, section 2.2): one block on [norm(embedding), norm(hidden)] projected.

    With hyper-connections the two are projected apart (every stream by the same matrix) and added.
    embed_tokens and shared_head are None where they are the main model's, as in every published checkpoint; the layer
    has its own if `scope.storage` names them.
    """

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec):
        d, init = config.hidden_size, normal(config.initializer_range)
        self.enorm = RMSNorm(scope["enorm"], d, config.rms_norm_eps)
        self.hnorm = RMSNorm(scope["hnorm"], d, config.rms_norm_eps)
        if config.hc_mult:
            self.e_proj = Linear(scope["e_proj"], d, d, ("embed", None), init)
            self.h_proj = Linear(scope["h_proj"], d, d, ("embed", None), init)
            self.hc_head = HyperHead(scope["hc_head"], config)
        else:
            self.eh_proj = Linear(scope["eh_proj"], 2 * d, d, ("embed", None), init)
        self.block = Block(scope, config, spec)
        self.norm = RMSNorm(scope["shared_head.norm"], d, config.rms_norm_eps)
        own = [name for name in ("embed_tokens", "shared_head.head") if f"{name}.weight" in scope.storage]
        self.embed_tokens = Embedding(scope["embed_tokens"], config) if "embed_tokens" in own else None
        head = scope["shared_head.head"]
        self.head = Linear(head, d, config.vocab_size, ("vocab", "embed"), init) if "shared_head.head" in own else None


class Run(NamedTuple):
    """`repeats` times the `pattern` consecutive layers that start at layer `start`."""

    start: int
    pattern: int
    repeats: int


MAX_PATTERN = 8


def plan_runs(keys: Sequence[Hashable]) -> tuple[Run, ...]:
    """Split layers into runs of a repeating pattern so that the fewest layers are traced.

    keys: one per layer; layers with equal keys have equal structure. Depth then costs no compile time.
    """
    count = len(keys)
    best: list[tuple[int, int, tuple[Run, ...]]] = [(0, 0, ())] * (count + 1)
    for start in reversed(range(count)):
        options = []
        for pattern in range(1, min(MAX_PATTERN, count - start) + 1):
            repeats = 1
            while keys[start : start + pattern] == keys[start + repeats * pattern : start + (repeats + 1) * pattern]:
                repeats += 1
            for times in range(1, repeats + 1):
                traced, runs, rest = best[start + pattern * times]
                options.append((traced + pattern, runs + 1, (Run(start, pattern, times), *rest)))
        best[start] = min(options, key=lambda option: option[:2])
    return best[0][2]


class Stack(nnx.Module):
    """One run of layers. Parameters and caches of the pattern's blocks carry a leading axis of `repeats`."""

    def __init__(self, scopes: Sequence[Scope], config: ModelConfig, run: Run):
        specs = config.layers[run.start : run.start + run.pattern]
        self.blocks = nnx.List([Block(scope, config, spec) for scope, spec in zip(scopes, specs, strict=True)])
        self.repeats = run.repeats

    def __call__(
        self, x: Float[Array, "B T *M D"], context: Context, caches: list[Arrays] | None, remat: str
    ) -> tuple[Float[Array, "B T *M D"], list[Arrays] | None, list[Routing | None]]:
        graphdef, stacked = nnx.split(self.blocks)

        def step(carry, inputs):
            x, caches = carry
            state, layer = inputs
            caches, routings = list(caches) if caches is not None else None, []
            for position, block in enumerate(nnx.merge(graphdef, state)):
                view = None if caches is None else CacheLayer(caches[position], layer)
                x, view, routing = block(x, context, view)
                if caches is not None:
                    caches[position] = view.arrays
                routings.append(routing)
            return (x, caches), routings

        if REMAT_POLICIES[remat] is not None:
            step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
        if self.repeats == 1:  # no scan: the leading axis of 1 costs nothing to index
            (x, caches), routings = step((x, caches), (jax.tree.map(lambda a: a[0], stacked), 0))
            return x, caches, jax.tree.map(lambda a: a[None], routings)
        (x, caches), routings = jax.lax.scan(step, (x, caches), (stacked, jax.numpy.arange(self.repeats)))
        return x, caches, routings
