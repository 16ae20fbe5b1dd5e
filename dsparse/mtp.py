"""Multi-token prediction (DeepSeek-V3, section 2.2): forward, training loss, and drafting for speculative decoding.

Layer k (from 0) reads what the layer before it made of position i (layer 0: the main model's normed output) and the
embedding of token i+1+k, and predicts token i+2+k. Every layer's output is normed before the next layer and the head
read it, as in transformers' `MtpModel`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsparse import ops
from dsparse.blocks import MIXERS
from dsparse.cache import Arrays, CacheLayer
from dsparse.context import Context
from dsparse.errors import DsparseError
from dsparse.model import Cache, Model
from dsparse.sharding import constrain, use_mesh

logger = logging.getLogger("dsparse.mtp")


def predict(
    model: Model,
    depth: int,
    previous: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    context: Context,
    cache: Arrays | None = None,
) -> tuple[Float[Array, "B T D"], Arrays | None]:
    """Layer `depth`: its normed output, and its cache with these positions.

    previous: the layer before's output, or the main model's after its final norm.
    tokens: token i+1+depth for position i.
    """
    layer = model.mtp[depth]
    with use_mesh(model.mesh):
        table = constrain((model if layer.embed_tokens is None else layer).embed_tokens.weight[...], "vocab", None)
        embedding = constrain(table[tokens].astype(previous.dtype), "batch", None, None)
        x = layer.eh_proj(jnp.concatenate([layer.enorm(embedding), layer.hnorm(previous)], axis=-1))
        x, view, _ = layer.block(x, context, None if cache is None else CacheLayer(cache, 0))
        return layer.norm(x), None if view is None else view.arrays


def logits(model: Model, depth: int, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """The head on a layer's output, float32."""
    return ops.linear(hidden, head_weight(model, depth), out_dtype=jnp.float32)


def head_weight(model: Model, depth: int) -> Float[Array, "V D"]:
    head = model.mtp[depth].head
    return model.head_weight() if head is None else head.dense_weight(model.dtype)


def check(model: Model) -> None:
    """Raise DsparseError unless the model has layers that this module can run."""
    if not len(model.mtp):
        raise DsparseError("this model has no multi-token prediction layers")
    if model.config.hc_mult:
        raise DsparseError("multi-token prediction with hyper-connections can be converted, but not run")


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
    normed: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    cross_entropy,
) -> Float[Array, ""]:
    """Mean over the layers of their cross-entropy sums (equation 25 without its weight).

    normed: the main model's output after its final norm.
    cross_entropy(hidden, head, targets, weights): summed over tokens.
    """
    context = model.context(targets, None, segment_ids)
    total, hidden = jnp.zeros(()), normed
    for depth in range(len(model.mtp)):
        tokens, learned, learned_weights = training_targets(targets, weights, segment_ids, depth)
        hidden, _ = predict(model, depth, hidden, tokens, context)
        total += cross_entropy(hidden, head_weight(model, depth), learned, learned_weights)
    return total / len(model.mtp)


# ---- speculative decoding -------------------------------------------------------------------------------------------


class Acceptance(NamedTuple):
    """How many drafted tokens were tried, and how many the model would have chosen itself."""

    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        return self.accepted / max(self.drafted, 1)


class _Round(NamedTuple):
    """State between rounds. token: the last certain one, at `position`. drafts: guesses of those after it.

    out: the continuation, of which `count` tokens are certain.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    drafts: Int[Array, "B drafts"]
    out: Int[Array, "B steps"]
    count: Int[Array, " B"]
    done: Bool[Array, " B"]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]


def speculative_generate(
    model: Model,
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    steps: int,
    slots: int,
    stop: Sequence[int],
) -> tuple[Int[np.ndarray, "B steps"], Acceptance]:
    """Greedy continuation: every round the layers draft one token each, and one pass of the model checks them all.

    tokens: prompts, filled on the right to `lengths`. slots: of the caches. A row may go on behind a token of `stop`.
    With several layers, the deeper ones' caches keep what was drafted where it was wrong: that costs accepted drafts,
    never a token.
    """
    check(model)
    graphdef, state = nnx.split(model)
    slots += len(model.mtp)
    first, hidden, cache = _prefill(graphdef, state, tokens, jnp.asarray(lengths), slots)
    drafts, caches = _first_drafts(graphdef, state, hidden, tokens, jnp.asarray(lengths), first, slots)
    stop = jnp.asarray(list(stop) or [-1], jnp.int32)
    out = jnp.zeros((len(tokens), steps + len(model.mtp) + 1), jnp.int32).at[:, 0].set(first)
    zero = jnp.zeros((), jnp.int32)
    start = _Round(first, jnp.asarray(lengths), drafts, out, jnp.ones_like(first), jnp.isin(first, stop), zero, zero)
    last = _rounds(graphdef, state, start, cache, caches, stop, steps)
    acceptance = Acceptance(int(last.drafted), int(last.accepted))
    logger.info("drafts accepted: %d of %d (%.1f%%)", acceptance.accepted, acceptance.drafted, 100 * acceptance.rate)
    return np.asarray(last.out[:, :steps]), acceptance


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(graphdef, state, tokens, lengths, slots: int):
    """The first new token of each row, the normed output at every prompt position, and the model's cache."""
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    stored = jnp.where(positions < lengths[:, None], positions, -1)
    cache = model.init_cache(len(tokens), slots)
    hidden, cache, _ = model.hidden_states(tokens, positions, cache=cache, slots=stored, empty_cache=True)
    end = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return jnp.argmax(model.logits(end), axis=-1).astype(jnp.int32), model.norm(hidden), cache


@functools.partial(jax.jit, static_argnums=(0, 6))
def _first_drafts(graphdef, state, hidden, tokens, lengths, first, slots: int):
    """Run the layers over the prompts: the first drafts, and each layer's cache."""
    model = nnx.merge(graphdef, state)
    config, specs = model.config, model.config.mtp_layers
    caches = [MIXERS[s.mixer].init_cache(config, s, 1, len(tokens), slots, model.dtype) for s in specs]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    stored = jnp.where(positions < lengths[:, None], positions, -1)
    context = model.context(tokens, positions, None, stored, empty_cache=True)
    ahead = _append(jnp.asarray(tokens)[:, 1:], first, lengths - 1)
    return _draft(model, hidden, ahead, lengths - 1, context, caches)


def _append(tokens: Int[Array, "B T"], token: Int[Array, " B"], index: Int[Array, " B"]) -> Int[Array, "B W"]:
    """`tokens` with one more column, and `token` written at each row's `index`."""
    padded = jnp.pad(tokens, ((0, 0), (0, 1)))
    return padded.at[jnp.arange(len(token)), index].set(token)


def _draft(model: Model, hidden, ahead, end: Int[Array, " B"], context: Context, caches: list[Arrays]):
    """One token a layer, from each row's position `end` on. ahead: the token after each position."""
    drafts, new_caches = [], []
    for depth, cache in enumerate(caches):
        hidden, cache = predict(model, depth, hidden, ahead, context, cache)
        at_end = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        token = jnp.argmax(logits(model, depth, at_end), axis=-1).astype(jnp.int32)
        ahead = _append(ahead[:, 1:], token, end)
        drafts.append(token)
        new_caches.append(cache)
    return jnp.stack(drafts, axis=1), new_caches


@functools.partial(jax.jit, static_argnums=0)
def _rounds(graphdef, state, start: _Round, cache: Cache, caches: list[Arrays], stop, steps) -> _Round:
    model = nnx.merge(graphdef, state)

    def step(carry):
        current, cache, caches = carry
        tried = jnp.concatenate([current.token[:, None], current.drafts], axis=1)
        positions = current.position[:, None] + jnp.arange(tried.shape[1])
        hidden, cache, _ = model.hidden_states(tried, positions, cache=cache)
        chosen = jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)
        right = jnp.cumprod(chosen[:, :-1] == current.drafts, axis=1).sum(axis=1)  # drafts up to the first wrong one
        context = model.context(tried, positions, None)
        drafts, caches = _draft(model, model.norm(hidden), chosen, right, context, caches)
        return _advance(current, chosen, right, drafts, stop, steps), cache, caches

    def more(carry):
        return ~jnp.all(carry[0].done)

    start = start._replace(done=start.done | (start.count >= steps))
    return jax.lax.while_loop(more, step, (start, cache, caches))[0]


def _advance(current: _Round, chosen: Int[Array, "B W"], right: Int[Array, " B"], drafts, stop, steps) -> _Round:
    """Take over the right drafts and the token the model chose after them; rows that are done stay as they are."""
    rows = jnp.arange(len(right))
    new = jnp.where(current.done, 0, right + 1)
    column = current.count[:, None] + jnp.arange(chosen.shape[1])
    column = jnp.where(current.done[:, None], current.out.shape[1], column)
    out = current.out.at[rows[:, None], column].set(chosen, mode="drop")
    taken = jnp.arange(chosen.shape[1]) < new[:, None]
    count = current.count + new
    done = current.done | jnp.any(jnp.isin(chosen, stop) & taken, axis=1) | (count >= steps)
    tried = jnp.where(current.done, 0, current.drafts.shape[1]).sum()
    return _Round(
        token=jnp.where(current.done, current.token, chosen[rows, right]),
        position=current.position + new,
        drafts=drafts,
        out=out,
        count=count,
        done=done,
        drafted=current.drafted + tried,
        accepted=current.accepted + jnp.where(current.done, 0, right).sum(),
    )
