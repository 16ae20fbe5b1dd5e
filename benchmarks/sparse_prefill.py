"""Time per token of long prefills: attention over selected tokens, beside dense attention of the same shape.

python -m benchmarks.sparse_prefill [--lengths 2048,4096,...] [--dense-up-to 16384]

Beyond index_topk the selected path's work per token grows only by the indexer's scores, the dense path's by every head.
Also prints the peak memory of the process after each length, sparse lengths first.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx

import dsparse

SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "mlp_layer_types": ["dense", "dense"],
    "num_attention_heads": 16, "kv_lora_rank": 48, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 16, "max_position_embeddings": 1 << 15,
}  # fmt: skip
ROUNDS = 2


def seconds(kind: str, length: int) -> float:
    """Of the fastest of some prefills of `length` tokens into an empty cache, after a warm-up."""
    config = dsparse.ModelConfig.tiny("deepseek_v32", **SHAPE, layer_types=[kind] * SHAPE["num_hidden_layers"])
    graphdef, state = nnx.split(dsparse.Model(config, rngs=nnx.Rngs(0)))

    @jax.jit
    def prefill(state, tokens):
        model = nnx.merge(graphdef, state)
        positions = jax.numpy.broadcast_to(jax.numpy.arange(length), tokens.shape)
        cache = model.init_cache(1, length)
        hidden, cache, _ = model.hidden_states(tokens, positions, cache=cache, empty_cache=True)
        return model.logits(hidden[:, -1]), cache

    tokens = np.random.default_rng(0).integers(0, 256, (1, length)).astype(np.int32)
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        jax.block_until_ready(prefill(state, tokens))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--dense-up-to", type=int, default=8192, help="more takes gigabytes (default: 8192)")
    arguments = parser.parse_args()
    lengths = [int(n) for n in arguments.lengths.split(",")]
    layers, heads = SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"]
    print(f"{layers} layers, {heads} heads, top-{SHAPE['index_topk']}, float32,")
    print(f"{os.cpu_count()} cores, jax {jax.__version__}; microseconds a token, peak memory of the process so far")
    print(f"{'path':18s} {'tokens':>7s} {'us/token':>9s} {'total s':>8s} {'peak GiB':>9s}")
    for kind in ("indexed_attention", "full_attention"):
        for length in lengths:
            if kind == "full_attention" and length > arguments.dense_up_to:
                continue
            taken = seconds(kind, length)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
            print(f"{kind:18s} {length:7d} {1e6 * taken / length:9.1f} {taken:8.2f} {peak:9.2f}", flush=True)


if __name__ == "__main__":
    main()
