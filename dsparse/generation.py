"""Generation: chunked prefill into a static-shape cache, then a compiled decode loop.

Prompt lengths and cache sizes are rounded up to buckets, so that prompts of similar length share one compilation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from dsparse.errors import DsparseError
from dsparse.model import Cache, Model, check_tokens
from dsparse.mtp import speculative_generate
from dsparse.sampling import Sampling, make_sampling, sample

PREFILL_CHUNK = 1024
STEPS_A_CALL = 256  # tokens decoded by one call of the compiled loop when nobody watches the stream

OnToken = Callable[[Int[np.ndarray, " B"], Int[np.ndarray, " B"]], None]


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
) -> Int[np.ndarray, "B max_new_tokens"]:
    """Continue every prompt by up to `max_new_tokens` tokens.

    tokens: prompts, integers [B, T]; where they differ in length, fill on the right and give `lengths`.
    temperature: 0 picks the most likely token; top_k, top_p, min_p filter as in transformers.
    stop_tokens: a row ends after one of these (default: the config's eos_token_id; (): none); the rest of the row is
        pad_token_id, or the stop token where the config has no padding.
    on_token: called after each step with (tokens [B], finished [B]), finished rows repeating the filler.
    speculative: "mtp" lets the model's multi-token prediction layers draft (greedy decoding only; same tokens in fewer
        passes). `dsparse.mtp` logs how many drafts were accepted; `dsparse.mtp.speculative_generate` returns it.

    Raises:
        DsparseError: a token id outside the vocabulary, an empty prompt, or sampling parameters out of range.
    """
    tokens = check_tokens(tokens, model.config.vocab_size)
    lengths = _check_lengths(tokens, lengths)
    if max_new_tokens < 1:
        raise DsparseError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    sampling = make_sampling(temperature, top_k, top_p, min_p)
    stop, filler = _stop_tokens(model, stop_tokens)
    graphdef, state = nnx.split(model)
    padded = _pad_prompts(tokens)
    if speculative is not None:
        _check_speculative(speculative, temperature, on_token)
        slots = bucket(padded.shape[1] + max_new_tokens)
        out, _ = speculative_generate(model, padded, lengths, max_new_tokens, slots, stop.tolist())
        return _fill_after_stop(out, np.asarray(stop), filler)
    cache = _empty_cache(graphdef, state, len(tokens), bucket(padded.shape[1] + max_new_tokens))
    hidden, cache = prefill(graphdef, state, cache, padded, lengths)
    keys = jax.random.split(jax.random.key(seed), len(tokens))
    first, done = _first_token(graphdef, state, hidden, sampling, keys, stop)
    loop = _Loop(
        first,
        jnp.asarray(lengths),
        done,
        jnp.zeros((len(tokens), bucket(max_new_tokens)), jnp.int32).at[:, 0].set(first),
    )
    step = 1
    if on_token:
        on_token(np.asarray(first), np.asarray(done))
    while step < max_new_tokens and not np.all(loop.done):
        last = step + 1 if on_token else min(step + STEPS_A_CALL, max_new_tokens)
        loop, cache = _decode(graphdef, state, loop, cache, step, last, sampling, keys, stop, filler)
        if on_token:
            on_token(np.asarray(loop.out[:, step]), np.asarray(loop.done))
        step = last
    out = np.array(loop.out[:, :max_new_tokens])
    return _fill_after_stop(out, np.asarray(stop), filler)


def _check_speculative(speculative: str, temperature: float, on_token: OnToken | None) -> None:
    if speculative != "mtp":
        raise DsparseError(f"speculative {speculative!r} is not supported (mtp)")
    if temperature:
        raise DsparseError("speculative decoding is greedy: leave temperature at 0")
    if on_token:
        raise DsparseError("speculative decoding does not stream: leave on_token out")


def bucket(size: int, smallest: int = 64) -> int:
    """`size` rounded up to 2^n or 1.5 * 2^n."""
    power = smallest
    while power < size:
        power *= 2
    return power * 3 // 4 if power > smallest and power * 3 // 4 >= size else power


def _check_lengths(tokens: np.ndarray, lengths: Sequence[int] | None) -> Int[np.ndarray, " B"]:
    batch, time = tokens.shape
    lengths = np.full(batch, time, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    if batch == 0 or lengths.shape != (batch,) or lengths.min(initial=1) < 1 or lengths.max(initial=0) > time:
        raise DsparseError(f"lengths must be {batch} numbers from 1 to {time}, found {lengths.tolist()}")
    return lengths


def _stop_tokens(model: Model, stop_tokens: Sequence[int] | None) -> tuple[Int[Array, " S"], int]:
    stop = list(model.config.eos_token_id if stop_tokens is None else stop_tokens)
    filler = model.config.pad_token_id
    if filler is None:
        filler = stop[0] if stop else 0
    return jnp.asarray(stop or [-1], jnp.int32), filler


def _pad_prompts(tokens: np.ndarray) -> np.ndarray:
    time = tokens.shape[1]
    width = bucket(time) if time <= PREFILL_CHUNK else -(-time // PREFILL_CHUNK) * PREFILL_CHUNK
    return np.pad(tokens, ((0, 0), (0, width - time)))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _empty_cache(graphdef, state, batch: int, slots: int) -> Cache:
    return nnx.merge(graphdef, state).init_cache(batch, slots)


def prefill(graphdef, state, cache: Cache, tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"]):
    """Run the prompts through the model in chunks; the last token's hidden state of each row, and the filled cache."""
    hidden = None
    for start in range(0, tokens.shape[1], PREFILL_CHUNK):
        chunk = tokens[:, start : start + PREFILL_CHUNK]
        hidden, cache = _prefill_chunk(graphdef, state, cache, hidden, chunk, start, lengths, start == 0)
    return hidden, cache


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def _prefill_chunk(graphdef, state, cache, last_hidden, tokens, start, lengths, first: bool):
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    slots = jnp.where(positions < lengths[:, None], positions, -1)
    hidden, cache, _ = model.hidden_states(tokens, positions, cache=cache, slots=slots, empty_cache=first)
    last = lengths - 1 - start
    ends_here = (last >= 0) & (last < tokens.shape[1])
    at_end = jnp.take_along_axis(hidden, jnp.clip(last, 0, tokens.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return at_end if last_hidden is None else jnp.where(ends_here[:, None], at_end, last_hidden), cache


@functools.partial(jax.jit, static_argnums=0)
def _first_token(graphdef, state, hidden, sampling, keys, stop):
    token = sample(nnx.merge(graphdef, state).logits(hidden), sampling, _step_keys(keys, 0))
    return token, jnp.isin(token, stop)


def _step_keys(keys, step):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
    """State of the decode loop: last token, its position, finished rows, all tokens so far."""

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    done: Array
    out: Int[Array, "B steps"]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _decode(graphdef, state, loop, cache, step, last, sampling: Sampling, keys, stop, filler):
    """Decode steps [step, last), or until every row is finished."""
    model = nnx.merge(graphdef, state)

    def body(carry):
        step, loop, cache = carry
        positions = loop.position[:, None]
        hidden, cache, _ = model.hidden_states(loop.token[:, None], positions, cache=cache)
        token = sample(model.logits(hidden[:, 0]), sampling, _step_keys(keys, step))
        token = jnp.where(loop.done, filler, token)
        done = loop.done | jnp.isin(token, stop)
        out = jax.lax.dynamic_update_slice(loop.out, token[:, None], (0, step))
        return step + 1, _Loop(token, loop.position + 1, done, out), cache

    def more(carry):
        return (carry[0] < last) & ~jnp.all(carry[1].done)

    _, loop, cache = jax.lax.while_loop(more, body, (step, loop, cache))
    return loop, cache


def _fill_after_stop(out: np.ndarray, stop: np.ndarray, filler: int) -> np.ndarray:
    """Everything after a row's first stop token becomes the filler."""
    stopped = np.isin(out, stop)
    after = np.cumsum(stopped, axis=1) - stopped > 0
    return np.where(after, filler, out)
