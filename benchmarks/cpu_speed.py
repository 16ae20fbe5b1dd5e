"""Decode, prefill and a training step on CPU, float32, beside transformers on the same weights, in one run.

python -m benchmarks.cpu_speed [--model FOLDER] [--data TOKENS.npy]

The two take turns, and the fastest of several runs of each counts: on a shared machine the others measure the
neighbours. Also prints what bounds each: for decoding, the bytes of the weights and cache that one token must read over
the bandwidth this machine reaches; for the rest, the operations of its products over the rate that one large product
reaches here.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsparse
from dsparse.config import ModelConfig
from dsparse.evaluate import read_tokens
from dsparse.inspect import attention_flops, describe
from dsparse.training import TrainConfig, make_train_step
from dsparse.training.data import Batch

DEMO = Path(__file__).parent.parent / "examples" / "demo"
NEW, PREFILL, BATCH, LENGTH = 64, 1024, 4, 512


def fastest(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds of the fastest of `rounds` runs of each, in turn, after a warm-up."""
    times = [[], []]
    for round_number in range(rounds + 1):
        for run, seconds in zip((ours, theirs), times, strict=True):
            time.sleep(0.2)  # threads of the other that still spin, waiting for work, would share the cores
            start = time.perf_counter()
            run()
            if round_number:
                seconds.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def read_bandwidth() -> float:
    """Bytes a second at which this machine reads an array far larger than its caches."""
    array = jnp.ones(1 << 28, jnp.float32)
    total = jax.jit(jnp.sum)
    seconds, _ = fastest(lambda: total(array).block_until_ready(), lambda: None, 5)
    return array.nbytes / seconds


def active_bytes(model: dsparse.Model, context: int) -> int:
    """Bytes one decoded token must read: its experts' weights, everything else but the embedding, and its cache."""
    config, total = model.config, 0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        share = config.num_experts_per_tok / config.n_routed_experts if "experts" in path else 1.0
        if path[0] not in ("embed_tokens", "mtp") or (path[0] == "embed_tokens" and config.tie_word_embeddings):
            total += variable[...].nbytes * share
    shapes = jax.eval_shape(lambda: model.init_cache(1, context))
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return int(total + cache)


def product_rate() -> float:
    """Operations a second of one large float32 product."""
    size = 2048
    a = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jax.jit(lambda a: a @ a)
    seconds, _ = fastest(lambda: multiply(a).block_until_ready(), lambda: None, 10)
    return 2 * size**3 / seconds


def product_flops(model: dsparse.Model, length: int) -> tuple[int, int]:
    """Operations, a multiply-add counting two, of all products with weights in a forward pass over one sequence, without
    the head's; and of scores and values at every position."""
    config = model.config
    weights = describe(model).active_parameters - config.vocab_size * config.hidden_size
    attention = sum(attention_flops(config, spec, end) for spec in config.layers for end in range(1, length + 1))
    return 2 * weights * length, attention


def floors(model: dsparse.Model) -> tuple[int, int]:
    """Operations of the prefill, and of the training step.

    Backward passes take twice the forward's products with weights, and five products for attention's two
    (FlashAttention-2, arXiv:2307.08691, section 4.1).
    """
    prefill_flops = sum(product_flops(model, PREFILL))
    weights, attention = product_flops(model, LENGTH)
    weights += 2 * model.config.vocab_size * model.config.hidden_size * LENGTH
    return prefill_flops, int(BATCH * (3 * weights + 3.5 * attention))


def decode(model, reference, tokens: np.ndarray) -> tuple[float, float]:
    """Seconds a token of greedy decoding behind 256 tokens: time of many tokens less the time of one."""
    import torch

    prompt = tokens[None, :256]

    def ours(new: int):
        return lambda: dsparse.generate(model, prompt, max_new_tokens=new, stop_tokens=())

    @torch.no_grad()
    def theirs_of(new: int):
        reference.generate(torch.tensor(prompt).long(), max_new_tokens=new, do_sample=False, eos_token_id=None)

    many = fastest(ours(NEW + 1), lambda: theirs_of(NEW + 1), 8)
    one = fastest(ours(1), lambda: theirs_of(1), 8)
    return tuple((a - b) / NEW for a, b in zip(many, one, strict=True))


def prefill(model, reference, tokens: np.ndarray) -> tuple[float, float]:
    """Seconds to read a prompt of 1024 into the cache and give the first token."""
    import torch

    prompt = tokens[None, :PREFILL]

    @torch.no_grad()
    def theirs():
        reference(torch.tensor(prompt).long(), use_cache=True, logits_to_keep=1)

    return fastest(lambda: dsparse.generate(model, prompt, max_new_tokens=1, stop_tokens=()), theirs, 12)


def training_step(folder: Path, reference, tokens: np.ndarray) -> tuple[float, float]:
    """Seconds of one AdamW update on 4 rows of 512 tokens."""
    import torch

    rows = tokens[: BATCH * (LENGTH + 1)].reshape(BATCH, LENGTH + 1)
    config = TrainConfig(model=str(folder), data=("-",), batch_size=BATCH, sequence_length=LENGTH, learning_rate=1e-6)
    state, step = make_train_step(dsparse.from_pretrained(folder, dtype="float32"), config)
    batch = Batch(rows[:, :-1], rows[:, 1:], np.ones((BATCH, LENGTH), np.float32), np.ones((BATCH, LENGTH), np.int32))
    reference.train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-6)
    inputs = torch.tensor(rows[:, :-1]).long()

    def ours():
        nonlocal state
        state, metrics = step(state, batch)
        float(metrics["loss"])

    def theirs():
        optimizer.zero_grad()
        loss = reference(inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()

    return fastest(ours, theirs, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO / "checkpoint")
    parser.add_argument("--data", default=str(DEMO / "text.txt"))
    arguments = parser.parse_args()
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokens = read_tokens(arguments.data, str(arguments.model), ModelConfig.from_huggingface(arguments.model))
    model = dsparse.from_pretrained(arguments.model, dtype="float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"{arguments.model.name} ({model.config.model_type}), float32, {os.cpu_count()} x {platform.processor() or platform.machine()}, {versions}"
    )
    print(f"{'work':30s} {'dsparse':>12s} {'transformers':>14s} {'ratio':>7s}")
    rows = (
        ("greedy decode, ms a token", decode(model, reference, tokens)),
        (f"prefill of {PREFILL}, ms", prefill(model, reference, tokens)),
        (f"training step {BATCH}x{LENGTH}, ms", training_step(arguments.model, reference, tokens)),
    )
    for name, (ours, theirs) in rows:
        print(f"{name:30s} {ours * 1e3:12.2f} {theirs * 1e3:14.2f} {theirs / ours:7.2f}")
    bandwidth, needed = read_bandwidth(), active_bytes(model, 256 + NEW)
    print(f"{'what bounds it':30s} {'floor, ms':>12s} {'dsparse':>14s} {'transformers':>14s}")
    rate, flops = product_rate(), floors(model)
    bounds = [needed / bandwidth, *(count / rate for count in flops)]
    for (name, (ours, theirs)), bound in zip(rows, bounds, strict=True):
        print(f"{name:30s} {bound * 1e3:12.2f} {ours / bound:13.2f}x {theirs / bound:13.2f}x")
    print(
        f"decode reads {needed / 1e6:.1f} MB a token at {bandwidth / 1e9:.1f} GB/s; prefill and training step multiply "
        f"{flops[0] / 1e9:.1f} and {flops[1] / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
