"""A whole layer of DeepSeek-V3.2's shape on a Hopper GPU: `python -m benchmarks.kernels.layer [--lengths 8192 32768]`.

Embedding, indexed attention (128 heads, top-2048) and mixture of experts (256, 8 a token) in bfloat16: the forward pass,
and forward with the gradients of all weights, on kernels and on plain XLA. One sequence of random tokens, random weights.
The program's memory is printed: up to 72 GiB, so start with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, and with
XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" if tuning the dense products takes too long.
"""

import argparse
import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsparse
from benchmarks.kernels import measure
from dsparse import dispatch

SHAPE = {
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 1024, "hidden_size": 7168, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "n_shared_experts": 1, "max_position_embeddings": 65536,
}  # fmt: skip
GIB = 1 << 30
WORK = ("forward", "forward and backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed. work: "forward" or "forward and backward"."""

    length: int
    work: str
    implementation: str
    experts: int


def model_of(experts: int) -> dsparse.Model:
    """Without values."""
    config = dsparse.ModelConfig.tiny("deepseek_v32", **SHAPE, n_routed_experts=experts)
    dtype = jnp.dtype("bfloat16")
    return nnx.eval_shape(lambda: dsparse.Model(config, rngs=nnx.Rngs(0), dtype=dtype))


def random_state(model: dsparse.Model) -> nnx.State:
    """One random matrix for all experts: there are more weights than a random stream has numbers."""

    @jax.jit
    def values():
        filled = []
        for number, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model))):
            matrix = variable.shape[-2:] if variable.ndim > 2 else variable.shape
            value = 0.02 * jax.random.normal(jax.random.key(number), matrix) + ("norm" in str(path))
            filled.append((path, variable.replace(jnp.broadcast_to(value, variable.shape).astype(variable.dtype))))
        return nnx.from_flat_state(filled)

    return values()


def compiled(case: Case):
    """The program, and how many GiB it needs; or None and why not."""
    graphdef, params, rest = nnx.split(model_of(case.experts), nnx.Param, ...)

    def hidden(params, rest, tokens):
        return nnx.merge(graphdef, params, rest).hidden_states(tokens)[0]

    def loss(params, rest, tokens):
        return jnp.mean(hidden(params, rest, tokens).astype(jnp.float32) ** 2)

    run = hidden if case.work == "forward" else jax.value_and_grad(loss)
    tokens = jax.ShapeDtypeStruct((1, case.length), jnp.int32)
    with dispatch.prefer(case.implementation):
        program = jax.jit(run).lower(params, rest, tokens).compile()
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return program, needed / GIB


def time_case(case: Case, program, needed: float, records: measure.Records) -> None:
    figures = {"experts": case.experts, "gib": needed}
    params, rest = nnx.split_state(random_state(model_of(case.experts)), nnx.Param, ...)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (1, case.length)), jnp.int32)
    try:
        repeats = 1 if case.implementation == "xla" else 3  # seconds a call
        figures["ms"] = measure.milliseconds(
            lambda: jax.tree.leaves(program(params, rest, tokens))[0],  # no two sets of gradients at once
            jax.block_until_ready,
            repeats=repeats,
        )
    except jax.errors.JaxRuntimeError as error:
        figures["ms"], figures["failed"] = None, str(error).splitlines()[0][:200]
    records.add(f"{case.length} tokens, {case.work}, {case.implementation}", **figures)


def main() -> None:
    parser = measure.parser(__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--only", nargs="+", choices=("mosaic_gpu", "xla"), default=["mosaic_gpu", "xla"])
    arguments = parser.parse_args()
    records = measure.Records("layer", arguments.results)
    cases = [
        Case(length, work, implementation, arguments.experts)
        for work in arguments.work
        for length in arguments.lengths
        for implementation in arguments.only
    ]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        programs = {case: pool.submit(compiled, case) for case in cases}
        for case in cases:
            time_case(case, *programs.pop(case).result(), records)
    print("\n".join(f"{op} is served by {name} {why}" for (op, name), why in dispatch.served.items()))


if __name__ == "__main__":
    main()
