"""What the kernels need from Pallas Mosaic GPU and what differs between its versions, in one place.

Mosaic GPU is the only Pallas backend that reaches Hopper's wgmma, TMA and asynchronous barriers. It changes between
jax minors (0.11.2 to 0.12 are supported), so kernels take anything that moved from here.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

SWIZZLE_BYTES = 128
SIXTEEN_BITS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))  # what wgmma and cp.async treat alike

_assume_hopper = False


@contextlib.contextmanager
def assume_hopper() -> Iterator[None]:
    """Lets kernels be traced where no Hopper GPU is present: to compile for one ahead of time, or to interpret."""
    global _assume_hopper
    before, _assume_hopper = _assume_hopper, True
    try:
        yield
    finally:
        _assume_hopper = before


def require_hopper() -> None:
    """Raises NotImplementedError with a one-line reason unless the default device is a Hopper GPU (sm_90)."""
    if _assume_hopper:
        return
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise NotImplementedError(f"Mosaic GPU kernels need a Hopper GPU, and the default device is {device.platform}")
    capability = str(getattr(device, "compute_capability", ""))
    if capability != "9.0":
        raise NotImplementedError(
            f"Mosaic GPU kernels need compute capability 9.0 (Hopper), and {device.device_kind} has {capability}"
        )


def swizzled(dtype) -> tuple:
    """The transforms of an SMEM tile that wgmma reads: rows of 8, 128 bytes wide, 128-byte swizzle."""
    return (
        plgpu.TilingTransform((8, SWIZZLE_BYTES // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(SWIZZLE_BYTES),
    )


def interpret_params(detect_races: bool = True) -> plgpu.InterpretGPUParams:
    """The `interpret=` argument that runs a kernel on the CPU; an unordered access to shared memory raises."""
    return plgpu.InterpretGPUParams(detect_races=detect_races)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return cdiv(a, b) * b


def num_multiprocessors() -> int:
    """Of the default device, for kernels that run one block on each; of an H100 where there is none."""
    return int(getattr(jax.devices()[0], "core_count", 0) or 132)
