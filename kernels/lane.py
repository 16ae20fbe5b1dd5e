"""Words of Mosaic GPU's lane level dialect that several kernels need: constants, addresses, assembly."""

from collections.abc import Sequence

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def c32(value: int) -> ir.Value:
    kind = ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def c64(value: int) -> ir.Value:
    kind = ir.IntegerType.get_signless(64)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def asm(text: str, operands: Sequence[ir.Value] = (), constraints: str = "") -> None:
    """Ordered with all accesses to memory: they must not move across a wait."""
    constraints = ",".join(filter(None, (constraints, "~{memory}")))
    llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=True)


def smem_address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def gmem_pointer(ref: ir.Value) -> ir.Value:
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(ref))
