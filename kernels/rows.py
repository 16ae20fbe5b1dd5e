"""Row gather for kernels written in Pallas Mosaic GPU, which has none on Hopper.

It is written in Mosaic's lane level dialect, so it has no interpret mode: a kernel that uses it takes another branch
there. Rows of a tile are gathered with 16-byte `cp.async` straight into the swizzled layout wgmma reads. The
copies report to hardware barriers of their own kind (an mbarrier that counts copies), which Pallas does not expose.
Rows of an fp8 cache are converted in registers; two blocks that need the same ones convert half of them each, and send
it to the other's shared memory with `cp.async.bulk`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from . import mosaic
from .lane import asm, c32, c64, gmem_pointer, smem_address

ROWS = 64  # rows of a gathered tile
CHUNK = 64  # columns of a 128-byte chunk of 16-bit elements, the unit of the swizzled layout
THREADS = 128  # of a warpgroup
GROUP_ROWS = THREADS // 8  # rows that a warpgroup fills at once, eight threads to a row
PASSES = ROWS // GROUP_ROWS
_ATOM = 8 * 128  # bytes of the swizzled layout's unit: 8 rows of a chunk
FP8_ROW = 656  # bytes: 512 e4m3 values, 4 float32 scales of 128 values each, 64 bf16 values

_WAIT = "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n@!done bra AGAIN;\n}"
_OTHERS_ADDRESS = (
    "{\n.reg .b32 other;\nmov.u32 other, %cluster_ctarank;\nxor.b32 other, other, 1;\n"
    "mapa.shared::cluster.u32 $0, $1, other;\n}"
)

# Eight e4m3 values times a float32 scale, as bf16.
_DEQUANTIZE = "{\n.reg .b16 x0, x1, x2, x3, low, high;\n.reg .b32 halves;\n.reg .f32 a, b;\n"
_DEQUANTIZE += "mov.b32 {x0, x1}, $4;\nmov.b32 {x2, x3}, $5;\n"
for _k in range(4):
    _DEQUANTIZE += (
        f"cvt.rn.f16x2.e4m3x2 halves, x{_k};\nmov.b32 {{low, high}}, halves;\n"
        "cvt.f32.f16 a, low;\ncvt.f32.f16 b, high;\n"
        f"mul.f32 a, a, $6;\nmul.f32 b, b, $6;\ncvt.rn.bf16x2.f32 ${_k}, b, a;\n"
    )
_DEQUANTIZE += "}"


def opaque_zero() -> jax.Array:
    """An int32 zero that the compiler cannot see through.

    Indexing a tile with it keeps the address arithmetic of a loop's matrix products inside the loop: hoisted, the
    descriptors of some fifty products fill the registers and spill.
    """

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
    def zero(ctx):
        i32 = ir.IntegerType.get_signless(32)
        value = llvm.inline_asm(i32, [], "mov.b32 $0, 0;", "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return zero()


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns of one slot's tile that become full, and are freed again, together.

    `chunks`: the 64-column chunks of the row that it holds; chunks from 8 on live in the tail tile.
    """

    slot: int
    chunks: tuple[int, ...]

    @property
    def first(self) -> bool:
        return 0 in self.chunks


def barrier_scratch(parts: Sequence[Part]):
    """Shared memory for the barriers of `parts`: one that says full, one that says free."""
    return plgpu.SMEM((4 * len(parts),), jnp.int32)


def init_barriers(barriers, parts: Sequence[Part], paired: bool = False) -> None:
    """One warpgroup calls this; all warpgroups must synchronize before they use a barrier, those of a pair by `meet`.

    paired: two blocks of a cluster take the same lists, and each fills half of the rows of both.
    """
    blocks = 2 if paired else 1

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(ctx, barriers):
        base = smem_address(barriers)
        leader = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, arith.remui(utils.thread_idx(), c32(THREADS)), c32(0)))
        with ir.InsertionPoint(leader.then_block):
            for number in range(len(parts)):
                # Each gathering thread arrives twice: when its copies are there, and for what it wrote itself.
                asm(f"mbarrier.init.shared::cta.b64 [$0+{8 * number}], {2 * THREADS};", [base], "r")
                offset = 8 * (len(parts) + number)
                asm(f"mbarrier.init.shared::cta.b64 [$0+{offset}], {blocks * THREADS};", [base], "r")
            asm("fence.mbarrier_init.release.cluster;")
            scf.yield_([])

    init(barriers)


def meet() -> None:
    """All threads of both blocks of a pair wait for each other: before one touches the other's memory, and before one
    ends while the other still may."""

    @plgpu.inline_mgpu()
    def wait(ctx):
        asm("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;")

    wait()


def _others(address: ir.Value) -> ir.Value:
    """The same place in the shared memory of a pair's other block."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [address], _OTHERS_ADDRESS, "=r,r", has_side_effects=True)


def wait_full(barriers, number: int, step: jax.Array) -> None:
    """A warpgroup waits until part `number` holds the rows of loop step `step`, and lets wgmma see them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait(ctx, barriers, phase):
        address = arith.addi(smem_address(barriers), c32(8 * number))
        asm(_WAIT, [address, phase.registers.item()], "r,r")
        asm("fence.proxy.async.shared::cta;")

    wait(barriers, step & 1)


def publish() -> None:
    """A thread's writes to shared memory become visible to matrix products of those whom it tells afterwards."""

    @plgpu.inline_mgpu()
    def fence(ctx):
        asm("fence.proxy.async.shared::cta;")

    fence()


def free(barriers, parts: Sequence[Part], number: int, paired: bool = False) -> None:
    """A warpgroup says that it, its block's only reader left, is done with part `number`: it may be overwritten."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def arrive(ctx, barriers):
        offset = 8 * (len(parts) + number)
        base = smem_address(barriers)
        asm(f"mbarrier.arrive.shared::cta.b64 _, [$0+{offset}];", [base], "r")
        if paired:
            asm(f"mbarrier.arrive.shared::cluster.b64 _, [$0+{offset}];", [_others(base)], "r")

    arrive(barriers)


def gather(
    kv,
    indices,
    steps,
    tile,
    tail,
    bias,
    barriers,
    parts: Sequence[Part],
    *,
    slots: int,
    items,
    per_row: int,
    paired: bool = False,
) -> None:
    """A warpgroup fills the slots with the rows that index lists name, step after step, as readers free them.

    Rows of an fp8 cache (see `FP8_ROW`) become bf16 on their way through registers.

    Args:
      kv: GMEM [B, S, H], 16-bit, or uint8[B, S, FP8_ROW]. Rows outside [0, S) are zeros.
      indices: GMEM int32[R, K], K at least steps * slots * ROWS; list r names rows of kv[r // (R / B)].
      steps: GMEM int32[R], how many times all slots are filled from each list.
      tile: SMEM [slots, ROWS, 512], swizzled: the first 512 columns.
      tail: SMEM [slots, ROWS, 64], swizzled: the columns from 512 on, if kv has them.
      bias: SMEM float32[slots, ROWS]: 0 for a row of kv, -inf for none.
      barriers: see `barrier_scratch`.
      parts: in the order in which readers free them.
      slots: tiles of a step.
      items: (first, stride, end): the lists to take, one after another, are those of items // per_row.
      per_row: items a list is for.
      paired: of an fp8 cache, see `init_barriers`: converting costs more than sending what was converted.
    """
    _, rows_of_kv, width = kv.shape
    lists_of_entry = indices.shape[0] // kv.shape[0]
    list_length = indices.shape[1]
    first_item, stride, end = items
    quantized = kv.dtype == jnp.uint8
    assert quantized or not paired
    row_bytes = width if quantized else 2 * width
    swizzled = plgpu.RefType(mosaic.swizzled(jnp.bfloat16))
    plain = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(plain, plain, plain, swizzled, swizzled, plain, plain, plgpu.Layout.WG_SPLAT))
    def run(ctx, kv, indices, steps, tile, tail, bias, barriers, first_item):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        fp8_lane = functools.partial(_DequantizingLane, barriers=barriers if paired else None)
        lane = (fp8_lane if quantized else _CopyingLane)(tile, tail, bias)
        barrier_at = smem_address(barriers)
        kv_at = arith.addi(llvm.ptrtoint(i64, gmem_pointer(kv)), arith.extui(i64, lane.byte))
        indices_at, steps_at = gmem_pointer(indices), gmem_pointer(steps)

        def wait_free(number, total):
            # A fresh barrier counts the phase before its first as over, so the first wait passes.
            phase = arith.andi(arith.addi(total, c32(1)), c32(1))
            asm(_WAIT, [arith.addi(barrier_at, c32(8 * (len(parts) + number))), phase], "r,r")

        def fill(number):
            asm(f"cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0+{8 * number}];", [barrier_at], "r")
            if paired:  # as many bytes come from the other block as this one sends there
                text = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0+{8 * number}], {lane.bytes_sent};"
            else:
                text = f"mbarrier.arrive.shared::cta.b64 _, [$0+{8 * number}];"
            asm(text, [barrier_at], "r")

        def row_of(source, index):
            some = arith.cmpi(arith.CmpIPredicate.ult, index, c32(rows_of_kv))
            offset = arith.muli(arith.extui(i64, arith.select(some, index, c32(0))), c64(row_bytes))
            return _Row(arith.addi(source, offset), some)

        def load_indices(list_at, step, count, slot):
            """Of this thread's rows in a slot; -1 where no step is left."""
            some = arith.cmpi(arith.CmpIPredicate.ult, step, count)
            first = arith.addi(arith.muli(arith.select(some, step, c32(0)), c32(slots * ROWS)), lane.row)
            offsets = [arith.addi(first, c32(slot * ROWS + GROUP_ROWS * j)) for j in range(PASSES)]
            loaded = [llvm.load(i32, utils.getelementptr(list_at, [o], i32)) for o in offsets]
            return [arith.select(some, index, c32(-1)) for index in loaded]

        def copy_step(row_at, indices_of, total, load_next):
            # The next step's indices are on their way while this step waits for its slots.
            following = [load_next(slot) for slot in range(slots)]
            for number, part in enumerate(parts):
                wait_free(number, total)
                for j, index in enumerate(indices_of[part.slot]):
                    lane.copy(part, j, row_at(index))
                fill(number)
            return following

        def dequantize_step(row_at, indices_of, loaded, total, load_next):
            indices_of, loaded = list(indices_of), list(loaded)
            for number, part in enumerate(parts):
                wait_free(number, total)
                rows = [row_at(index) for index in lane.converted(indices_of[part.slot])]
                for j, index in enumerate(indices_of[part.slot]):
                    lane.copy_tail(part, j, row_at(index))
                if all(part.slot != later.slot for later in parts[number + 1 :]):
                    indices_of[part.slot] = load_next(part.slot)
                ahead = parts[(number + 1) % len(parts)]
                following = lane.converted(indices_of[ahead.slot])
                for j in range(len(rows)):
                    lane.convert(part, j, loaded[j])
                    # A part's words are loaded while the part before it is converted.
                    loaded[j] = lane.load(ahead, row_at(following[j]))
                asm("fence.proxy.async.shared::cta;")
                if paired:
                    utils.warpgroup_barrier()
                    lane.send(part, number)
                fill(number)
            return indices_of, loaded

        per_item = scf.ForOp(first_item.registers.item(), c32(end), c32(stride), [c32(0)])
        with ir.InsertionPoint(per_item.body):
            (total,) = per_item.inner_iter_args
            number = arith.divui(per_item.induction_variable, c32(per_row))
            count = llvm.load(i32, utils.getelementptr(steps_at, [number], i32))
            list_at = utils.getelementptr(indices_at, [arith.muli(arith.extui(i64, number), c64(list_length))], i32)
            entry = arith.extui(i64, arith.divui(number, c32(lists_of_entry)))
            row_at = functools.partial(row_of, arith.addi(kv_at, arith.muli(entry, c64(rows_of_kv * row_bytes))))
            state = [[load_indices(list_at, c32(0), count, slot) for slot in range(slots)]]
            if quantized:
                state.append([lane.load(parts[0], row_at(i)) for i in lane.converted(state[0][parts[0].slot])])
            values, structure = jax.tree.flatten(state)
            per_step = scf.ForOp(c32(0), count, c32(1), values)
            with ir.InsertionPoint(per_step.body):
                step = per_step.induction_variable
                load_next = functools.partial(load_indices, list_at, arith.addi(step, c32(1)), count)
                carried = jax.tree.unflatten(structure, list(per_step.inner_iter_args))
                advance = dequantize_step if quantized else copy_step
                following = advance(row_at, *carried, arith.addi(total, step), load_next)
                scf.yield_(jax.tree.leaves(following))
            scf.yield_([arith.addi(total, count)])
        asm("cp.async.wait_all;")

    run(kv, indices, steps, tile, tail, bias, barriers, first_item)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row as one thread sees it: the address of its first bytes there, and whether there is such a row."""

    address: ir.Value
    some: ir.Value

    def bytes(self, count: int) -> ir.Value:
        """How many to read; the rest is zeros."""
        return arith.select(self.some, c32(count), c32(0))


class _Lane:
    """Where a thread puts its share of the rows. Eight threads fill a row, so that a pass covers 16 rows.

    Swizzled layout: 8 rows x 128 bytes are contiguous, and a row's 16-byte pieces are permuted by its number.
    """

    def __init__(self, tile, tail, bias):
        thread = arith.remui(utils.thread_idx(), c32(THREADS))
        self.row, self.lane = arith.divui(thread, c32(8)), arith.remui(thread, c32(8))
        self.row8, self.half = arith.remui(self.row, c32(8)), arith.divui(self.row, c32(8))
        self.byte = arith.muli(self.lane, c32(16))  # of the row, where the thread's first piece is
        self.tile_at = self._at(smem_address(tile), 8, self.lane)
        self.tail_at = self._at(smem_address(tail), 1, self.lane)
        self.bias_at = arith.addi(smem_address(bias), arith.muli(self.row, c32(4)))

    def _at(self, base, chunks, piece):
        inside = arith.addi(arith.muli(self.row8, c32(_ATOM // 8)), arith.muli(arith.xori(piece, self.row8), c32(16)))
        return arith.addi(base, arith.addi(arith.muli(self.half, c32(chunks * _ATOM)), inside))

    @staticmethod
    def in_tile(part: Part, j: int, chunk: int) -> int:
        return part.slot * ROWS * 512 * 2 + (j * 2 * 8 + chunk) * _ATOM

    @staticmethod
    def in_tail(part: Part, j: int) -> int:
        return part.slot * ROWS * CHUNK * 2 + j * 2 * _ATOM

    def say_whether_some(self, part: Part, j: int, row: _Row) -> None:
        if not part.first:
            return
        f32 = ir.F32Type.get()
        zero, minus_inf = (arith.constant(f32, ir.FloatAttr.get(f32, value)) for value in (0.0, -math.inf))
        offset = 4 * (ROWS * part.slot + GROUP_ROWS * j)
        asm(f"st.shared.f32 [$0+{offset}], $1;", [self.bias_at, arith.select(row.some, zero, minus_inf)], "r,f")


class _CopyingLane(_Lane):
    """Of 16-bit rows, copied as they are."""

    def __init__(self, *refs):
        super().__init__(*refs)
        # Many queries name a row, and queries and outputs are used but once: rows are the last to leave the L2 cache.
        policy = "createpolicy.fractional.L2::evict_last.b64 $0, 1.0;"
        self.keep = llvm.inline_asm(ir.IntegerType.get_signless(64), [], policy, "=l", has_side_effects=True)

    def copy(self, part: Part, j: int, row: _Row) -> None:
        self.say_whether_some(part, j, row)
        lines = []
        for chunk in part.chunks:
            target = f"$0+{self.in_tile(part, j, chunk)}" if chunk < 8 else f"$1+{self.in_tail(part, j)}"
            copy = "cp.async.cg.shared.global.L2::cache_hint.L2::256B"
            lines.append(f"{copy} [{target}], [$2+{128 * chunk}], 16, $3, $4;")
        operands = [self.tile_at, self.tail_at, row.address, row.bytes(16), self.keep]
        asm("\n".join(lines), operands, "r,r,l,r,l")


class _DequantizingLane(_Lane):
    """Of rows of the fp8 cache. A thread's 16 values of each 128 are two 16-byte pieces of bf16 in one chunk."""

    bytes_sent = 4 * _ATOM * (ROWS // 2 // 8) // THREADS  # of a part, a thread's share

    def __init__(self, tile, tail, bias, barriers):
        """barriers: of a pair, each of whose blocks sends the other what it converts."""
        super().__init__(tile, tail, bias)
        self.paired = barriers is not None
        within, upper = arith.remui(self.lane, c32(4)), arith.divui(self.lane, c32(4))
        base = arith.addi(smem_address(tile), arith.muli(upper, c32(_ATOM)))
        # Which of its two pieces a thread stores first keeps the threads of a row in different banks.
        self.swaps = arith.cmpi(arith.CmpIPredicate.ne, upper, c32(0))
        piece = arith.addi(arith.muli(within, c32(2)), upper)
        pieces_at = [self._at(base, 8, piece), self._at(base, 8, arith.xori(piece, c32(1)))]
        if self.paired:
            rank = llvm.inline_asm(base.type, [], "mov.u32 $0, %cluster_ctarank;", "=r", has_side_effects=True)
            self.second = arith.cmpi(arith.CmpIPredicate.ne, rank, c32(0))
            first_row = arith.muli(rank, c32(self.in_tile(Part(0, (0,)), PASSES // 2, 0)))
            pieces_at = [arith.addi(address, first_row) for address in pieces_at]
            # One thread for each 8 rows, whose 4 chunks are contiguous.
            thread = arith.remui(utils.thread_idx(), c32(THREADS))
            some = arith.cmpi(arith.CmpIPredicate.ult, thread, c32(ROWS // 2 // 8))
            source = arith.addi(smem_address(tile), arith.addi(first_row, arith.muli(thread, c32(8 * _ATOM))))
            self.sent = source, _others(source), _others(smem_address(barriers)), some
        self.pieces_at = pieces_at

    def converted(self, indices: list[ir.Value]) -> list[ir.Value]:
        """Those of a slot's rows that this block converts: the first or the second half, of a pair."""
        if not self.paired:
            return indices
        halves = indices[: PASSES // 2], indices[PASSES // 2 :]
        return [arith.select(self.second, b, a) for a, b in zip(*halves, strict=True)]

    def load(self, part: Part, row: _Row) -> list[ir.Value]:
        """The words of half a row: two scales, and two times four of values."""
        start = arith.subi(row.address, arith.extui(row.address.type, self.byte))
        words = _load_words(start, 512 + 2 * part.chunks[0], 2, row.some)
        for number in (0, 1):
            words += _load_words(row.address, CHUNK * part.chunks[0] + 128 * number, 4, row.some)
        return words

    def copy_tail(self, part: Part, j: int, row: _Row) -> None:
        self.say_whether_some(part, j, row)
        if part.chunks[-1] >= 8:
            text = f"cp.async.cg.shared.global [$0+{self.in_tail(part, j)}], [$1+528], 16, $2;"
            asm(text, [self.tail_at, row.address, row.bytes(16)], "r,l,r")

    def convert(self, part: Part, j: int, words: list[ir.Value]) -> None:
        f32, four = ir.F32Type.get(), ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
        scales, words = words[:2], words[2:]
        for piece in range(4):
            first, second = (words[4 * (piece // 2) + k :][:2] for k in (0, 2))
            stored = (second, first) if piece % 2 else (first, second)
            chosen = [arith.select(self.swaps, b, a) for a, b in zip(*stored, strict=True)]
            operands = [*chosen, llvm.bitcast(f32, scales[piece // 2])]
            both = llvm.inline_asm(four, operands, _DEQUANTIZE, "=&r,=&r,=&r,=&r,r,r,f", has_side_effects=True)
            values = [llvm.extractvalue(words[0].type, both, [k]) for k in range(4)]
            target = self.in_tile(part, j, part.chunks[0] + 2 * (piece // 2))
            asm(
                f"st.shared.v4.b32 [$0+{target}], {{$1, $2, $3, $4}};",
                [self.pieces_at[piece % 2], *values],
                "r,r,r,r,r",
            )

    def send(self, part: Part, number: int) -> None:
        """What the warpgroup converted of a part goes to the other block, whose barrier counts its bytes."""
        source, target, barrier, some = self.sent
        offset = part.slot * ROWS * 512 * 2 + part.chunks[0] * _ATOM
        copy = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
        text = f"@$3 {copy} [$1+{offset}], [$0+{offset}], {4 * _ATOM}, [$2+{8 * number}];"
        asm(text, [source, target, barrier, some], "r,r,r,b")


def _load_words(address, offset: int, count: int, some) -> list[ir.Value]:
    """`count` 32-bit words, zeros if not `some`."""
    i32 = ir.IntegerType.get_signless(32)
    outputs = ", ".join(f"${k}" for k in range(count))
    clear = "".join(f"mov.b32 ${k}, 0;\n" for k in range(count))
    text = f"{clear}@${count + 1} ld.global.v{count}.b32 {{{outputs}}}, [${count}+{offset}];"
    kind = ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * count)})>")
    constraints = ",".join(["=&r"] * count + ["l", "b"])
    loaded = llvm.inline_asm(kind, [address, some], text, constraints, has_side_effects=True)
    return [llvm.extractvalue(i32, loaded, [k]) for k in range(count)]
