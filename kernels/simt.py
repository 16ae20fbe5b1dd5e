"""Per-thread code inside a Mosaic GPU kernel, for what its warpgroup-level arrays cannot say: unsigned 32-bit integers
with Python's operators, branches, loops, and collectives over warps and blocks.

Only for functions under `plgpu.inline_mgpu`; `load` and `store` take what `pointer` returns.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, math, nvvm, scf

_Predicate = arith.CmpIPredicate


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


class U32:
    """One unsigned 32-bit integer a thread. Comparisons give a `Flag`."""

    def __init__(self, value: "ir.Value | int | U32"):
        if isinstance(value, U32):
            value = value.value
        elif isinstance(value, int):
            signed = value - (1 << 32) if value >= 1 << 31 else value
            value = arith.constant(_i32(), ir.IntegerAttr.get(_i32(), signed))
        self.value = value

    def _binary(self, op, other) -> "U32":
        return U32(op(self.value, U32(other).value))

    def _compare(self, predicate, other) -> "Flag":
        return Flag(arith.cmpi(predicate, self.value, U32(other).value))

    def __add__(self, other):
        return self._binary(arith.addi, other)

    def __sub__(self, other):
        return self._binary(arith.subi, other)

    def __mul__(self, other):
        return self._binary(arith.muli, other)

    def __floordiv__(self, other):
        return self._binary(arith.divui, other)

    def __mod__(self, other):
        return self._binary(arith.remui, other)

    def __and__(self, other):
        return self._binary(arith.andi, other)

    def __or__(self, other):
        return self._binary(arith.ori, other)

    def __xor__(self, other):
        return self._binary(arith.xori, other)

    def __lshift__(self, other):
        return self._binary(arith.shli, other)

    def __rshift__(self, other):
        return self._binary(arith.shrui, other)

    def __lt__(self, other):
        return self._compare(_Predicate.ult, other)

    def __le__(self, other):
        return self._compare(_Predicate.ule, other)

    def __gt__(self, other):
        return self._compare(_Predicate.ugt, other)

    def __ge__(self, other):
        return self._compare(_Predicate.uge, other)

    def equals(self, other) -> "Flag":
        return self._compare(_Predicate.eq, other)

    def minimum(self, other) -> "U32":
        return self._binary(arith.minui, other)

    def maximum(self, other) -> "U32":
        return self._binary(arith.maxui, other)

    def shift_right_signed(self, bits: int) -> "U32":
        return self._binary(arith.shrsi, bits)


class Flag:
    """One boolean a thread."""

    def __init__(self, value: ir.Value):
        self.value = value

    def __and__(self, other):
        return Flag(arith.andi(self.value, other.value))

    def __or__(self, other):
        return Flag(arith.ori(self.value, other.value))

    def __invert__(self):
        true = arith.constant(self.value.type, ir.IntegerAttr.get(self.value.type, 1))
        return Flag(arith.xori(self.value, true))

    def count(self) -> U32:
        """1 where true, else 0."""
        return U32(arith.extui(_i32(), self.value))

    def select(self, true, false) -> U32:
        return U32(arith.select(self.value, U32(true).value, U32(false).value))


def pointer(ref: ir.Value, *, device_memory: bool = False) -> ir.Value:
    value = mgpu_utils.memref_ptr(ref)
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), value) if device_memory else value


def _element(base: ir.Value, index: U32) -> ir.Value:
    i64 = ir.IntegerType.get_signless(64)
    return mgpu_utils.getelementptr(base, [arith.extui(i64, U32(index).value)], _i32())


def load(base: ir.Value, index: U32) -> U32:
    return U32(llvm.load(_i32(), _element(base, index)))


def store(base: ir.Value, index: U32, value: U32 | int) -> None:
    llvm.store(U32(value).value, _element(base, index))


def clear16(base: ir.Value, byte: U32) -> None:
    """Zeroes 16 aligned bytes."""
    vector = ir.VectorType.get((4,), _i32())
    zero = arith.constant(vector, ir.DenseElementsAttr.get_splat(vector, ir.IntegerAttr.get(_i32(), 0)))
    i64, i8 = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(8)
    llvm.store(zero, mgpu_utils.getelementptr(base, [arith.extui(i64, byte.value)], i8))


def atomic_add(base: ir.Value, index: U32, value: U32) -> U32:
    """Adds in shared memory; returns what was there before."""
    return U32(llvm.atomicrmw(llvm.AtomicBinOp.add, _element(base, index), value.value, llvm.AtomicOrdering.monotonic))


def unknown(value: U32) -> U32:
    """The same value, of which the compiler knows nothing: what is computed from it is not kept from before."""
    return U32(llvm.inline_asm(_i32(), [value.value], "mov.b32 $0, $1;", "=r,r", has_side_effects=True))


def thread() -> U32:
    return U32(mgpu_utils.thread_idx())


def ballot(flag: Flag) -> U32:
    """Bit i: the flag of the warp's lane i."""
    return U32(nvvm.vote_sync(U32(0xFFFFFFFF).value, flag.value, nvvm.VoteSyncKind.ballot))


def bits(value: U32) -> U32:
    return U32(math.ctpop(value.value))


def warp_sum(value: U32) -> U32:
    return _reduce(value, nvvm.ReductionKind.ADD)


def warp_minimum(value: U32) -> U32:
    return _reduce(value, nvvm.ReductionKind.UMIN)


def warp_maximum(value: U32) -> U32:
    return _reduce(value, nvvm.ReductionKind.UMAX)


def _reduce(value: U32, kind) -> U32:
    return U32(nvvm.redux_sync(value.value, kind, U32(0xFFFFFFFF).value))


def block_barrier() -> None:
    gpu.barrier()


@contextlib.contextmanager
def when(flag: Flag) -> Iterator[None]:
    branch = scf.IfOp(flag.value)
    with ir.InsertionPoint(branch.then_block):
        yield
        scf.yield_([])


def while_loop(condition: Callable[..., Flag], body: Callable[..., Sequence[U32]], *initial: U32) -> tuple[U32, ...]:
    types = [_i32()] * len(initial)
    loop = scf.WhileOp(types, [U32(v).value for v in initial])
    before = loop.before.blocks.append(*types)
    with ir.InsertionPoint(before):
        scf.condition(condition(*map(U32, before.arguments)).value, list(before.arguments))
    after = loop.after.blocks.append(*types)
    with ir.InsertionPoint(after):
        scf.yield_([U32(v).value for v in body(*map(U32, after.arguments))])
    return tuple(map(U32, loop.results))
