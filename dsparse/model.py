"""The model: embedding, stacks of blocks, final norm, head. One class, composed by config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dsparse import ops
from dsparse.blocks import MIXERS, Embedding, MTPLayer, Run, Stack, plan_runs
from dsparse.cache import Arrays
from dsparse.config import ModelConfig
from dsparse.context import AnyArray, Context, segment_starts
from dsparse.errors import DsparseError
from dsparse.hyper import HyperHead
from dsparse.layers import Linear, RMSNorm, rope_cos_sin
from dsparse.moe import Routing
from dsparse.origin import Origin
from dsparse.params import Scope, normal
from dsparse.sharding import constrain, use_mesh

Storage = Mapping[str, jnp.dtype]  # path inside a layer (or of a top-level tensor) -> stored dtype
Cache = list[list[Arrays]]  # by stack, by position in its pattern


class Model(nnx.Module):
    """A DeepSeek-family causal language model.

    dtype: of activations; weights are cast to it where they are used, so they may be stored in any other.
    mesh: devices the model is sharded over, or None.
    remat: what the backward pass computes again of each layer: "none", "selective" or "full" (`remat.POLICIES`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype | None = None,
        storage: Sequence[Storage] | None = None,
        mesh: Mesh | None = None,
    ):
        """storage: stored dtypes for each layer (multi-token prediction layers last), then of the top-level tensors."""
        storage = storage or [{}] * (config.num_hidden_layers + config.num_nextn_predict_layers + 1)
        top = Scope(rngs, jnp.dtype(param_dtype or dtype), storage=storage[-1])
        self.embed_tokens = Embedding(top["embed_tokens"], config)
        self.runs = layer_runs(config, storage)
        self.stacks = nnx.List([Stack(_scopes(top, storage, run), config, run) for run in self.runs])
        self.hc_head = HyperHead(top["hc_head"], config) if config.hc_mult else None
        self.norm = RMSNorm(top["norm"], config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else _head(top["lm_head"], config)
        self.mtp = nnx.List(
            MTPLayer(Scope(rngs, top.dtype, storage=storage[config.num_hidden_layers + i]), config, spec)
            for i, spec in enumerate(config.mtp_layers)
        )
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.mesh = mesh
        self.remat = "none"
        self.origin = Origin()

    def __call__(
        self,
        tokens: Int[AnyArray, "B T"],
        positions: Int[AnyArray, "B T"] | None = None,
        segment_ids: Int[AnyArray, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, float32.

        positions: of each token in its sequence; by default counted from 0 in every segment.
        segment_ids: tokens attend only within their segment: packed sequences, or 0 for left padding and 1 after it.

        Raises:
            DsparseError: a token id is outside the vocabulary.
        """
        if not isinstance(tokens, jax.core.Tracer):
            tokens = check_tokens(tokens, self.config.vocab_size)
        structure, state = split(self)
        return _forward(structure, state, tokens, positions, segment_ids)

    def hidden_states(
        self,
        tokens: Int[AnyArray, "B T"],
        positions: Int[AnyArray, "B T"] | None = None,
        segment_ids: Int[AnyArray, "B T"] | None = None,
        cache: Cache | None = None,
        slots: Int[AnyArray, "B T"] | None = None,
        empty_cache: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache | None, list[Routing]]:
        """The last layer's output before the final norm; the cache with these tokens; the routing of each MoE block.

        With a cache, `positions` are required, and `slots` says where each token is stored (default: its position).
        empty_cache: promise that the cache holds nothing yet (the first chunk of a prompt).
        Each `Routing` is stacked over the layers of its scanned run.
        """
        context = self.context(tokens, positions, segment_ids, slots, empty_cache=empty_cache)
        x, cache, routings = self.residual(context, cache)
        return self.collapse(x), cache, routings

    def residual(
        self, context: Context, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T *M D"], Cache | None, list[Routing]]:
        """`hidden_states` before hyper-connections' streams are collapsed: what multi-token prediction reads."""
        x, cache, reports = self._run(context, cache)
        return x, cache, [r.routing for stack in reports for r in stack if r.routing is not None]

    def collapse(self, residual: Float[Array, "B T *M D"]) -> Float[Array, "B T D"]:
        """Hyper-connections' streams as one; anything else as it is."""
        return residual if self.hc_head is None else self.hc_head(residual)

    def _run(self, context: Context, cache: Cache | None = None):
        """`residual` with every layer's report instead of the routings."""
        with use_mesh(self.mesh):
            tokens = constrain(context.tokens, "batch", None)
            context = dataclasses.replace(context, tokens=tokens)
            table = constrain(self.embed_tokens.weight[...], "vocab", None)  # rows whole: fsdp may split the batch too
            x = constrain(table[tokens].astype(self.dtype), "batch", None, None)
            if self.hc_head is not None:
                x = constrain(jnp.repeat(x[:, :, None], self.config.hc_mult, axis=2), "batch", None, None, None)
            new_cache, reports = [], []
            for index, stack in enumerate(self.stacks):
                x, caches, report, selected = stack(x, context, None if cache is None else cache[index], self.remat)
                context = dataclasses.replace(context, selected=selected)
                new_cache.append(caches)
                reports.append(report)
        return x, None if cache is None else new_cache, reports

    def context(
        self,
        tokens: Int[AnyArray, "B T"],
        positions: Int[AnyArray, "B T"] | None,
        segment_ids: Int[AnyArray, "B T"] | None,
        slots: Int[AnyArray, "B T"] | None = None,
        **flags: bool,
    ) -> Context:
        """What the layers look at besides the hidden state. flags: static fields of `Context`."""
        if positions is None:
            positions = default_positions(tokens, segment_ids)
        tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        slots = positions if slots is None else jnp.asarray(slots)
        c = self.config
        rope = rope_cos_sin(c.rope_parameters, c.qk_rope_head_dim, positions)
        compress_rope = None
        if c.compress_rope_parameters is not None:
            compress_rope = rope_cos_sin(c.compress_rope_parameters, c.qk_rope_head_dim, positions)
        return Context(tokens, positions, slots, segment_ids, rope, compress_rope, **flags)

    def selections(
        self, tokens: Int[AnyArray, "B T"], segment_ids: Int[AnyArray, "B T"] | None = None
    ) -> list[Int[Array, "B T K"] | None]:
        """The indices each layer's indexer selects, -1 for nothing; None for a layer that selects nothing.

        A layer that shares another's selection, and one whose top-k covers all tokens, is None too.
        """
        structure, state = split(self)
        by_layer = []
        for run, stack in zip(self.runs, _reports(structure, state, tokens, segment_ids), strict=True):
            for repeat in range(run.repeats):
                by_layer.extend(None if r.selected is None else r.selected[repeat] for r in stack)
        return by_layer

    def head_weight(self) -> Float[Array, "V D"]:
        """The output projection in floating point; with tied embeddings, the embedding."""
        return self.embed_tokens.weight[...] if self.lm_head is None else self.lm_head.dense_weight(self.dtype)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Final norm and head, float32."""
        return ops.linear(self.norm(hidden), self.head_weight(), out_dtype=jnp.float32)

    def init_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `batch` rows of up to `slots` tokens, sharded as the mesh asks."""
        with use_mesh(self.mesh):
            cache = []
            for run in self.runs:
                specs = self.config.layers[run.start : run.start + run.pattern]
                arrays = [
                    MIXERS[s.mixer].init_cache(self.config, s, run.repeats, batch, slots, self.dtype) for s in specs
                ]
                cache.append(
                    [
                        {k: constrain(a, "layers", "batch", *(None,) * (a.ndim - 2)) for k, a in d.items()}
                        for d in arrays
                    ]
                )
        return cache


def _head(scope: Scope, config: ModelConfig) -> Linear:
    init = normal(config.initializer_range)
    return Linear(scope, config.hidden_size, config.vocab_size, ("vocab", "embed"), init)


def layer_runs(config: ModelConfig, storage: Sequence[Storage]) -> tuple[Run, ...]:
    """How the layers are stacked: layers of equal spec and equal stored dtypes together."""
    stored = [tuple(sorted((path, str(dtype)) for path, dtype in layer.items())) for layer in storage]
    return plan_runs(list(zip(config.layers, stored, strict=False)))


def _scopes(top: Scope, storage: Sequence[Storage], run: Run) -> list[Scope]:
    return [
        Scope(top.rngs, top.dtype, stack=run.repeats, storage=storage[run.start + position])
        for position in range(run.pattern)
    ]


class Structure:
    """A model without its arrays, hashed once: jit hashes its static arguments in every call."""

    def __init__(self, graphdef: nnx.GraphDef):
        self.graphdef, self._hash = graphdef, hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.graphdef == other.graphdef)

    def merge(self, state: nnx.State) -> Model:
        return nnx.merge(self.graphdef, state)


def split(model: Model) -> tuple[Structure, nnx.State]:
    """The model's structure, for jit to be static, and its arrays."""
    graphdef, state = nnx.split(model)
    return Structure(graphdef), state


@functools.partial(jax.jit, static_argnums=0)
def _forward(structure, state, tokens, positions, segment_ids):
    model = structure.merge(state)
    hidden, _, _ = model.hidden_states(tokens, positions, segment_ids)
    return model.logits(hidden)


@functools.partial(jax.jit, static_argnums=0)
def _reports(structure, state, tokens, segment_ids):
    model = structure.merge(state)
    return model._run(model.context(tokens, None, segment_ids, report_selected=True))[2]


def default_positions(tokens: Int[AnyArray, "B T"], segment_ids: Int[AnyArray, "B T"] | None) -> Int[Array, "B T"]:
    """0, 1, 2, ... along each row, starting again where the segment changes."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return index if segment_ids is None else index - segment_starts(segment_ids)


def check_tokens(tokens, vocab_size: int) -> Int[np.ndarray, "B T"]:
    """`tokens` as an int32 array [B, T] with every id inside the vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise DsparseError(f"tokens must be integers of shape [batch, time], found {tokens.dtype} {list(tokens.shape)}")
    if tokens.size and not 0 <= (low := tokens.min()) <= (high := tokens.max()) < vocab_size:
        bad = low if low < 0 else high
        row, column = np.argwhere(tokens == bad)[0]
        raise DsparseError(f"token id {bad} at row {row}, position {column} is outside the vocabulary of {vocab_size}")
    return tokens.astype(np.int32)
