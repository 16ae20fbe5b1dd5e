"""Exact top-k of long rows on Hopper: the set of the k largest, ties broken by the lowest position.

A block holds one row in registers as order-preserving unsigned keys (the next row is loaded meanwhile) and bisects for
the k-th largest key by counting. Once few keys are left between the bounds they move to shared memory, where counting
is cheap. Then every warp writes its chosen positions behind those of the warps before it, so that indices come out in
rising order, and ties at the threshold are taken from the left. A block's next row is first searched near this one's
threshold: rows are often alike, and where they are not, two counts are lost.

Rows longer than a block holds are cut into pieces; a second pass over the pieces' top k (in rising order, so ties keep
their order) gives the answer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxtyping import Array, Float, Int

from dsparse.kernels import mosaic, simt
from dsparse.kernels.simt import U32

SM_COUNT = 132
WARPGROUPS = 4
THREADS = 128 * WARPGROUPS
WARPS = THREADS // 32
LANES = 128  # scores are copied in rows of so many
LONGEST = 32768  # scores a block holds
LISTED_PER_THREAD = 4
LISTED = THREADS * LISTED_PER_THREAD  # keys that move to shared memory
MOST_SELECTED = 4096
LARGEST_KEY = 0xFFFFFFFE
WIDTH_OF_TIES = 1 << 20  # bounds so near with many keys between: these are looked at once
NEAR = 256  # keys to either side of a threshold within which the next row's is looked for first
# Places in shared memory behind two turns of the warps' sums.
COUNTER, GUESS_LOW, GUESS_HIGH = range(2 * WARPS, 2 * WARPS + 3)


def topk(scores: Float[Array, "R S"], k: int, lengths: Int[Array, " R"] | None = None) -> Int[Array, "R k"]:
    """Positions of each row's k largest scores among its first `lengths[r]` (all, without lengths), rising.

    Ties are broken by the lowest position (-0.0 equals 0.0); -1 fills up a row of fewer than k scores. NaN counts as
    the largest (with its sign bit set, the smallest). float32 scores, k up to 4096, S at least k.
    """
    mosaic.require_hopper()
    rows, width = scores.shape
    if scores.dtype != jnp.float32:
        raise NotImplementedError(f"top-k kernel takes float32 scores, not {scores.dtype}")
    if not 0 < k <= MOST_SELECTED or k > width:
        raise NotImplementedError(f"top-k kernel selects 1 to {MOST_SELECTED} of at least as many, not {k} of {width}")
    if rows == 0:
        raise NotImplementedError("top-k kernel needs at least one row")
    if lengths is None:
        lengths = jnp.full((rows,), width, jnp.int32)
    lengths = jnp.clip(lengths, 0, width).astype(jnp.int32)
    if width % LANES:
        scores = jnp.pad(scores, ((0, 0), (0, -width % LANES)))
    pieces = mosaic.cdiv(scores.shape[1], LONGEST)
    if pieces == 1:
        (indices,) = _select(_keys_view(scores), lengths, None, k=k, pieces=1)
        return indices
    if pieces * k > LONGEST:
        raise NotImplementedError(f"top-k kernel cannot select {k} of {width}: at most {LONGEST * LONGEST // k}")
    indices, keys = _select(_keys_view(scores), lengths, None, k=k, pieces=pieces)
    candidates = pieces * k
    indices, keys = (x.reshape(rows, candidates) for x in (indices, keys))
    if candidates % LANES:
        indices, keys = (jnp.pad(x, ((0, 0), (0, -candidates % LANES))) for x in (indices, keys))
    counts = jnp.full((rows,), candidates, jnp.int32)
    (indices,) = _select(_keys_view(keys), counts, indices, k=k, pieces=1)
    return indices


def _keys_view(scores: jax.Array) -> jax.Array:
    """Bits of the scores (or keys), 128 a row, so that a TMA box holds a whole piece."""
    bits = scores if scores.dtype == jnp.int32 else lax.bitcast_convert_type(scores, jnp.int32)
    return bits.reshape(scores.shape[0], -1, LANES)


def _select(bits, lengths, positions, *, k: int, pieces: int):
    """int32[R * pieces, k] positions, -1 past the end; and, unless this is the only or last pass, their keys.

    bits: int32[R, S / 128, 128], float32 bits, or keys of an earlier pass if `positions` int32[R, S] is there, which
    are then looked up there. Key 0 is no candidate.
    """
    rows, lane_rows, _ = bits.shape
    piece_rows = mosaic.round_up(mosaic.cdiv(lane_rows, pieces), WARPGROUPS)
    per_thread = piece_rows // WARPGROUPS
    piece = piece_rows * LANES
    total = rows * pieces
    blocks = min(SM_COUNT, total)
    last = pieces == 1
    looked_up = positions is not None

    def kernel(bits_g, lengths_g, *refs):
        positions_g = refs[0] if looked_up else None
        outs, scratch = refs[looked_up : looked_up + 2 - last], refs[looked_up + 2 - last :]
        bits_s, list_s, sums_s, full, empty = scratch
        block, wg = lax.axis_index("block"), lax.axis_index("wg")

        def fetch(item):
            row, part = lax.div(item, pieces), lax.rem(item, pieces)
            plgpu.copy_gmem_to_smem(bits_g.at[row, pl.ds(part * piece_rows, piece_rows)], bits_s, full)

        @pl.when(wg == 0)
        def _():
            fetch(block)

        _forget_guesses(sums_s)

        def one(i, _):
            item = block + i * blocks
            row, part = lax.div(item, pieces), lax.rem(item, pieces)
            length = jnp.clip(lengths_g[row] - part * piece, 0, piece)
            plgpu.barrier_wait(full)
            keys = _load_keys(bits_s, length, per_thread, are_keys=looked_up)
            plgpu.barrier_arrive(empty)

            @pl.when((wg == 0) & (item + blocks < total))
            def _():
                plgpu.barrier_wait(empty)
                fetch(item + blocks)

            _write_selected(
                keys,
                length,
                part * piece,
                list_s,
                sums_s,
                [out.at[item] for out in outs],
                positions_g.at[row] if looked_up else None,
                per_thread=per_thread,
                k=k,
            )
            return ()

        lax.fori_loop(0, lax.div(total - block + blocks - 1, blocks), one, ())

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((total, k), jnp.int32)] * (2 - last),
        scratch_types=[
            plgpu.SMEM((piece_rows, LANES), jnp.int32),
            plgpu.SMEM((LISTED,), jnp.int32),
            plgpu.SMEM((GUESS_HIGH + 1,), jnp.int32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="wg",
    )(bits, lengths, *([positions] if looked_up else []))


def _load_keys(bits_s, length, per_thread: int, *, are_keys: bool) -> jax.Array:
    """Each thread's keys, passed on as an array that only `_write_selected` understands.

    A warp takes consecutive scores, lane after lane. Positive floats get their sign bit set and negative ones are
    inverted, so that unsigned keys order like the floats.
    """
    layout = plgpu.Layout.WG_STRIDED((128 * per_thread,), vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct((128 * per_thread,), jnp.int32, layout=layout),
    )
    def read(ctx, bits_s, length):
        del ctx
        source = simt.pointer(bits_s)
        length = U32(length.registers.item())
        thread = simt.thread()
        first = (thread // 32) * (32 * per_thread) + thread % 32
        registers = []
        for j in range(per_thread):
            at = first + 32 * j
            value = simt.load(source, at)
            if not are_keys:
                value = value.equals(0x80000000).select(0, value)  # -0.0 is 0.0
                value = value ^ (value.shift_right_signed(31) | 0x80000000)
                value = value.minimum(LARGEST_KEY)
            value = (at < length).select(value, 0)
            vector = ir.VectorType.get((1,), value.value.type)
            registers.append(simt.mgpu_utils.bitcast(value.value, vector))
        return fragmented_array.FragmentedArray(
            _registers=np.array(registers, dtype=object), _layout=layout.to_mgpu(), _is_signed=True
        )

    return read(bits_s, length)


def _forget_guesses(sums_s) -> None:
    """Before the first row: 0 is no bound worth a look."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def write(ctx, sums_s):
        del ctx
        sums = simt.pointer(sums_s)
        with simt.when(simt.thread().equals(0)):
            for guess in (GUESS_LOW, GUESS_HIGH):
                simt.store(sums, U32(guess), 0)
        simt.block_barrier()

    write(sums_s)


def _write_selected(keys, length, offset, list_s, sums_s, outs, positions, *, per_thread: int, k: int) -> None:
    """Finds the threshold among the block's keys and writes positions (plus `offset`, or looked up) and keys."""
    ref, splat = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
    layout = plgpu.Layout.WG_STRIDED((128 * per_thread,), vec_size=1)
    refs = [list_s, sums_s, *outs, *([] if positions is None else [positions])]

    @plgpu.inline_mgpu(arg_types=(layout, splat, splat, *[ref] * len(refs)))
    def write(ctx, keys, length, offset, list_s, sums_s, *refs):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        keys = [U32(simt.mgpu_utils.bitcast(r, i32)) for r in keys.registers.flat]
        length, offset = U32(length.registers.item()), U32(offset.registers.item())
        shared = _Shared(simt.pointer(list_s), simt.pointer(sums_s))
        above, ties = _threshold(keys, length, shared, k)
        targets = [simt.pointer(r, device_memory=True) for r in refs]
        lookup = targets.pop() if positions is not None else None
        _emit(keys, above, ties, offset, shared, targets, lookup, k)

    write(keys, length, offset, *refs)


class _Shared:
    """Shared memory of a block: a list of keys, and sums of the warps, in turns so that one barrier a sum is enough."""

    def __init__(self, listed, sums):
        self.listed, self.sums = listed, sums
        self.thread = simt.thread()
        self.warp, self.lane = self.thread // 32, self.thread % 32

    def _share(self, value: U32, turn: U32 | int) -> U32:
        """Shares a value a warp, and returns where they are."""
        base = U32(turn) * WARPS
        with simt.when(self.lane.equals(0)):
            simt.store(self.sums, base + self.warp, value)
        simt.block_barrier()
        return base

    def warp_sums(self, value: U32, turn: U32 | int) -> list[U32]:
        """Sum of `value` over each warp, for every thread."""
        base = self._share(simt.warp_sum(value), turn)
        return [simt.load(self.sums, base + w) for w in range(WARPS)]

    def block_reduce(self, reduce, value: U32, turn: U32 | int) -> U32:
        """Lanes 16 to 31 read the values of the 16 warps once more, so a sum comes out doubled."""
        base = self._share(reduce(value), turn)
        return reduce(simt.load(self.sums, base + self.lane % WARPS))

    def block_sum(self, value: U32, turn: U32 | int) -> U32:
        """Sum of `value` over the block, for every thread."""
        return self.block_reduce(simt.warp_sum, value, turn) >> 1


def _total(values: list[U32]) -> U32:
    return functools.reduce(lambda a, b: a + b, values)


def _bisect(count, stop, k: int, low, high, at_low, at_high, turn, guesses=()):
    """Narrows low <= k-th largest key < high, with at least k keys from `low` on and fewer from `high` on.

    guesses: bounds to look at first.
    """

    def going(low, high, at_low, at_high, turn, *guesses):
        return ~(at_low.equals(k) | (high - low).equals(1) | stop(at_low - at_high, high - low))

    def narrow(low, high, at_low, at_high, turn, guess, next_guess):
        middle = ((guess > low) & (guess < high)).select(guess, low + ((high - low) >> 1))
        at_middle = count(middle, turn)
        enough = at_middle >= k
        return (
            enough.select(middle, low),
            enough.select(high, middle),
            enough.select(at_middle, at_low),
            enough.select(at_high, at_middle),
            turn ^ 1,
            next_guess,
            U32(0),
        )

    guesses = guesses or (U32(0), U32(0))
    return simt.while_loop(going, narrow, low, high, at_low, at_high, turn, *guesses)[:5]


def _tightened(keys: list[U32], shared: _Shared, k: int, low, high, at_low, at_high, turn):
    """The bounds around the keys that are there, where many are left between near ones: most often all the same."""

    def crowded(low, high, turn, tried):
        return tried.equals(0) & (at_low - at_high > LISTED) & (high - low > 1) & ~at_low.equals(k)

    def tighten(low, high, turn, tried):
        span = high - low
        inside = [(key - low) < span for key in keys]
        lowest, highest = high, low
        for key, flag in zip(keys, inside, strict=True):
            lowest = lowest.minimum(flag.select(key, high))
            highest = highest.maximum(flag.select(key, low))
        lowest = shared.block_reduce(simt.warp_minimum, lowest, turn)
        highest = shared.block_reduce(simt.warp_maximum, highest, turn ^ 1)
        return lowest, highest + 1, turn, U32(1)

    low, high, turn, _ = simt.while_loop(crowded, tighten, low, high, turn, U32(0))
    return low, high, at_low, at_high, turn


def _threshold(keys: list[U32], length: U32, shared: _Shared, k: int) -> tuple[U32, U32]:
    """(above, ties): the selected are all keys > `above`, and the first `ties` of the keys equal to it."""

    def count_all(bound, turn):
        return shared.block_sum(_total([(key >= bound).count() for key in keys]), turn)

    few = U32(length) <= k
    # All of a short row is selected: bounds (0, 1) say so at once. Key 0, no candidate, makes `at_low` right.
    bounds = _bisect(
        count_all,
        lambda between, width: (between <= LISTED) | (width <= WIDTH_OF_TIES),
        k,
        U32(0),
        few.select(1, LARGEST_KEY + 1),
        U32(len(keys) * THREADS),
        few.select(length, 0),
        U32(0),
        [simt.load(shared.sums, U32(at)) for at in (GUESS_LOW, GUESS_HIGH)],
    )
    bounds = _tightened(keys, shared, k, *bounds)
    low, high, at_low, at_high, turn = _bisect(count_all, lambda between, _: between <= LISTED, k, *bounds)
    unfinished = ~(at_low.equals(k) | (high - low).equals(1))
    simt.block_barrier()
    for j in range(LISTED_PER_THREAD):
        simt.store(shared.listed, shared.thread + THREADS * j, 0)
    with simt.when(shared.thread.equals(0)):
        simt.store(shared.sums, U32(COUNTER), 0)
    simt.block_barrier()
    wide_low, wide_high, at_wide_low = low, high, at_low
    span = high - low
    with simt.when(unfinished):
        inside = [(key - low) < span for key in keys]
        slot = simt.atomic_add(shared.sums, U32(COUNTER), _total([flag.count() for flag in inside]))
        for key, flag in zip(keys, inside, strict=True):
            with simt.when(flag):
                simt.store(shared.listed, slot, key)
            slot = slot + flag.count()
    simt.block_barrier()
    listed = [simt.load(shared.listed, shared.thread + THREADS * j) for j in range(LISTED_PER_THREAD)]

    def count_listed(bound, turn):
        return at_high + shared.block_sum(_total([(key >= bound).count() for key in listed]), turn)

    low, high, at_low, at_high_now, _ = _bisect(
        count_listed, lambda between, _: between.equals(0), k, low, high, at_low, at_high, turn
    )
    with simt.when(shared.thread.equals(0) & ~few):
        _guess_next(shared, low, wide_low, wide_high, at_wide_low - k, U32(k) - at_high)
    simt.block_barrier()
    # Exactly k keys from `low` on: no ties to choose from. Key 0 is never selected.
    exact = at_low.equals(k) & (low > 0)
    none = exact | low.equals(0)
    return exact.select(low - 1, low), none.select(0, U32(k) - at_high_now)


def _guess_next(shared: _Shared, threshold, low, high, below, above) -> None:
    """Bounds around a row's threshold for the next row to look at: NEAR keys or so to either side, as many as there
    are on the more crowded one. `below` keys lie between `low` and the threshold, `above` between it and `high`."""

    def reach(distance, keys):
        far = (distance // keys.maximum(1)).minimum(LARGEST_KEY // NEAR) * NEAR
        return keys.equals(0).select(LARGEST_KEY, far)

    half = reach(threshold - low, below).minimum(reach(high - threshold, above)) + 1
    simt.store(shared.sums, U32(GUESS_LOW), threshold - half.minimum(threshold))
    simt.store(shared.sums, U32(GUESS_HIGH), threshold + half.minimum(U32(LARGEST_KEY + 1) - threshold))


def _emit(keys, above: U32, ties: U32, offset: U32, shared: _Shared, targets, lookup, k: int) -> None:
    lower_lanes = (U32(1) << shared.lane) - 1
    larger_counts = shared.warp_sums(_total([(key > above).count() for key in keys]), 0)
    equal_counts = shared.warp_sums(_total([key.equals(above).count() for key in keys]), 1)

    def before(counts):
        return _total([(shared.warp > w).select(count, 0) for w, count in enumerate(counts)])

    equal_seen = before(equal_counts)
    at = before(larger_counts) + equal_seen.minimum(ties)
    first = shared.warp * (32 * len(keys)) + shared.lane

    def store(j, chosen, at):
        """Those of the j-th key of each lane that are chosen, from `at` on; returns where the next ones go."""
        chosen_lanes = simt.ballot(chosen)
        with simt.when(chosen):
            slot = at + simt.bits(chosen_lanes & lower_lanes)
            position = first + 32 * j + offset
            simt.store(targets[0], slot, position if lookup is None else simt.load(lookup, position))
            for target in targets[1:]:
                simt.store(target, slot, keys[j])
        return at + simt.bits(chosen_lanes)

    with simt.when(ties.equals(0)):
        end, bound = at, simt.unknown(above)  # comparing again takes fewer registers than remembering
        for j, key in enumerate(keys):
            end = store(j, key > bound, end)
    with simt.when(ties > 0):
        end, bound = at, simt.unknown(above)
        for j, key in enumerate(keys):
            equal_lanes = simt.ballot(key.equals(bound))
            first_ties = equal_seen + simt.bits(equal_lanes & lower_lanes) < ties
            end = store(j, (key > bound) | (key.equals(bound) & first_ties), end)
            equal_seen = equal_seen + simt.bits(equal_lanes)
    total = _total(larger_counts) + _total(equal_counts).minimum(ties)
    for j in range(mosaic.cdiv(k, THREADS)):
        slot = shared.thread + THREADS * j
        with simt.when((slot >= total) & (slot < k)):
            simt.store(targets[0], slot, 0xFFFFFFFF)
            for target in targets[1:]:
                simt.store(target, slot, 0)
    simt.block_barrier()
