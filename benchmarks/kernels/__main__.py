"""Measures everything there is about kernels, on the GPUs of this machine: `python -m benchmarks.kernels [--results DIR]`.

Each benchmark runs in a process of its own and appends its lines to DIR/NAME.jsonl; with benchmarks/results as DIR,
`python -m benchmarks.table` makes README's tables of them. `--models` names the checkpoints to run whole.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo" / "checkpoint"
BENCHMARKS = ("grouped_matmul", "sparse_attention", "indexer", "topk", "dense_attention", "layer")
CHECKED = ("grouped_matmul", "sparse_attention", "indexer", "topk")
# What takes minutes otherwise and changes nothing that is measured there: trying algorithms for XLA's own products.
UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
SETTINGS = {
    "layer": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "XLA_FLAGS": UNTUNED},
    "models": {"XLA_FLAGS": UNTUNED},
}


def device_count() -> int:
    """Counted in a process of its own, which gives their memory back."""
    count = [sys.executable, "-c", "import jax; print(len(jax.devices()))"]
    return int(subprocess.run(count, check=True, capture_output=True, text=True).stdout)


def runs(models: list[str], devices: int) -> list[tuple[str, list[str]]]:
    """(benchmark, its arguments): correctness first, then whole models, then speed."""
    found = [(name, ["--check"]) for name in CHECKED]
    found += [("models", ["--models", *models]), ("models", ["--fp8", "--models", *models[:1]])]
    if devices > 1:
        meshes = [f"{axis}={devices}" for axis in ("data", "tensor", "expert")]
        found.append(("models", ["--models", *models, "--meshes", *meshes]))
    return found + [(name, []) for name in BENCHMARKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, metavar="DIR", help="append what is measured to files there")
    parser.add_argument("--models", nargs="+", default=[str(DEMO)], metavar="FOLDER", help="default: the demo's")
    arguments = parser.parse_args()
    failed = []
    for name, options in runs(arguments.models, device_count()):
        command = [sys.executable, "-m", f"benchmarks.kernels.{name}", *options]
        if arguments.results:
            command += ["--results", str(arguments.results / f"{name}.jsonl")]
        print("$", *command[1:], flush=True)
        if subprocess.run(command, env={**os.environ, **SETTINGS.get(name, {})}, check=False).returncode:
            failed.append(" ".join([name, *options]))
    print("failed:", "; ".join(failed) if failed else "nothing")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
