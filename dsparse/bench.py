"""`dsparse bench`: how fast a model generates and reads on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dsparse.generation import generate
from dsparse.model import Model

PROMPT, NEW = 1024, 128


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time of `run` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def bench(model: Model) -> dict[str, float]:
    """Tokens a second of prefill (one prompt of 1024) and of greedy decoding behind it (batch 1 and 8)."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, PROMPT))
    result = {}
    for batch in (1, 8):
        first, whole = (
            seconds(lambda n=new, rows=tokens[:batch]: generate(model, rows, max_new_tokens=n, stop_tokens=()))
            for new in (1, NEW)
        )
        result[f"prefill_tokens_per_s_b{batch}"] = batch * PROMPT / first
        result[f"decode_tokens_per_s_b{batch}"] = batch * (NEW - 1) / (whole - first)
    return result
