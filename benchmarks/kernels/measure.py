"""Timing, error measures and records shared by the kernel benchmarks."""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np


def parser(description: str) -> argparse.ArgumentParser:
    """With the option that every kernel benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, metavar="FILE", help="append what is measured, a JSON line each")
    return parser


class Records:
    """What a benchmark measures: printed, and appended as JSON lines to a file.

    `benchmarks/results/*.jsonl` keeps such lines; `benchmarks.table` makes README's tables of the newest of each case.
    """

    def __init__(self, benchmark: str, file: Path | None):
        self.benchmark, self.file = benchmark, file
        print("#", ", ".join(environment().values()), flush=True)

    def add(self, case: str, **figures: float | str | bool | None) -> None:
        """figures: by name and unit, such as ms=0.34, tflops=544, torch_ms=0.94, passed=True."""
        print(f"{case}:", ", ".join(f"{name} {_short(value)}" for name, value in figures.items()), flush=True)
        if self.file:
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            line = {"benchmark": self.benchmark, "case": case, **figures, "date": date, **environment()}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _short(value: float | str | bool | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def environment() -> dict[str, str]:
    """The device, and the versions of what runs on it."""
    found = {"device": jax.devices()[0].device_kind, "jax": f"jax {jax.__version__}"}
    try:
        import torch

        found["torch"] = f"torch {torch.__version__}"
    except ImportError:
        pass
    return found
