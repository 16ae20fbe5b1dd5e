"""Multi-token prediction (DeepSeek-V3, section 2.2): forward, training loss, and drafting.

Layer k (from 0) reads what the layer before it carries of position i (layer 0: `first_input` of the main model) and the
embedding of token i+1+k, and predicts token i+2+k. What is carried is the layer's normed output, as in transformers'
`MtpModel`; with hyper-connections (DeepSeek-V4) it is the residual streams, which each layer collapses for the head
with weights of its own.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsparse import ops
from dsparse.blocks import MIXERS
from dsparse.cache import Arrays, CacheLayer
from dsparse.compression import RETRACTABLE
from dsparse.context import Context
from dsparse.errors import DsparseError
from dsparse.model import Model
from dsparse.sharding import constrain, use_mesh


def first_input(model: Model, residual: Float[Array, "B T *M D"]) -> Float[Array, "B T *M D"]:
    """What the first layer reads of the main model: its streams, or without hyper-connections its normed output."""
    return residual if model.config.hc_mult else model.norm(residual)


def predict(
    model: Model,
    depth: int,
    previous: Float[Array, "B T *M D"],
    tokens: Int[Array, "B T"],
    context: Context,
    cache: Arrays | None = None,
) -> tuple[Float[Array, "B T *M D"], Float[Array, "B T D"], Arrays | None]:
    """Layer `depth`: what it carries to the next layer, what the head reads, and its cache with these positions.

    previous: what the layer before carries, or `first_input`. tokens: token i+1+depth for position i.
    """
    layer = model.mtp[depth]
    with use_mesh(model.mesh):
        table = constrain((model if layer.embed_tokens is None else layer).embed_tokens.weight[...], "vocab", None)
        embedding = constrain(table[tokens].astype(previous.dtype), "batch", None, None)
        x, view, _ = layer.block(layer.combine(embedding, previous), context, cache and CacheLayer(cache, 0))
        normed = layer.norm(x if layer.hc_head is None else layer.hc_head(x))
    return normed if layer.hc_head is None else x, normed, view and view.arrays


def logits(model: Model, depth: int, normed: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """The head on a layer's output, float32."""
    return ops.linear(normed, head_weight(model, depth), out_dtype=jnp.float32)


def head_weight(model: Model, depth: int) -> Float[Array, "V D"]:
    head = model.mtp[depth].head
    return model.head_weight() if head is None else head.dense_weight(model.dtype)


def check(model: Model) -> None:
    """Raise DsparseError unless the model has such layers."""
    if not len(model.mtp):
        raise DsparseError("this model has no multi-token prediction layers")


# ---- training -------------------------------------------------------------------------------------------------------


def training_targets(
    targets: Int[Array, "B T"], weights: Float[Array, "B T"], segment_ids: Int[Array, "B T"] | None, depth: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Float[Array, "B T"]]:
    """What layer `depth` reads and learns: its tokens, its targets, and their weights (0 beyond a row or a segment).

    targets: the main model's, token i+1 at position i.
    """

    def ahead(x, steps):
        return jnp.pad(x[:, steps:], ((0, 0), (0, min(steps, x.shape[1]))))

    weights = ahead(weights, depth + 1)
    if segment_ids is not None:
        weights = weights * (ahead(segment_ids, depth + 1) == segment_ids)
    return ahead(targets, depth), ahead(targets, depth + 1), weights


def loss(
    model: Model,
    residual: Float[Array, "B T *M D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    cross_entropy,
) -> Float[Array, ""]:
    """Mean over the layers of their cross-entropy sums (equation 25 without its weight).

    residual: what the main model's last layer returns (`Model.residual`).
    cross_entropy(hidden, head, targets, weights): summed over tokens.
    """
    context = model.context(targets, None, segment_ids)
    total, carried = jnp.zeros(()), first_input(model, residual)
    for depth in range(len(model.mtp)):
        tokens, learned, learned_weights = training_targets(targets, weights, segment_ids, depth)
        carried, normed, _ = predict(model, depth, carried, tokens, context)
        total += cross_entropy(normed, head_weight(model, depth), learned, learned_weights)
    return total / len(model.mtp)


# ---- drafting -------------------------------------------------------------------------------------------------------


def drafters(model: Model) -> int:
    """How many layers draft: as many tokens as every cache can take back."""
    return min(len(model.mtp), RETRACTABLE - 1)


def init_caches(model: Model, count: int, batch: int, slots: int) -> list[Arrays]:
    """Empty caches of the first `count` layers."""
    c = model.config
    return [MIXERS[s.mixer].init_cache(c, s, 1, batch, slots, model.dtype) for s in c.mtp_layers[:count]]


def read_prompt(
    model: Model,
    residual: Float[Array, "B T *M D"],
    ahead: Int[Array, "B W"],
    context: Context,
    lengths: Int[Array, " B"],
    caches: list[Arrays],
) -> list[Arrays]:
    """The layers' caches with a part of the prompts, as far as the tokens they read are known.

    context: of the main model for these tokens. ahead: the tokens from the second of them on, one more for each layer
    at the end.
    """
    carried, length, filled = first_input(model, residual), residual.shape[1], []
    for depth, cache in enumerate(caches):
        known = context.positions + 1 + depth < lengths[:, None]
        own = dataclasses.replace(context, slots=jnp.where(known, context.positions, -1))
        carried, _, cache = predict(model, depth, carried, ahead[:, depth : depth + length], own, cache)
        filled.append(cache)
    return filled


def draft(
    model: Model,
    residual: Float[Array, "B T *M D"],
    ahead: Int[Array, "B T"],
    end: Int[Array, " B"],
    context: Context,
    caches: list[Arrays],
) -> tuple[Int[Array, "B drafts"], list[Arrays]]:
    """The likeliest token of each layer at index `end` of every row, and the layers' caches with these tokens.

    ahead: the token after each of these; behind `end` anything. With several layers, the deeper ones' caches keep what
    was drafted where it turns out wrong: that costs accepted drafts, never a token.
    """
    drafts, filled, carried = [jnp.zeros((len(end), 0), jnp.int32)], [], first_input(model, residual)
    rows = jnp.arange(len(end))
    for depth, cache in enumerate(caches):
        carried, normed, cache = predict(model, depth, carried, ahead, context, cache)
        token = jnp.argmax(logits(model, depth, normed[rows, end]), axis=-1).astype(jnp.int32)
        ahead = jnp.roll(ahead, -1, axis=1).at[rows, end].set(token)
        drafts.append(token[:, None])
        filled.append(cache)
    return jnp.concatenate(drafts, axis=1), filled
