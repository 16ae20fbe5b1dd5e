"""Timing and error measures shared by the kernel benchmarks."""

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np


def milliseconds(call: Callable[[], object], synchronize: Callable[[object], object], *, repeats: int = 5) -> float:
    """Median over batches of the mean time of a call, calls of a batch queued one behind the other."""
    synchronize(call())
    start = time.perf_counter()
    synchronize(call())
    calls = max(3, min(100, int(0.05 / (time.perf_counter() - start))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        synchronize(result)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def jax_milliseconds(function: Callable, *args: jax.Array) -> float:
    compiled = jax.jit(function).lower(*args).compile()
    return milliseconds(lambda: compiled(*args), jax.block_until_ready)


def torch_milliseconds(function: Callable[[], object]) -> float:
    import torch

    return milliseconds(function, lambda _: torch.cuda.synchronize())


def to_torch(x: jax.Array):
    """The same memory as a torch tensor."""
    import torch

    return torch.from_dlpack(x)


def relative_error(value: jax.Array, reference: jax.Array | np.ndarray) -> float:
    """Norm of the difference over the norm of the reference, in float64; NaN anywhere gives NaN."""
    value, reference = (np.asarray(x.astype(np.float32)).astype(np.float64) for x in (value, reference))
    return float(np.linalg.norm(value - reference) / max(np.linalg.norm(reference), 1e-30))


def versions() -> str:
    device = jax.devices()[0]
    names = [f"jax {jax.__version__}"]
    try:
        import torch

        names.append(f"torch {torch.__version__}")
    except ImportError:
        pass
    return f"# {device.device_kind}, {', '.join(names)}"
