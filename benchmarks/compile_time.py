"""Compile time against depth: a 61-layer tiny-width DeepSeek-V3 config beside a 6-layer one.

python -m benchmarks.compile_time
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx

import dsparse

DEPTHS = (6, 61)


def programs(depth: int):
    """The forward pass, the gradient and one decode step of a model of `depth` layers, ready to compile."""
    config = dsparse.ModelConfig.tiny("deepseek_v3", num_hidden_layers=depth, first_k_dense_replace=3)
    model = nnx.eval_shape(lambda: dsparse.Model(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    cache = jax.eval_shape(lambda: nnx.merge(graphdef, state).init_cache(1, 128))
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def logits(params, rest, tokens):
        model = nnx.merge(graphdef, params, rest)
        return model.logits(model.hidden_states(tokens)[0])

    def decode(params, rest, tokens, cache):
        model = nnx.merge(graphdef, params, rest)
        hidden, cache, _ = model.hidden_states(tokens, jnp.zeros((1, 1), jnp.int32), cache=cache)
        return model.logits(hidden), cache

    gradient = jax.grad(lambda *args: logits(*args).sum())
    return {
        "forward": (logits, (params, rest, tokens)),
        "gradient": (gradient, (params, rest, tokens)),
        "decode": (decode, (params, rest, jax.ShapeDtypeStruct((1, 1), jnp.int32), cache)),
    }


def compile_seconds(depth: int) -> dict[str, float]:
    """Tracing, lowering and compiling, the fastest of three."""
    result = {}
    for name, (function, arguments) in programs(depth).items():
        times = []
        for _ in range(3):
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(function).lower(*arguments).compile()
            times.append(time.perf_counter() - start)
        result[name] = min(times)
    return result


def main() -> None:
    shallow, deep = (compile_seconds(depth) for depth in DEPTHS)
    print(f"{'program':10s} {DEPTHS[0]:>4d} layers {DEPTHS[1]:>4d} layers  ratio")
    for name in shallow:
        print(f"{name:10s} {shallow[name]:9.2f} s {deep[name]:9.2f} s {deep[name] / shallow[name]:6.2f}")


if __name__ == "__main__":
    main()
