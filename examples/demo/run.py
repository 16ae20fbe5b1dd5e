"""The whole way on a small trained model: convert, inspect, generate, fine-tune, interrupt, resume, export, compare.

Run with `make demo`, or `python -m examples.demo.run`. Writes to runs/demo only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import dsparse
from dsparse.checkpoints.convert import convert
from dsparse.evaluate import evaluate, read_tokens
from dsparse.inspect import inspect_checkpoint
from dsparse.tokenizer import Tokenizer

HERE = Path(__file__).parent
SOURCE, TEXT = HERE / "checkpoint", HERE / "text.txt"
OUTPUT = Path("runs/demo")
CONVERTED, RUN, EXPORT = OUTPUT / "converted", OUTPUT / "train", OUTPUT / "exported"
PROMPT = "So spake the Fiend, and with"
STEPS, STOP_AFTER = 40, 15


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def continuation(model: dsparse.Model, tokenizer: Tokenizer) -> str:
    tokens = np.asarray([tokenizer.encode(PROMPT)])
    return PROMPT + tokenizer.decode(dsparse.generate(model, tokens, max_new_tokens=24, stop_tokens=())[0].tolist())


def fine_tune() -> list[dict]:
    """Start a run, stop it with SIGTERM as a cluster would, go on from the saved state; the metrics of every step."""
    command = [
        sys.executable, "train.py", "--model", str(CONVERTED), "--data", str(TEXT), "--output-dir", str(RUN),
        "--steps", str(STEPS), "--batch-size", "8", "--sequence-length", "128", "--learning-rate", "1e-3",
        "--warmup-steps", "4", "--export-dir", str(EXPORT),
    ]  # fmt: skip
    metrics = RUN / "metrics.jsonl"
    first = subprocess.Popen(command)
    while first.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= STOP_AFTER):
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    if first.wait():
        raise SystemExit("demo: the training run failed")
    print(f"\n(stopped with SIGTERM after step {len(metrics.read_text().splitlines())}; now resuming)", flush=True)
    subprocess.run([*command, "--resume"], check=True)
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def largest_difference_to_transformers(folder: Path, tokens: np.ndarray) -> float:
    """Over the logits of the exported model, here and in transformers, both in float32."""
    import torch
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens).long()).logits.numpy()
    ours = np.asarray(dsparse.from_pretrained(folder, dtype="float32")(tokens))
    return float(np.abs(ours - expected).max())


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    started = time.perf_counter()

    heading("Convert the Hugging Face checkpoint")
    report = convert(SOURCE, CONVERTED, format="dsparse")
    print(report)

    heading("What is inside")
    print(inspect_checkpoint(CONVERTED))

    heading("Generate")
    tokenizer = Tokenizer(CONVERTED)
    model = dsparse.from_pretrained(CONVERTED, dtype="float32")
    before_text = continuation(model, tokenizer)
    print(before_text)
    text = read_tokens(str(TEXT), str(CONVERTED), model.config)
    before = evaluate(model, text, context_length=512, batch_size=2)

    heading(f"Fine-tune on Paradise Lost, Book IV ({len(text)} tokens), with an interruption")
    metrics = fine_tune()

    heading("Export and compare with transformers")
    tuned = dsparse.from_pretrained(EXPORT, dtype="float32")
    after = evaluate(tuned, text, context_length=512, batch_size=2)
    after_text = continuation(tuned, tokenizer)
    print(after_text)
    difference = largest_difference_to_transformers(EXPORT, text[None, :300])

    rows = [
        ("converted", f"{report.tensors} tensors, {report.bytes_read / 1e6:.1f} MB, in {report.seconds:.1f} s"),
        ("perplexity before fine-tuning", f"{before.perplexity:.2f}"),
        ("perplexity after fine-tuning", f"{after.perplexity:.2f}"),
        ("training loss, first and last step", f"{metrics[0]['loss']:.3f}, {metrics[-1]['loss']:.3f}"),
        ("steps (stopped and resumed)", f"{len(metrics)}"),
        ("export, largest logit difference to transformers", f"{difference:.1e}"),
        ("exported model", str(EXPORT)),
        ("time", f"{time.perf_counter() - started:.0f} s"),
    ]
    heading("Result")
    for name, value in rows:
        print(f"{name:50s} {value}")
    if not (after.perplexity < before.perplexity and difference < 1e-4 and len(metrics) == STEPS):
        raise SystemExit("demo: something above is not as it should be")


if __name__ == "__main__":
    main()
