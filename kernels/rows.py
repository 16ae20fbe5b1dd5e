"""Row gather and row scatter-add for kernels written in Pallas Mosaic GPU, which has neither on Hopper.

Both are written in Mosaic's lane level dialect, so they have no interpret mode: a kernel that uses them takes another
branch there. Rows of a tile are gathered with 16-byte `cp.async` straight into the swizzled layout wgmma reads. The
copies report to hardware barriers of their own kind (an mbarrier that counts copies), which Pallas does not expose.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

from . import mosaic

ROWS = 64  # rows of a gathered tile
CHUNK = 64  # columns of a 128-byte chunk of 16-bit elements, the unit of the swizzled layout
THREADS = 128  # of a warpgroup
FP8_ROW = 656  # bytes: 512 e4m3 values, 4 float32 scales of 128 values each, 64 bf16 values

_WAIT = "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n@!done bra AGAIN;\n}"

# Two neighbouring lanes hold two columns each of two 8-column blocks; they swap so that each has four columns of one.
_SWAP = """{
.reg .pred odd;
.reg .f32 sent0, sent1, got0, got1;
setp.ne.u32 odd, $8, 0;
selp.f32 sent0, $4, $6, odd;
selp.f32 sent1, $5, $7, odd;
shfl.sync.bfly.b32 got0, sent0, 1, 0x1f, 0xffffffff;
shfl.sync.bfly.b32 got1, sent1, 1, 0x1f, 0xffffffff;
selp.f32 $0, got0, $4, odd;
selp.f32 $1, got1, $5, odd;
selp.f32 $2, $6, got0, odd;
selp.f32 $3, $7, got1, odd;
}"""
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
_ADD_FIXED_POINT = """{
.reg .s64 whole;
cvt.rni.s64.f32 whole, $1;
red.global.add.u64 [$0+OFFSET], whole;
}"""


def _i32(value: int):
    kind = ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def _i64(value: int) -> ir.Value:
    kind = ir.IntegerType.get_signless(64)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def _asm(text: str, operands: Sequence[ir.Value] = (), constraints: str = "") -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=True)


def _smem_address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _gmem_pointer(ref: ir.Value) -> ir.Value:
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(ref))


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


def init_barriers(barriers, parts: Sequence[Part]) -> None:
    """One warpgroup calls this; all warpgroups must synchronize before they use a barrier."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(ctx, barriers):
        base = _smem_address(barriers)
        leader = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, arith.remui(utils.thread_idx(), _i32(THREADS)), _i32(0)))
        with ir.InsertionPoint(leader.then_block):
            for number in range(len(parts)):
                # Each gathering thread arrives twice: when its copies are there, and for what it wrote itself.
                _asm(f"mbarrier.init.shared::cta.b64 [$0+{8 * number}], {2 * THREADS};", [base], "r")
                _asm(f"mbarrier.init.shared::cta.b64 [$0+{8 * (len(parts) + number)}], {THREADS};", [base], "r")
            _asm("fence.mbarrier_init.release.cluster;")
            scf.yield_([])

    init(barriers)


def wait_full(barriers, number: int, step: jax.Array) -> None:
    """A warpgroup waits until part `number` holds the rows of loop step `step`, and lets wgmma see them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait(ctx, barriers, phase):
        address = arith.addi(_smem_address(barriers), _i32(8 * number))
        _asm(_WAIT, [address, phase.registers.item()], "r,r")
        _asm("fence.proxy.async.shared::cta;")

    wait(barriers, step & 1)


def free(barriers, parts: Sequence[Part], number: int) -> None:
    """A warpgroup says that it, the only reader left, is done with part `number`: it may be overwritten."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def arrive(ctx, barriers):
        offset = 8 * (len(parts) + number)
        _asm(f"mbarrier.arrive.shared::cta.b64 _, [$0+{offset}];", [_smem_address(barriers)], "r")

    arrive(barriers)


def gather(
    kv, indices, steps, tile, tail, bias, barriers, parts: Sequence[Part], *, slots: int, items, per_row: int
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
    """
    _, rows_of_kv, width = kv.shape
    lists_of_entry = indices.shape[0] // kv.shape[0]
    list_length = indices.shape[1]
    first_item, stride, end = items
    quantized = kv.dtype == jnp.uint8
    row_bytes = width if quantized else 2 * width
    swizzled = plgpu.RefType(mosaic.swizzled(jnp.bfloat16))
    plain = plgpu.RefType()
    group_rows = THREADS // 8  # eight threads copy the 128 bytes of a chunk, so a pass covers 16 rows
    passes = ROWS // group_rows
    tile_bytes, tail_bytes = ROWS * 512 * 2, ROWS * CHUNK * 2

    @plgpu.inline_mgpu(arg_types=(plain, plain, plain, swizzled, swizzled, plain, plain, plgpu.Layout.WG_SPLAT))
    def run(ctx, kv, indices, steps, tile, tail, bias, barriers, first_item):
        i32, i64, f32 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64), ir.F32Type.get()
        thread = arith.remui(utils.thread_idx(), _i32(THREADS))
        group, lane = arith.divui(thread, _i32(8)), arith.remui(thread, _i32(8))
        row8, half = arith.remui(group, _i32(8)), arith.divui(group, _i32(8))
        # Swizzled layout: 8 rows x 128 bytes are contiguous, and a row's 16-byte pieces are permuted by its number.
        inner = arith.addi(arith.muli(row8, _i32(128)), arith.muli(arith.xori(lane, row8), _i32(16)))
        tile_at = arith.addi(_smem_address(tile), arith.addi(arith.muli(half, _i32(8 * 1024)), inner))
        tail_at = arith.addi(_smem_address(tail), arith.addi(arith.muli(half, _i32(1024)), inner))
        bias_at = arith.addi(_smem_address(bias), arith.muli(group, _i32(4)))
        barrier_at = _smem_address(barriers)
        kv_at = llvm.ptrtoint(i64, _gmem_pointer(kv))
        lane_at = arith.addi(kv_at, arith.extui(i64, arith.muli(lane, _i32(8 if quantized else 16))))
        lane_in_tail = arith.extui(i64, arith.muli(lane, _i32(8)))
        indices_at, steps_at = _gmem_pointer(indices), _gmem_pointer(steps)
        zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        minus_inf = arith.constant(f32, ir.FloatAttr.get(f32, -math.inf))

        def load_indices(list_at, step):
            first = arith.addi(arith.muli(step, _i32(slots * ROWS)), group)
            offsets = [arith.addi(first, _i32(group_rows * j)) for j in range(slots * passes)]
            return [llvm.load(i32, utils.getelementptr(list_at, [o], i32)) for o in offsets]

        def copy_part(part, rows):
            for j, (row, size, bias_value) in enumerate(rows[passes * part.slot : passes * (part.slot + 1)]):
                if part.first:
                    offset = 4 * (ROWS * part.slot + group_rows * j)
                    _asm(f"st.shared.f32 [$0+{offset}], $1;", [bias_at, bias_value], "r,f")
                lines = []
                for chunk in part.chunks:
                    in_tile = part.slot * tile_bytes + j * 2 * 8 * 1024 + chunk * 1024
                    in_tail = part.slot * tail_bytes + j * 2 * 1024
                    target = f"$0+{in_tile}" if chunk < 8 else f"$1+{in_tail}"
                    lines.append(f"cp.async.cg.shared.global.L2::256B [{target}], [$2+{128 * chunk}], 16, $3;")
                _asm("\n".join(lines), [tile_at, tail_at, row, size], "r,r,l,r")

        def load_words(address, offset, count, size):
            """`count` 32-bit words of a row, zeros if the row is none."""
            outputs = ", ".join(f"${k}" for k in range(count))
            clear = "".join(f"mov.b32 ${k}, 0;\n" for k in range(count))
            text = (
                f"{{\n.reg .pred some;\nsetp.ne.u32 some, ${count + 1}, 0;\n{clear}"
                f"@some ld.global.v{count}.b32 {{{outputs}}}, [${count}+{offset}];\n}}"
            )
            kind = ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * count)})>")
            constraints = ",".join(["=&r"] * count + ["l", "r"])
            loaded = llvm.inline_asm(kind, [address, size], text, constraints, has_side_effects=True)
            return [llvm.extractvalue(i32, loaded, [k]) for k in range(count)]

        def dequantize_part(part, rows):
            in_tile = [chunk for chunk in part.chunks if chunk < 8]
            for j, (row, size, bias_value) in enumerate(rows[passes * part.slot : passes * (part.slot + 1)]):
                if part.first:
                    offset = 4 * (ROWS * part.slot + group_rows * j)
                    _asm(f"st.shared.f32 [$0+{offset}], $1;", [bias_at, bias_value], "r,f")
                row_at = arith.subi(row, lane_in_tail)
                scales = load_words(row_at, 512 + 4 * (in_tile[0] // 2), 2, size)
                words = [load_words(row, CHUNK * chunk, 2, size) for chunk in in_tile]
                if part.chunks[-1] >= 8:
                    target = part.slot * tail_bytes + j * 2 * 1024
                    text = f"cp.async.cg.shared.global [$0+{target}], [$1+528], 16, $2;"
                    _asm(text, [tail_at, arith.addi(row, lane_in_tail), size], "r,l,r")
                four = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
                for number, chunk in enumerate(in_tile):
                    scale = llvm.bitcast(f32, scales[number // 2])
                    operands = [*words[number], scale]
                    both = llvm.inline_asm(four, operands, _DEQUANTIZE, "=&r,=&r,=&r,=&r,r,r,f", has_side_effects=True)
                    values = [llvm.extractvalue(i32, both, [k]) for k in range(4)]
                    target = part.slot * tile_bytes + j * 2 * 8 * 1024 + chunk * 1024
                    _asm(f"st.shared.v4.b32 [$0+{target}], {{$1, $2, $3, $4}};", [tile_at, *values], "r,r,r,r,r")
            _asm("fence.proxy.async.shared::cta;")

        def gather_step(source, indices_of_rows, total):
            rows = []
            for index in indices_of_rows:
                valid = arith.cmpi(arith.CmpIPredicate.ult, index, _i32(rows_of_kv))
                offset = arith.muli(arith.extui(i64, arith.select(valid, index, _i32(0))), _i64(row_bytes))
                size = arith.select(valid, _i32(16), _i32(0))
                rows.append((arith.addi(source, offset), size, arith.select(valid, zero, minus_inf)))
            # A fresh barrier counts the phase before its first as over, so the first wait passes.
            phase = arith.andi(arith.addi(total, _i32(1)), _i32(1))
            for number, part in enumerate(parts):
                _asm(_WAIT, [arith.addi(barrier_at, _i32(8 * (len(parts) + number))), phase], "r,r")
                (dequantize_part if quantized else copy_part)(part, rows)
                _asm(f"cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0+{8 * number}];", [barrier_at], "r")
                _asm(f"mbarrier.arrive.shared::cta.b64 _, [$0+{8 * number}];", [barrier_at], "r")

        per_item = scf.ForOp(first_item.registers.item(), _i32(end), _i32(stride), [_i32(0)])
        with ir.InsertionPoint(per_item.body):
            (total,) = per_item.inner_iter_args
            number = arith.divui(per_item.induction_variable, _i32(per_row))
            count = llvm.load(i32, utils.getelementptr(steps_at, [number], i32))
            list_at = utils.getelementptr(indices_at, [arith.muli(arith.extui(i64, number), _i64(list_length))], i32)
            entry = arith.extui(i64, arith.divui(number, _i32(lists_of_entry)))
            source = arith.addi(lane_at, arith.muli(entry, _i64(rows_of_kv * row_bytes)))
            per_step = scf.ForOp(_i32(0), count, _i32(1), load_indices(list_at, _i32(0)))
            with ir.InsertionPoint(per_step.body):
                step = per_step.induction_variable
                # The next step's indices are on their way while this step waits for its slots.
                following = arith.minsi(arith.addi(step, _i32(1)), arith.subi(count, _i32(1)))
                following = load_indices(list_at, following)
                gather_step(source, list(per_step.inner_iter_args), arith.addi(total, step))
                scf.yield_(following)
            scf.yield_([arith.addi(total, count)])
        _asm("cp.async.wait_all;")

    run(kv, indices, steps, tile, tail, bias, barriers, first_item)


def _accumulator_row() -> tuple[ir.Value, ir.Value]:
    """The thread's first row of a wgmma accumulator (its second is 8 below), and its first column's number over 2."""
    thread = arith.remui(utils.thread_idx(), _i32(THREADS))
    warp, lane = arith.divui(thread, _i32(32)), arith.remui(thread, _i32(32))
    return arith.addi(arith.muli(warp, _i32(16)), arith.divui(lane, _i32(4))), arith.remui(lane, _i32(4))


def _elements(register: ir.Value) -> list[ir.Value]:
    if isinstance(register.type, ir.VectorType):
        return [vector.extract(register, [], [k]) for k in range(ir.VectorType(register.type).shape[0])]
    return [register]


def scale_unless_one(values: jax.Array, factors: jax.Array) -> jax.Array:
    """values * factors[:, None], in the layout of a wgmma accumulator; warps whose factors are all 1 skip it."""
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(values.shape, values.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout.reduce(1)), return_type=result)
    def run(ctx, values, factors):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        one = arith.constant(f32, ir.FloatAttr.get(f32, 1.0))
        factors = [_elements(register)[0] for register in factors.registers.flat]
        changed = [arith.cmpf(arith.CmpFPredicate.UNE, factor, one) for factor in factors]
        any_changed = nvvm.vote_sync(_i32(-1), arith.ori(*changed), nvvm.VoteSyncKind.any)
        registers = list(values.registers.flat)
        branch = scf.IfOp(any_changed, [register.type for register in registers], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            # An accumulator's registers: for each 8 columns, a pair of columns of row r and one of row r + 8.
            scf.yield_(
                [
                    arith.mulf(register, vector.broadcast(register.type, factors[number % 2]))
                    for number, register in enumerate(registers)
                ]
            )
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(registers)
        scaled = np.empty(len(registers), object)
        scaled[:] = list(branch.results)
        return mgpu.FragmentedArray(
            _registers=scaled.reshape(values.registers.shape), _layout=values.layout, _is_signed=None
        )

    return run(values, factors)


def store(values: jax.Array, target) -> None:
    """A warpgroup stores float32[ROWS, n], in the layout of a wgmma accumulator, as bf16 to GMEM bf16[ROWS, n].

    Straight from registers: a stage in shared memory would hold up whatever that memory is for.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def run(ctx, values, target):
        i64 = ir.IntegerType.get_signless(64)
        strides, _ = ir.MemRefType(target.type).get_strides_and_offset()
        row, pair = _accumulator_row()
        offset = arith.addi(arith.muli(row, _i32(2 * strides[0])), arith.muli(pair, _i32(4)))
        address = arith.addi(llvm.ptrtoint(i64, _gmem_pointer(target)), arith.extui(i64, offset))
        registers = list(values.registers.flat)
        for half in (0, 1):
            for block, register in enumerate(registers[half::2]):
                a, b = _elements(register)
                at = half * 8 * 2 * strides[0] + block * 16
                text = f"{{\n.reg .b32 both;\ncvt.rn.bf16x2.f32 both, $2, $1;\nst.global.b32 [$0+{at}], both;\n}}"
                _asm(text, [address, a, b], "l,f,f")

    run(values, target)


def store_vector(values: jax.Array, target) -> None:
    """A warpgroup stores float32[ROWS], a value a row of a wgmma accumulator, to GMEM float32[ROWS]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA.reduce(1), plgpu.RefType()))
    def run(ctx, values, target):
        i64 = ir.IntegerType.get_signless(64)
        row, _ = _accumulator_row()
        offset = arith.extui(i64, arith.muli(row, _i32(4)))
        address = arith.addi(llvm.ptrtoint(i64, _gmem_pointer(target)), offset)
        for half, register in enumerate(values.registers.flat):
            _asm(f"st.global.f32 [$0+{32 * half}], $1;", [address, _elements(register)[0]], "l,f")

    run(values, target)


def scatter_add(values: jax.Array, target, indices, first_column: int, unit: jax.Array | None = None) -> None:
    """A warpgroup adds rows to rows of global memory: target[indices[i], first_column:][:n] += values[i], atomically.

    Args:
      values: float32[ROWS, n] in the layout of a wgmma accumulator.
      target: GMEM float32[S, H]; with `unit` int32[S, 2 * H], pairs that hold one 64-bit integer each.
      indices: GMEM int32[ROWS]; rows outside [0, S) are left out.
      unit: float32 scalar. Values are rounded to integers in units of 1 / unit, whose sum, unlike that of floats,
        does not depend on the order of the additions.
    """
    rows_of_target = target.shape[0]
    words = target.shape[1]
    arg_types = (plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType())
    args = (values, target, indices)
    if unit is not None:
        arg_types, args = (*arg_types, plgpu.Layout.WG_SPLAT), (*args, unit)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def run(ctx, values, target, indices, unit=None):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        row, pair = _accumulator_row()
        base = llvm.ptrtoint(i64, _gmem_pointer(target))
        # An accumulator's registers: for each 8 columns, a pair of columns of row r and one of row r + 8.
        registers = list(values.registers.flat)
        odd, pair_of_lanes = arith.andi(pair, _i32(1)), arith.shrui(pair, _i32(1))
        if unit is None:
            lane_offset = arith.addi(arith.muli(odd, _i32(32)), arith.muli(pair_of_lanes, _i32(16)))
        else:
            lane_offset = arith.muli(pair, _i32(16))
        base = arith.addi(base, arith.extui(i64, lane_offset))

        def swap(*columns):
            four = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
            constraints = "=f,=f,=f,=f,f,f,f,f,r"
            swapped = llvm.inline_asm(four, [*columns, odd], _SWAP, constraints, has_side_effects=True)
            return [llvm.extractvalue(ir.F32Type.get(), swapped, [k]) for k in range(4)]

        for half in (0, 1):
            index_at = utils.getelementptr(_gmem_pointer(indices), [arith.addi(row, _i32(8 * half))], i32)
            index = llvm.load(i32, index_at)
            blocks = [_elements(register) for register in registers[half::2]]
            if unit is None:
                blocks = [swap(*blocks[n], *blocks[n + 1]) for n in range(0, len(blocks), 2)]
            branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, index, _i32(rows_of_target)))
            with ir.InsertionPoint(branch.then_block):
                address = arith.addi(base, arith.muli(arith.extui(i64, index), _i64(4 * words)))
                for number, block in enumerate(blocks):
                    if unit is None:
                        at = 4 * (first_column + 16 * number)
                        text = f"red.global.add.v4.f32 [$0+{at}], {{$1, $2, $3, $4}};"
                        _asm(text, [address, *block], "l,f,f,f,f")
                        continue
                    for k, value in enumerate(block):
                        at = 8 * (first_column + 8 * number + k)
                        scaled = arith.mulf(value, unit.registers.item())
                        _asm(_ADD_FIXED_POINT.replace("OFFSET", str(at)), [address, scaled], "l,f")
                scf.yield_([])

    run(*args)
