"""Exact top-k of many rows for XLA on a CPU, where `jax.lax.top_k` keeps to one core and goes entry by entry.

The k-th largest entry of a row is found bit by bit: each bit takes one count of the entries above a threshold, and
counts are vectorized and use every core. What was chosen is written as one bit an entry, 32 to a word, from which the
positions follow by prefix sums. Of a row many times longer than k, blocks are chosen by their largest entries first:
the k largest entries are all in the k best blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from dsparse import reference

FEWEST_ROWS = 32  # below, the counts are too small to be worth their number
BLOCK = 8  # entries
FEWEST_BLOCKS = 2  # for each one chosen: with fewer, choosing blocks first saves nothing
WORD = 32
FOLDS = 16  # parts of a row that are counted into the same vector

LOWEST = np.int32(-(2**31))
INFINITY = np.int32(0x7F800000)  # the key of +inf; that of -inf is its complement


def topk(scores: Float[Array, "R S"], k: int, lengths: Int[Array, " R"] | None = None) -> Int[Array, "R k"]:
    """See `ops.topk`."""
    if jax.default_backend() != "cpu" or scores.shape[0] < FEWEST_ROWS or not 0 < k <= scores.shape[1]:
        return reference.topk(scores, k, lengths)
    keys = _ordered(scores.astype(jnp.float32))
    if lengths is not None:
        keys = jnp.where(jnp.arange(keys.shape[1]) < lengths[:, None], keys, LOWEST)
    return _select(keys, k)


def _ordered(scores: Float[Array, "R S"]) -> Int[Array, "R S"]:
    """Integers in the order of the scores: the bits of floats are, but for negative ones, which fall as they grow."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)  # -0.0 is 0.0
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _select(keys: Int[Array, "R S"], k: int) -> Int[Array, "R k"]:
    """Positions of the k largest, ascending; of equal ones the first; -1 where fewer are above -inf."""
    rows, size = keys.shape
    if size < FEWEST_BLOCKS * k * BLOCK:
        return _positions(_chosen(_pad(keys, WORD * (FOLDS if size > FOLDS * WORD else 1)), k), k)
    blocks = _pad(keys, BLOCK).reshape(rows, -1, BLOCK)
    best = _select(jnp.max(blocks, axis=-1), k)  # ascending: so equal entries keep their order
    inside = jnp.take_along_axis(blocks, jnp.maximum(best, 0)[..., None], axis=1)
    inside = jnp.where((best >= 0)[..., None], inside, LOWEST).reshape(rows, -1)
    place = _select(inside, k)
    position = jnp.take_along_axis(best, jnp.maximum(place, 0) // BLOCK, axis=1) * BLOCK + place % BLOCK
    return jnp.where(place < 0, -1, position)


def _pad(keys: Int[Array, "R S"], multiple: int) -> Int[Array, "R _"]:
    return jnp.pad(keys, ((0, 0), (0, -keys.shape[1] % multiple)), constant_values=LOWEST)


def _chosen(keys: Int[Array, "R S"], k: int) -> UInt32[Array, "R W"]:
    """The k largest as set bits."""
    threshold = jnp.maximum(_kth_largest(keys, k), ~INFINITY + 1)[:, None]
    above, equal = _bits(keys > threshold), _bits(keys == threshold)
    needed, have = k - jnp.sum(_ones(above), axis=1, keepdims=True), _ones(equal)
    before = jnp.cumsum(have, axis=1) - have
    end = _nth_bit(equal, needed - before)  # of the equal ones the first that are needed
    first = (jnp.uint32(1) << end.astype(jnp.uint32)) - 1
    return above | jnp.where(needed - before >= have, equal, jnp.where(needed > before, equal & first, 0))


def _kth_largest(keys: Int[Array, "R S"], k: int) -> Int[Array, " R"]:
    """The largest number that at least k keys reach, bit by bit from the highest."""

    def bit(i, found):
        larger = found + (jnp.int32(1) << (30 - i))
        return jnp.where(_count(keys, larger) >= k, larger, found)

    start = jnp.where(_count(keys, jnp.zeros(len(keys), jnp.int32)) >= k, 0, LOWEST)
    return jax.lax.fori_loop(0, 31, bit, start)


def _count(keys: Int[Array, "R S"], least: Int[Array, " R"]) -> Int[Array, " R"]:
    """How many keys of each row reach `least`. Added as vectors: XLA sums along a row one number at a time."""
    width = max(WORD, keys.shape[1] // FOLDS)
    parts = jnp.split(keys, keys.shape[1] // width, axis=1)
    return jnp.sum(sum((part >= least[:, None]).astype(jnp.int32) for part in parts), axis=1)


def _bits(mask: Bool[Array, "R S"]) -> UInt32[Array, "R W"]:
    values = jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.sum(jnp.where(mask.reshape(len(mask), -1, WORD), values, 0), axis=-1, dtype=jnp.uint32)


def _ones(words: UInt32[Array, "R _"]) -> Int[Array, "R _"]:
    return jax.lax.population_count(words).astype(jnp.int32)


def _nth_bit(words: UInt32[Array, "R _"], n: Int[Array, "R _"]) -> Int[Array, "R _"]:
    """Where each word's set bit number n is, counted from 0, which must exist; by halves."""
    place = jnp.zeros(words.shape, jnp.int32)
    for half in (16, 8, 4, 2, 1):
        below = _ones((words >> place.astype(jnp.uint32)) & jnp.uint32((1 << half) - 1))
        place, n = jnp.where(n >= below, place + half, place), jnp.where(n >= below, n - below, n)
    return place


def _positions(words: UInt32[Array, "R W"], k: int) -> Int[Array, "R k"]:
    """Of up to k set bits in each row, ascending; -1 fills."""
    ones, number = _ones(words), jnp.arange(k)
    ends = jnp.cumsum(ones, axis=1)
    method = "compare_all" if words.shape[1] <= WORD else "scan"
    word = jax.vmap(lambda e: jnp.searchsorted(e, number, side="right", method=method))(ends)
    word = jnp.minimum(word, words.shape[1] - 1)
    before, bits = (jnp.take_along_axis(x, word, axis=1) for x in (ends - ones, words))
    return jnp.where(number < ends[:, -1:], word * WORD + _nth_bit(bits, number - before), -1)
