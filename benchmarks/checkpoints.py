"""Loading and converting a large synthetic checkpoint: time against reading its files, and peak memory.

    python -m benchmarks.checkpoints [--dir FOLDER] [--gigabytes 6.4] [--runs 3]

Every measurement is a process of its own, started with none of the files in the page cache. The peak is the process's
largest resident memory. Each timing stands beside reading the same files from start to end, measured right before it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from dsparse.checkpoints.mapping import layout_of
from dsparse.checkpoints.plan import model_parameters
from dsparse.checkpoints.saving import exports_of, shard, shard_names, write_index, write_shard
from dsparse.config import ModelConfig
from dsparse.model import Model
from dsparse.origin import Origin

RESULTS = Path(__file__).parent / "results" / "checkpoints.md"

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 32768, "hidden_size": 1024,
    "intermediate_size": 4096, "moe_intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16,
    "kv_lora_rank": 256, "q_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 8, "topk_group": 4,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "max_position_embeddings": 4096, "dtype": "bfloat16",
    "torch_dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A DeepSeek-V3 checkpoint of 64 experts with random bf16 weights, in 2 GB files."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    layer = (64 + 1) * 3 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"] * 2
    config = CONFIG | {"num_hidden_layers": 1 + round(gigabytes * 1e9 / layer)}
    parsed = ModelConfig.from_huggingface(config)
    abstract = nnx.eval_shape(lambda: Model(parsed, rngs=nnx.Rngs(0), param_dtype=bfloat16))
    exports = exports_of(layout_of(parsed), Origin(), model_parameters(nnx.state(abstract), abstract.runs, parsed))
    noise = {
        dtype: (np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02).astype(dtype)
        for dtype in (bfloat16, np.dtype(np.float32))
    }
    shards = shard(exports, 2_000_000_000)
    folder.mkdir(parents=True)
    for name, part in zip(shard_names(len(shards)), shards, strict=True):
        write_shard(folder / name, part, lambda export: np.resize(noise[export.dtype], export.shape))
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(config))


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 1 << 20)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for file in weight_files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_sequentially(folder: Path) -> tuple[float, int]:
    """Seconds and bytes of reading every weight file from start to end."""
    forget(folder)
    buffer, total, started = bytearray(16 << 20), 0, time.perf_counter()
    for file in weight_files(folder):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return time.perf_counter() - started, total


ACTIONS = {
    "load": "import dsparse, jax; jax.devices(); start(); stop(dsparse.from_pretrained({source!r}))",
    "convert": (
        "import dsparse, jax; jax.devices(); from dsparse.checkpoints.convert import convert; start(); "
        "convert({source!r}, {destination!r}, progress=False); stop()"
    ),
    "transformers": (
        "import torch, transformers; start(); "
        "model = transformers.AutoModelForCausalLM.from_pretrained({source!r}, dtype='auto'); stop()"
    ),
}

PRELUDE = """
import json, resource, time
def start():
    global began; began = time.perf_counter()
def stop(model=None):
    seconds, arrays = time.perf_counter() - began, 0
    if model is not None:
        import jax; from flax import nnx
        arrays = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({'seconds': seconds, 'peak': peak, 'arrays': arrays}))
"""


def measure(action: str, source: Path, destination: Path | None = None) -> dict[str, float]:
    """Run one action in a fresh process on a cold page cache: seconds, peak bytes, bytes of the arrays loaded."""
    forget(source)
    code = PRELUDE + ACTIONS[action].format(source=str(source), destination=str(destination))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{action} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, action: str, source: Path, destination: Path | None, runs: int) -> dict[str, float | str]:
    """Medians over `runs` of an action and of reading its source, taken in turns."""
    reads, results, size = [], [], 0
    for _ in range(runs):
        if destination is not None:
            shutil.rmtree(destination, ignore_errors=True)
        seconds, size = read_sequentially(source)
        reads.append(seconds)
        results.append(measure(action, source, destination))
        last = results[-1]
        print(f"{name}: read {seconds:.1f} s, {last['seconds']:.1f} s, peak {last['peak'] / 2**30:.2f} GiB", flush=True)
    return {
        "name": name, "gigabytes": size / 1e9, "read": statistics.median(reads),
        "seconds": statistics.median(r["seconds"] for r in results),
        "ratio": statistics.median(r["seconds"] / s for r, s in zip(results, reads, strict=True)),
        "peak": max(r["peak"] for r in results), "arrays": results[-1]["arrays"],
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [
        "| what | files GB | reading them s | took s | ratio | peak GiB | peak less arrays GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        beyond = f"{(r['peak'] - r['arrays']) / 2**30:.2f}" if r["arrays"] else ""
        lines.append(
            f"| {r['name']} | {r['gigabytes']:.2f} | {r['read']:.1f} | {r['seconds']:.1f} | {r['ratio']:.2f} "
            f"| {r['peak'] / 2**30:.2f} | {beyond} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to put the files (default: the system's temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=6.4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="measure only rows whose names contain one of these words")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsparse-checkpoints-", dir=args.dir) as folder:
        source, ours, back = (Path(folder) / name for name in ("source", "native", "back"))
        print(f"writing {args.gigabytes} GB ...", flush=True)
        make_checkpoint(source, args.gigabytes)
        plan = [
            ("from_pretrained, Hugging Face files", "load", source, None),
            ("convert to dsparse", "convert", source, ours),
            ("from_pretrained, dsparse files", "load", ours, None),
            ("convert to Hugging Face", "convert", ours, back),
            ("transformers from_pretrained", "transformers", source, None),
        ]
        wanted = [row for row in plan if not args.only or any(word in row[0] for word in args.only)]
        rows = [compare(*row, args.runs) for row in wanted]
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
    text = f"{table(rows)}\n\n{datetime.date.today()}, {machine}, load average {os.getloadavg()[2]:.1f} besides. "
    text += f"Medians of {args.runs}; the cache is dropped before each.\n"
    print("\n" + text)
    if not args.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(f"# Checkpoints of {args.gigabytes} GB, 64 experts, bf16\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
