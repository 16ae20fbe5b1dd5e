"""Generation: chunked prefill into a static-shape cache, then a compiled decode loop.

Prompt lengths and cache sizes are rounded up to buckets, so that prompts of similar length share one compilation.
Speculative decoding is the same loop with drafts: every round the multi-token prediction layers guess one token each,
and the next round's pass of the model checks them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dsparse import mtp
from dsparse.cache import Arrays
from dsparse.context import AnyArray
from dsparse.errors import DsparseError
from dsparse.model import Cache, Model, Structure, check_tokens, split
from dsparse.sampling import Sampling, make_sampling, sample

PREFILL_CHUNK = 1024
ROUNDS_A_CALL = 256  # rounds of decoding by one call of the compiled loop when nobody watches the stream

logger = logging.getLogger("dsparse.generation")

OnToken = Callable[[Int[np.ndarray, " B"], Int[np.ndarray, " B"]], None]


class Acceptance(NamedTuple):
    """How many drafted tokens were tried, and how many the model would have chosen itself."""

    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        return self.accepted / max(self.drafted, 1)


def generate(
    model: Model,
    tokens: ArrayLike | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    lengths: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
    on_token: OnToken | None = None,
    speculative: str | None = None,
    on_acceptance: Callable[[Acceptance], None] | None = None,
) -> Int[np.ndarray, "B max_new_tokens"]:
    """Continue every prompt by up to `max_new_tokens` tokens.

    tokens: prompts, integers [B, T]; where they differ in length, a list of lists, or fill on the right and give
        `lengths`.
    temperature: 0 picks the most likely token; top_k, top_p, min_p filter as in transformers.
    stop_tokens: a row ends after one of these (default: the config's eos_token_id; (): none); the rest of the row is
        pad_token_id, or the stop token where the config has no padding.
    on_token: called for each new token with (tokens [B], finished [B]), finished rows repeating the filler.
    speculative: "mtp" lets the model's multi-token prediction layers draft: the same tokens in fewer passes, sampled
        ones included.
    on_acceptance: called at the end with how many drafts were tried and accepted (also logged).

    Raises:
        DsparseError: a token id outside the vocabulary, an empty prompt, or sampling parameters out of range.
    """
    tokens, lengths = _fill_rows(tokens, lengths)
    tokens = check_tokens(tokens, model.config.vocab_size)
    lengths = _check_lengths(tokens, lengths)
    if max_new_tokens < 1:
        raise DsparseError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    sampling = make_sampling(temperature, top_k, top_p, min_p)
    if not 0 <= seed < 1 << 32:  # JAX's keys hold 32 bits of it
        raise DsparseError(f"seed {seed} is out of range (0 <= seed < 2**32)")
    stop, filler = _stop_tokens(model, stop_tokens)
    drafters = _drafters(model, speculative)
    structure, state = split(model)
    padded = _pad_prompts(tokens)
    caches = _empty_caches(structure, state, len(tokens), bucket(padded.shape[1] + max_new_tokens + drafters), drafters)
    ends, caches = prefill(structure, state, caches, padded, lengths)
    keys = jax.random.split(jax.random.key(seed), len(tokens))
    ahead = _tokens_after(padded, lengths, max(1, drafters))
    columns = bucket(max_new_tokens) + drafters + 1
    loop, caches = _first_token(structure, state, caches, ends, ahead, lengths, sampling, keys, stop, columns)
    seen = 0
    while True:
        if on_token:
            seen = _report_tokens(on_token, loop, seen, max_new_tokens, stop, filler)
        if np.all(loop.done | (loop.count >= max_new_tokens)):
            break
        rounds = 1 if on_token else ROUNDS_A_CALL
        loop, caches = _decode(structure, state, loop, caches, rounds, max_new_tokens, sampling, keys, stop)
    if drafters:
        _report_acceptance(Acceptance(int(loop.drafted), int(loop.accepted)), on_acceptance)
    return _fill_after_stop(np.array(loop.out[:, :max_new_tokens]), stop, filler)


def _drafters(model: Model, speculative: str | None) -> int:
    """How many tokens are drafted at a time."""
    if speculative is None:
        return 0
    if speculative != "mtp":
        raise DsparseError(f"speculative {speculative!r} is not supported (mtp)")
    mtp.check(model)
    return mtp.drafters(model)


def _report_tokens(on_token: OnToken, loop: Loop, seen: int, steps: int, stop, filler: int) -> int:
    """Tell of the tokens, from number `seen` on, that every row has by now; how many have been told of then."""
    going = ~np.asarray(loop.done)
    ready = int(np.asarray(loop.count)[going].min(initial=steps))
    out = _fill_after_stop(np.asarray(loop.out[:, :ready]), stop, filler)
    finished = np.cumsum(np.isin(out, stop), axis=1) > 0
    for step in range(seen, ready):
        if step and finished[:, step - 1].all():
            break
        on_token(out[:, step], finished[:, step])
    return ready


def _report_acceptance(acceptance: Acceptance, on_acceptance: Callable[[Acceptance], None] | None) -> None:
    logger.info("drafts accepted: %d of %d (%.1f%%)", acceptance.accepted, acceptance.drafted, 100 * acceptance.rate)
    if on_acceptance:
        on_acceptance(acceptance)


def bucket(size: int, smallest: int = 64) -> int:
    """`size` rounded up to 2^n or 1.5 * 2^n."""
    power = smallest
    while power < size:
        power *= 2
    return power * 3 // 4 if power > smallest and power * 3 // 4 >= size else power


def _fill_rows(tokens, lengths):
    """Rows of a list that differ in length filled on the right, and their lengths."""
    if lengths is not None or not isinstance(tokens, list | tuple):
        return tokens, lengths
    sizes = [np.size(row) for row in tokens]
    if len(set(sizes)) <= 1:
        return tokens, None
    return [[*row, *[0] * (max(sizes) - size)] for row, size in zip(tokens, sizes, strict=True)], sizes


def _check_lengths(tokens: np.ndarray, lengths: Sequence[int] | None) -> Int[np.ndarray, " B"]:
    batch, time = tokens.shape
    lengths = np.full(batch, time, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    if batch == 0 or lengths.shape != (batch,) or lengths.min(initial=1) < 1 or lengths.max(initial=0) > time:
        raise DsparseError(f"lengths must be {batch} numbers from 1 to {time}, found {lengths.tolist()}")
    return lengths


def _stop_tokens(model: Model, stop_tokens: Sequence[int] | None) -> tuple[Int[np.ndarray, " S"], int]:
    stop = list(model.config.eos_token_id if stop_tokens is None else stop_tokens)
    filler = model.config.pad_token_id
    if filler is None:
        filler = stop[0] if stop else 0
    return np.asarray(stop or [-1], np.int32), filler


def _pad_prompts(tokens: np.ndarray) -> np.ndarray:
    time = tokens.shape[1]
    width = bucket(time) if time <= PREFILL_CHUNK else -(-time // PREFILL_CHUNK) * PREFILL_CHUNK
    return np.pad(tokens, ((0, 0), (0, width - time)))


class Caches(NamedTuple):
    """Of the main model, and of each multi-token prediction layer that drafts."""

    model: Cache
    drafters: list[Arrays]


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _empty_caches(structure, state, batch: int, slots: int, drafters: int) -> Caches:
    model = structure.merge(state)
    return Caches(model.init_cache(batch, slots), mtp.init_caches(model, drafters, batch, slots))


def prefill(
    structure: Structure, state, caches: Caches, tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"]
) -> tuple[Float[Array, "B W *M D"], Caches]:
    """Run the prompts through the model in chunks.

    Returns what the last layer makes of each row's last tokens, as many as there are drafters but at least one
    (`_last_positions`), and the filled caches.
    """
    ends, extra = None, len(caches.drafters)
    padded = np.pad(tokens, ((0, 0), (0, extra)))
    for start in range(0, tokens.shape[1], PREFILL_CHUNK):
        chunk = padded[:, start : min(start + PREFILL_CHUNK, tokens.shape[1]) + extra]
        ends, caches = _prefill_chunk(structure, state, caches, ends, chunk, start, lengths, start == 0)
    return ends, caches


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def _prefill_chunk(structure, state, caches: Caches, ends, tokens, start, lengths, first: bool):
    """tokens: of the chunk, then one more for each drafter."""
    model, length = structure.merge(state), tokens.shape[1] - len(caches.drafters)
    positions = jnp.broadcast_to(start + jnp.arange(length), (len(tokens), length))
    slots = jnp.where(positions < lengths[:, None], positions, -1)
    context = model.context(tokens[:, :length], positions, None, slots, empty_cache=first)
    residual, cache, _ = model.residual(context, caches.model)
    drafters = mtp.read_prompt(model, residual, tokens[:, 1:], context, lengths, caches.drafters)
    index = _last_positions(lengths, max(1, len(drafters))) - start
    found = jax.vmap(lambda rows, i: rows[i])(residual, jnp.clip(index, 0, length - 1))
    if ends is not None:
        here = ((index >= 0) & (index < length)).reshape(*index.shape, *(1,) * (found.ndim - 2))
        found = jnp.where(here, found, ends)
    return found, Caches(cache, drafters)


def _last_positions(lengths: Int[AnyArray, " B"], count: int) -> Int[AnyArray, "B W"]:
    """Positions of each row's last `count` tokens; of a shorter row, positions from 0 on."""
    return (lengths - count).clip(0)[:, None] + np.arange(count)


def _tokens_after(tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"], count: int) -> np.ndarray:
    """The token after each of the last positions."""
    index = _last_positions(lengths, count) + 1
    return np.take_along_axis(tokens, np.minimum(index, tokens.shape[1] - 1), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """State between rounds of decoding.

    token: each row's last certain one, at `position`. drafts: guesses of those after it. out: the continuation, of
    which `count` tokens are certain. done: has a stop token. drafted, accepted: over all rows so far.
    """

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    drafts: Int[Array, "B drafts"]
    out: Int[Array, "B columns"]
    count: Int[Array, " B"]
    done: Bool[Array, " B"]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]


@functools.partial(jax.jit, static_argnums=(0, 9), donate_argnums=2)
def _first_token(structure, state, caches: Caches, ends, ahead, lengths, sampling: Sampling, keys, stop, columns: int):
    """Choose each row's first new token from what `prefill` returns, and draft those after it."""
    model, zero = structure.merge(state), jnp.zeros(len(lengths), jnp.int32)
    rows, end = jnp.arange(len(lengths)), jnp.minimum(lengths, ends.shape[1]) - 1
    token = _choose(model, ends[rows, end][:, None], sampling, keys, zero)[:, 0]
    positions = _last_positions(lengths, ends.shape[1])
    context = model.context(ahead, positions, None, jnp.where(positions < lengths[:, None], positions, -1))
    drafts, drafters = mtp.draft(model, ends, ahead.at[rows, end].set(token), end, context, caches.drafters)
    out = jnp.zeros((len(lengths), columns), jnp.int32).at[:, 0].set(token)
    loop = Loop(token, lengths, drafts, out, zero + 1, jnp.isin(token, stop), zero[0], zero[0])
    return loop, Caches(caches.model, drafters)


def _choose(model: Model, residual: Float[Array, "B W *M D"], sampling: Sampling, keys, count) -> Int[Array, "B W"]:
    """The tokens after these, the first of them number `count` of its row: their random keys depend on that number."""
    logits = model.logits(model.collapse(residual))
    number = count[:, None] + jnp.arange(logits.shape[1])
    keys = jax.vmap(lambda key, numbers: jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))(keys, number)
    return sample(logits.reshape(-1, logits.shape[-1]), sampling, keys.reshape(-1)).reshape(number.shape)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _decode(structure, state, loop: Loop, caches: Caches, rounds, steps, sampling: Sampling, keys, stop):
    """Up to `rounds` rounds, until every row has a stop token or `steps` tokens.

    A round is one pass over each row's last token and its drafts. It accepts the drafts that the model would have
    chosen itself, and chooses one token more. Choosing by sampling keeps the model's distribution: a draft x of
    probability 1 is right to be accepted with probability p(x), and is, when the token sampled from p is x; another
    sampled token is one from p without x.
    """
    model = structure.merge(state)

    def step(carry):
        number, loop, caches = carry
        tried = jnp.concatenate([loop.token[:, None], loop.drafts], axis=1)
        positions = loop.position[:, None] + jnp.arange(tried.shape[1])
        context = model.context(tried, positions, None)
        residual, cache, _ = model.residual(context, caches.model)
        chosen = _choose(model, residual, sampling, keys, loop.count)
        right = jnp.cumprod(chosen[:, :-1] == loop.drafts, axis=1).sum(axis=1)  # drafts up to the first wrong one
        drafts, drafters = mtp.draft(model, residual, chosen, right, context, caches.drafters)
        return number + 1, _advance(loop, chosen, right, drafts, stop, steps), Caches(cache, drafters)

    def more(carry):
        number, loop, _ = carry
        return (number < rounds) & ~jnp.all(loop.done | (loop.count >= steps))

    return jax.lax.while_loop(more, step, (0, loop, caches))[1:]


def _advance(loop: Loop, chosen: Int[Array, "B W"], right: Int[Array, " B"], drafts, stop, steps) -> Loop:
    """Take over the right drafts and the token chosen after them; rows that are finished stay as they are."""
    going = ~loop.done & (loop.count < steps)
    new = jnp.where(going, right + 1, 0)
    place = jnp.arange(chosen.shape[1])
    taken = place < new[:, None]
    rows, column = jnp.arange(len(right)), jnp.where(taken, loop.count[:, None] + place, loop.out.shape[1])
    return Loop(
        token=jnp.where(going, chosen[rows, right], loop.token),
        position=loop.position + new,
        drafts=drafts,
        out=loop.out.at[rows[:, None], column].set(chosen, mode="drop"),
        count=loop.count + new,
        done=loop.done | jnp.any(jnp.isin(chosen, stop) & taken, axis=1),
        drafted=loop.drafted + jnp.sum(going) * drafts.shape[1],
        accepted=loop.accepted + jnp.sum(jnp.where(going, right, 0)),
    )


def _fill_after_stop(out: np.ndarray, stop: np.ndarray, filler: int) -> np.ndarray:
    """Everything after a row's first stop token becomes the filler."""
    stopped = np.isin(out, stop)
    after = np.cumsum(stopped, axis=1) - stopped > 0
    return np.where(after, filler, out)
