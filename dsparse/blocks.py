"""Blocks and stacks: a layer is residual(mixer) then residual(mlp); runs of equal layers are stacked and scanned.

To add a kind of attention: write its module (see `attention.Mixer`), and name it in `MIXERS` and `config.MIXER_KINDS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsparse.attention import LatentAttention
from dsparse.cache import Arrays, CacheLayer
from dsparse.compressed import CompressedAttention
from dsparse.config import LayerSpec, ModelConfig
from dsparse.context import Context
from dsparse.hyper import HyperConnection, HyperHead
from dsparse.layers import GatedMLP, Linear, RMSNorm
from dsparse.moe import MixtureOfExperts, Routing
from dsparse.params import Scope, normal
from dsparse.remat import POLICIES
from dsparse.sharding import constrain
from dsparse.sparse import IndexedLatentAttention

MIXERS = {
    "full_attention": LatentAttention,
    "indexed_attention": IndexedLatentAttention,
    "sliding_attention": CompressedAttention,
    "compressed_sparse_attention": CompressedAttention,
    "heavily_compressed_attention": CompressedAttention,
}


class Embedding(nnx.Module):
    """A row for each token id."""

    def __init__(self, scope: Scope, config: ModelConfig):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = scope.param("weight", shape, ("vocab", "embed"), normal(config.initializer_range))


class Report(NamedTuple):
    """What a layer tells besides its output: where its tokens were routed, and the tokens its indexer selected."""

    routing: Routing | None
    selected: Int[Array, "B T K"] | None


class Block(nnx.Module):
    """One layer, its attributes named as Hugging Face names its tensors.

    The residual x is [B, T, D], or the streams [B, T, M, D] of hyper-connections where the config has them.
    """

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec):
        self.attn_hc = HyperConnection(scope["attn_hc"], config) if config.hc_mult else None
        self.ffn_hc = HyperConnection(scope["ffn_hc"], config) if config.hc_mult else None
        self.input_layernorm = RMSNorm(scope["input_layernorm"], config.hidden_size, config.rms_norm_eps)
        self.self_attn = MIXERS[spec.mixer](scope["self_attn"], config, spec)
        self.post_attention_layernorm = RMSNorm(
            scope["post_attention_layernorm"], config.hidden_size, config.rms_norm_eps
        )
        if spec.mlp == "dense":
            self.mlp = GatedMLP(scope["mlp"], config, config.intermediate_size)
        else:
            self.mlp = MixtureOfExperts(scope["mlp"], config, hashed=spec.mlp == "hash_moe")

    def __call__(
        self, x: Float[Array, "B T *M D"], context: Context, cache: CacheLayer | None
    ) -> tuple[Float[Array, "B T *M D"], CacheLayer | None, Report]:
        routing = selected = None

        def mix(hidden):
            nonlocal cache, selected
            out, cache, selected = self.self_attn(self.input_layernorm(hidden), context, cache)
            return out

        def feed_forward(hidden):
            nonlocal routing
            hidden = self.post_attention_layernorm(hidden)
            if not isinstance(self.mlp, MixtureOfExperts):
                return self.mlp(hidden)
            out, routing = self.mlp(hidden, context.tokens, context.segment_ids)
            return out

        x = residual(self.attn_hc, x, mix)
        x = residual(self.ffn_hc, x, feed_forward)
        return x, cache, Report(routing, selected)


def residual(
    connection: HyperConnection | None, x: Float[Array, "B T *M D"], sublayer: Callable[[Array], Array]
) -> Float[Array, "B T *M D"]:
    """x plus what the sublayer makes of it: the plain sum, or through a hyper-connection."""
    if connection is None:
        x = x + sublayer(x)
    else:
        hidden, weights = connection.read(x)
        # computed once, gradients too: XLA on CPU would mix the streams again for every transposed operand
        hidden = jax.lax.optimization_barrier(hidden)
        x = connection.write(x, jax.lax.optimization_barrier(sublayer(hidden)), weights)
    return constrain(x, "batch", *(None,) * (x.ndim - 1))


class MTPLayer(nnx.Module):
    """Multi-token prediction module (DeepSeek-V3, section 2.2): one block on [norm(embedding), norm(hidden)] projected.

    With hyper-connections the two are projected apart (every stream by the same matrix) and added; the block's streams
    are collapsed for the head by weights of the layer's own, and there is no joint `eh_proj`. `mtp.predict` runs it.
    embed_tokens and head are None where they are the main model's, as in every published checkpoint; the layer
    has its own if `scope.storage` names them.
    """

    def __init__(self, scope: Scope, config: ModelConfig, spec: LayerSpec):
        d, init = config.hidden_size, normal(config.initializer_range)
        self.enorm = RMSNorm(scope["enorm"], d, config.rms_norm_eps)
        self.hnorm = RMSNorm(scope["hnorm"], d, config.rms_norm_eps)
        self.hc_head = HyperHead(scope["hc_head"], config) if config.hc_mult else None
        if config.hc_mult:
            self.e_proj = Linear(scope["e_proj"], d, d, ("embed", None), init)
            self.h_proj = Linear(scope["h_proj"], d, d, ("embed", None), init)
        else:
            self.eh_proj = Linear(scope["eh_proj"], 2 * d, d, ("embed", None), init)
        self.block = Block(scope, config, spec)
        self.norm = RMSNorm(scope["shared_head.norm"], d, config.rms_norm_eps)
        own = [name for name in ("embed_tokens", "shared_head.head") if f"{name}.weight" in scope.storage]
        self.embed_tokens = Embedding(scope["embed_tokens"], config) if "embed_tokens" in own else None
        head = scope["shared_head.head"]
        self.head = Linear(head, d, config.vocab_size, ("vocab", "embed"), init) if "shared_head.head" in own else None

    def combine(self, embedding: Float[Array, "B T D"], previous: Float[Array, "B T *M D"]) -> Float[Array, "B T *M D"]:
        """The block's input."""
        embedding, previous = self.enorm(embedding), self.hnorm(previous)
        if self.hc_head is None:
            return self.eh_proj(jnp.concatenate([embedding, previous], axis=-1))
        return self.e_proj(embedding)[:, :, None] + self.h_proj(previous)


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
        self.specs = specs
        self.repeats = run.repeats
        self.carried = frozenset(spec.mixer for spec in config.layers if spec.indexer == "shared")

    def __call__(
        self, x: Float[Array, "B T *M D"], context: Context, caches: list[Arrays] | None, remat: str
    ) -> tuple[Float[Array, "B T *M D"], list[Arrays] | None, list[Report], dict[str, Int[Array, "B T K"]]]:
        """Output, caches, what each layer of the pattern reports (stacked), and the last selections that layers share.

        Reports hold selections only if `context.report_selected`: they take `layers * T * K` numbers.
        """
        graphdef, stacked = nnx.split(self.blocks)

        def step(carry, inputs):
            x, caches, selected = carry
            state, layer = inputs
            caches, reports = list(caches) if caches is not None else None, []
            for position, (spec, block) in enumerate(zip(self.specs, nnx.merge(graphdef, state), strict=True)):
                view = None if caches is None else CacheLayer(caches[position], layer)
                x, view, report = block(x, dataclasses.replace(context, selected=selected), view)
                if caches is not None:
                    caches[position] = view.arrays
                if spec.mixer in self.carried and report.selected is not None:
                    selected = selected | {spec.mixer: report.selected}
                reports.append(report if context.report_selected else report._replace(selected=None))
            return (x, caches, selected), reports

        if (policy := POLICIES[remat]) is not None:
            alone = self.repeats == 1  # inside a scan nothing is merged with the forward pass anyway
            step = jax.checkpoint(step, policy=policy, prevent_cse=alone)
        if self.repeats == 1:  # no scan: the leading axis of 1 costs nothing to index
            (x, caches, selected), reports = step(
                (x, caches, context.selected), (jax.tree.map(lambda a: a[0], stacked), 0)
            )
            return x, caches, jax.tree.map(lambda a: a[None], reports), selected
        carry = (x, caches, context.selected | self._initial_selections(context, x, caches))
        (x, caches, selected), reports = jax.lax.scan(step, carry, (stacked, jnp.arange(self.repeats)))
        return x, caches, reports, selected

    def _initial_selections(
        self, context: Context, x: Array, caches: list[Arrays] | None
    ) -> dict[str, Int[Array, "B T K"]]:
        """What a scan starts from where its layers select: of the shape they end with, as a carry must be.

        Where the shape differs from what layers before the scan selected, the pattern starts with a layer that selects
        for itself, and the content is not read.
        """
        start = {}
        for i, (spec, block) in enumerate(zip(self.specs, self.blocks, strict=True)):
            cache = None if caches is None else caches[i]
            width = block.self_attn.selected_width(spec, x.shape[1], cache, context.empty_cache)
            if spec.mixer in self.carried and width is not None:
                before = context.selected.get(spec.mixer)
                fits = before is not None and before.shape[-1] == width
                start[spec.mixer] = before if fits else jnp.full((*x.shape[:2], width), -1, jnp.int32)
        return start
