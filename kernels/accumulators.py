"""What warpgroups do with wgmma accumulators that Pallas Mosaic GPU has no word for: rescaling few of them, storing
them without a stage in shared memory, and adding their rows to rows of global memory.

Written in Mosaic's lane level dialect, without an interpret mode: a kernel that uses them takes another branch there.
"""

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

from . import rows
from .lane import asm, c32, c64, gmem_pointer

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
# The same for a store in 16 bits, which nothing reads again soon.
_STORE_PAIR = """{
.reg .pred odd;
.reg .b32 even_block, odd_block, sent, got, low, high;
setp.ne.u32 odd, $5, 0;
cvt.rn.PAIR.f32 even_block, $2, $1;
cvt.rn.PAIR.f32 odd_block, $4, $3;
selp.b32 sent, even_block, odd_block, odd;
shfl.sync.bfly.b32 got, sent, 1, 0x1f, 0xffffffff;
selp.b32 low, got, even_block, odd;
selp.b32 high, odd_block, got, odd;
st.global.cs.v2.b32 [$0+OFFSET], {low, high};
}"""
_ADD_FIXED_POINT = """{
.reg .s64 whole;
cvt.rni.s64.f32 whole, $1;
red.global.add.u64 [$0+OFFSET], whole;
}"""


def _accumulator_row() -> tuple[ir.Value, ir.Value]:
    """The thread's first row of a wgmma accumulator (its second is 8 below), and its first column's number over 2."""
    thread = arith.remui(utils.thread_idx(), c32(rows.THREADS))
    warp, lane = arith.divui(thread, c32(32)), arith.remui(thread, c32(32))
    return arith.addi(arith.muli(warp, c32(16)), arith.divui(lane, c32(4))), arith.remui(lane, c32(4))


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
        f32 = ir.F32Type.get()
        one = arith.constant(f32, ir.FloatAttr.get(f32, 1.0))
        factors = [_elements(register)[0] for register in factors.registers.flat]
        changed = [arith.cmpf(arith.CmpFPredicate.UNE, factor, one) for factor in factors]
        any_changed = nvvm.vote_sync(c32(-1), arith.ori(*changed), nvvm.VoteSyncKind.any)
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
    """A warpgroup stores float32[ROWS, n], in the layout of a wgmma accumulator, as bf16 or fp16 to GMEM [ROWS, n].

    Straight from registers: a stage in shared memory would hold up whatever that memory is for. The four lanes of a row
    fill whole sectors, 32 bytes at a time.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def run(ctx, values, target):
        i64 = ir.IntegerType.get_signless(64)
        target_type = ir.MemRefType(target.type)
        strides, _ = target_type.get_strides_and_offset()
        pair_type = "f16x2" if target_type.element_type == ir.F16Type.get() else "bf16x2"
        store_pair = _STORE_PAIR.replace("PAIR", pair_type)
        row, pair = _accumulator_row()
        odd, pair_of_lanes = arith.andi(pair, c32(1)), arith.shrui(pair, c32(1))
        column = arith.addi(arith.muli(odd, c32(16)), arith.muli(pair_of_lanes, c32(8)))
        offset = arith.addi(arith.muli(row, c32(2 * strides[0])), column)
        address = arith.addi(llvm.ptrtoint(i64, gmem_pointer(target)), arith.extui(i64, offset))
        registers = list(values.registers.flat)
        for half in (0, 1):
            blocks = [_elements(register) for register in registers[half::2]]
            for number in range(0, len(blocks), 2):
                text = store_pair.replace("OFFSET", str(half * 8 * 2 * strides[0] + number * 16))
                asm(text, [address, *blocks[number], *blocks[number + 1], odd], "l,f,f,f,f,r")

    run(values, target)


def store_vector(values: jax.Array, target) -> None:
    """A warpgroup stores float32[ROWS], a value a row of a wgmma accumulator, to GMEM float32[ROWS]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA.reduce(1), plgpu.RefType()))
    def run(ctx, values, target):
        i64 = ir.IntegerType.get_signless(64)
        row, _ = _accumulator_row()
        offset = arith.extui(i64, arith.muli(row, c32(4)))
        address = arith.addi(llvm.ptrtoint(i64, gmem_pointer(target)), offset)
        for half, register in enumerate(values.registers.flat):
            asm(f"st.global.f32 [$0+{32 * half}], $1;", [address, _elements(register)[0]], "l,f")

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
        base = llvm.ptrtoint(i64, gmem_pointer(target))
        # An accumulator's registers: for each 8 columns, a pair of columns of row r and one of row r + 8.
        registers = list(values.registers.flat)
        odd, pair_of_lanes = arith.andi(pair, c32(1)), arith.shrui(pair, c32(1))
        if unit is None:
            lane_offset = arith.addi(arith.muli(odd, c32(32)), arith.muli(pair_of_lanes, c32(16)))
        else:
            lane_offset = arith.muli(pair, c32(16))
        base = arith.addi(base, arith.extui(i64, lane_offset))

        def swap(*columns):
            four = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
            constraints = "=f,=f,=f,=f,f,f,f,f,r"
            swapped = llvm.inline_asm(four, [*columns, odd], _SWAP, constraints, has_side_effects=True)
            return [llvm.extractvalue(ir.F32Type.get(), swapped, [k]) for k in range(4)]

        for half in (0, 1):
            index_at = utils.getelementptr(gmem_pointer(indices), [arith.addi(row, c32(8 * half))], i32)
            index = llvm.load(i32, index_at)
            blocks = [_elements(register) for register in registers[half::2]]
            if unit is None:
                blocks = [swap(*blocks[n], *blocks[n + 1]) for n in range(0, len(blocks), 2)]
            branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, index, c32(rows_of_target)))
            with ir.InsertionPoint(branch.then_block):
                address = arith.addi(base, arith.muli(arith.extui(i64, index), c64(4 * words)))
                for number, block in enumerate(blocks):
                    if unit is None:
                        at = 4 * (first_column + 16 * number)
                        text = f"red.global.add.v4.f32 [$0+{at}], {{$1, $2, $3, $4}};"
                        asm(text, [address, *block], "l,f,f,f,f")
                        continue
                    for k, value in enumerate(block):
                        at = 8 * (first_column + 8 * number + k)
                        scaled = arith.mulf(value, unit.registers.item())
                        asm(_ADD_FIXED_POINT.replace("OFFSET", str(at)), [address, scaled], "l,f")
                scf.yield_([])

    run(*args)
