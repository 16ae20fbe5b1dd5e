"""Time per token and peak memory of long prompts and of training on them: sparse attention beside dense.

python -m benchmarks.sparse_prefill [--paths selected,compressed,...] [--lengths 1024,2048,...] [--dense-up-to 16384]

Paths: "selected" (a lightning indexer picks tokens, DeepSeek-V3.2), "compressed" (a window and compressed entries, half
the layers picking them and half seeing all, DeepSeek-V4), "dense" (latent attention to everything), and "selected
gradient" and "compressed gradient" (of the mean cross-entropy, up to --gradient-up-to tokens in one row).
Every measurement is a process of its own, so its peak memory is its own, interpreter and compiler included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsparse
from dsparse.checkpoints.convert import peak_memory
from dsparse.training.loss import cross_entropy

LAYERS = 2
COMMON = {
    "num_hidden_layers": LAYERS, "hidden_size": 128, "num_attention_heads": 16, "q_lora_rank": 64, "index_topk": 64,
    "index_n_heads": 2, "index_head_dim": 16, "qk_rope_head_dim": 16, "max_position_embeddings": 1 << 15,
}  # fmt: skip
LATENT = COMMON | {
    "intermediate_size": 256, "mlp_layer_types": ["dense"] * LAYERS, "kv_lora_rank": 48, "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}  # fmt: skip
COMPRESSED = COMMON | {
    "head_dim": 64, "partial_rotary_factor": 0.25, "sliding_window": 64, "hc_mult": 2, "o_lora_rank": 64,
    "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"], "mlp_layer_types": ["moe"] * LAYERS,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
}  # fmt: skip
SHAPES = {
    "selected": ("deepseek_v32", LATENT | {"layer_types": ["indexed_attention"] * LAYERS}),
    "compressed": ("deepseek_v4", COMPRESSED),
    "dense": ("deepseek_v32", LATENT | {"layer_types": ["full_attention"] * LAYERS}),
}
PATHS = (*SHAPES, "selected gradient", "compressed gradient")
ROUNDS = 2


def seconds(path: str, length: int) -> float:
    """Of the fastest of some runs on `length` tokens, after a warm-up."""
    shape, _, gradient = path.partition(" ")
    family, options = SHAPES[shape]
    config = dsparse.ModelConfig.tiny(family, **options)
    graphdef, state = nnx.split(dsparse.Model(config, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 256, (1, length)).astype(np.int32)

    @jax.jit
    def prefill(state, tokens):
        model = nnx.merge(graphdef, state)
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        cache = model.init_cache(1, length)
        hidden, cache, _ = model.hidden_states(tokens, positions, cache=cache, empty_cache=True)
        return model.logits(hidden[:, -1]), cache

    @jax.jit
    def train(state, tokens):
        params, rest = nnx.split_state(state, nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            normed = model.norm(model.hidden_states(tokens)[0])
            weights = jnp.full(tokens.shape, 1 / length)
            return cross_entropy(normed, model.head_weight(), jnp.roll(tokens, -1, axis=1), weights)

        return jax.grad(loss)(params)

    run, times = train if gradient else prefill, []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(state, tokens))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(path: str, length: int) -> None:
    """Print one line."""
    taken = seconds(path, length)
    peak = peak_memory() / (1 << 30)
    print(f"{path:20s} {length:7d} {1e6 * taken / length:9.1f} {taken:8.2f} {peak:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", default=",".join(PATHS))
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--dense-up-to", type=int, default=16384, help="more takes minutes (default: 16384)")
    parser.add_argument("--gradient-up-to", type=int, default=8192)
    parser.add_argument("--one", action="store_true", help="measure here, without header and processes")
    arguments = parser.parse_args()
    paths, lengths = arguments.paths.split(","), [int(n) for n in arguments.lengths.split(",")]
    if arguments.one:
        measure(paths[0], lengths[0])
        return
    print(
        f"{LAYERS} layers, {COMMON['num_attention_heads']} heads, top-{COMMON['index_topk']}, float32, {os.cpu_count()}"
    )
    print(f"cores, jax {jax.__version__}; microseconds a token, seconds, peak memory of the process")
    print(f"{'path':20s} {'tokens':>7s} {'us/token':>9s} {'total s':>8s} {'peak GiB':>9s}", flush=True)
    for path in paths:
        limit = {"dense": arguments.dense_up_to}.get(path, arguments.gradient_up_to if " " in path else max(lengths))
        for length in lengths:
            if length <= limit:
                command = [sys.executable, "-m", "benchmarks.sparse_prefill", "--one", "--paths", path]
                subprocess.run([*command, "--lengths", str(length)], check=True)


if __name__ == "__main__":
    main()
