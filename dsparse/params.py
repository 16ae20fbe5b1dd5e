"""Declaring parameters: shape, logical axes and initialiser stand together where a parameter is created.

Modules are built through a `Scope`, which knows the path (Hugging Face's name of the tensor inside its layer), the
leading axes of a stack of scanned layers, and the dtype each tensor is stored in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)
PACKED_FP4 = jnp.int8  # two e2m1 values a byte, the low nibble first
QUANTIZED = (*FLOAT8, PACKED_FP4)  # stored weights that mean something only with their scales
FP4_BLOCK = 32  # packed FP4 weights carry one scale for 32 values of a row (DeepSeek-V4's experts)
FP8_BLOCK = 128  # DeepSeek's FP8 weights carry one scale for each 128x128 block (V3 report, section 3.3.2)


class Buffer(nnx.Variable):
    """State that is saved with the parameters but that no gradient reaches."""


def normal(stddev: float):
    return jax.nn.initializers.normal(stddev)


zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where a module creates its parameters.

    path: dotted prefix inside the layer, such as "self_attn.q_a_proj".
    stack: number of scanned layers; every parameter gets this leading axis, named "layers" (None: no stack).
    dtype: of floating-point parameters that `storage` does not name.
    storage: stored dtypes by path, read from a checkpoint. A parameter that is stored in 8 bits gets a companion
        `<path>_scale_inv` with one scale per 128x128 block; stored in packed FP4, its last axis is half as long and
        it gets one scale per 32 values of a row.
    """

    rngs: nnx.Rngs
    dtype: jnp.dtype
    path: str = ""
    stack: int | None = None
    storage: Mapping[str, jnp.dtype] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Scope:
        return dataclasses.replace(self, path=f"{self.path}.{name}" if self.path else name)

    def stored_dtype(self, name: str) -> jnp.dtype:
        return jnp.dtype(self.storage.get(self[name].path, self.dtype))

    def param(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        init,
        dtype=None,
        minimum=None,
        kind=nnx.Param,
    ) -> nnx.Variable:
        """A parameter of the given shape; `axes` are logical axis names (`dsparse.sharding.RULES`).

        minimum: precision below which it is not kept when the model's dtype decides.
        """
        assert len(shape) == len(axes), f"{self[name].path}: {len(shape)} dimensions, {len(axes)} axis names"
        if self.stack is not None:
            shape, axes = (self.stack, *shape), ("layers", *axes)
        dtype = dtype or self.stored_dtype(name)
        if dtype == PACKED_FP4:
            shape = (*shape[:-1], shape[-1] // 2)
        if minimum is not None and self[name].path not in self.storage:
            dtype = jnp.promote_types(dtype, minimum)
        return kind(init(self.rngs.params(), shape, jnp.float32).astype(dtype), axes=axes)

    def scale_inv(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param | None:
        """The block scales of parameter `name` when it is stored in 8 or 4 bits, else None."""
        stored = self.stored_dtype(name)
        if stored not in QUANTIZED:
            return None
        *lead, rows, columns = shape
        if stored == PACKED_FP4:
            blocks = (*lead, rows, -(-columns // FP4_BLOCK))
        else:
            blocks = (*lead, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        dtype = self.storage.get(self[name].path + "_scale_inv", jnp.float32)
        return self.param(f"{name}_scale_inv", blocks, axes, ones, dtype=dtype)
