"""Grouped matmul on the H100 beside torch's: `python -m benchmarks.kernels.grouped_matmul [--check]`."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import measure
from benchmarks.kernels.poison import poison_free_memory
from dsparse.kernels import grouped_matmul as gm
from dsparse.kernels import grouped_matmul_quantized as quantized

# groups, rows, depth, width; the last: a step of decoding, which is as fast as it reads weights
SHAPES = [
    (256, 65536, 7168, 2048),
    (256, 65536, 2048, 7168),
    (64, 49152, 2048, 1408),
    (64, 49152, 1408, 2048),
    (256, 1024, 7168, 2048),
]


def sizes_of(groups: int, rows: int, kind: str, seed: int = 0) -> np.ndarray:
    """int32 group sizes that sum to `rows`: even, routed (multinomial), or skewed (half the groups empty)."""
    rng = np.random.default_rng(seed)
    if kind == "even":
        return np.full(groups, rows // groups, np.int32)
    weights = np.ones(groups) if kind == "routed" else rng.pareto(1.0, groups) * (rng.random(groups) < 0.5) + 1e-9
    return rng.multinomial(rows, weights / weights.sum()).astype(np.int32)


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0, dtype=jnp.bfloat16) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape, dtype) * scale).astype(dtype)


def groups_of(sizes: np.ndarray):
    for group, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        yield group, slice(end - size, end)


def reference(x, weights, sizes, dy):
    """In float32, one dense product a group: out, d_x, d_weights."""
    out, d_x, d_weights = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(weights)
    for group, rows in groups_of(sizes):
        out[rows] = x[rows] @ weights[group].T
        d_x[rows] = dy[rows] @ weights[group]
        d_weights[group] = dy[rows].T @ x[rows]
    return out, d_x, d_weights


def swiglu_reference(x, weights, sizes, dy):
    gate, up = (reference(x, weights[:, i], sizes, dy)[0] for i in range(2))
    sigmoid = 1 / (1 + np.exp(-gate))
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    _, d_x_gate, d_w_gate = reference(x, weights[:, 0], sizes, d_gate)
    _, d_x_up, d_w_up = reference(x, weights[:, 1], sizes, dy * gate * sigmoid)
    return gate * sigmoid * up, d_x_gate + d_x_up, np.stack([d_w_gate, d_w_up], axis=1)


def run_product(function, sizes, x, weights):
    return function(x, weights, sizes)


def check(chosen: list[int]) -> None:
    cases = [
        (2, 512, 256, 256, "routed", 0, jnp.bfloat16),
        (8, 1000, 512, 512, "routed", 37, jnp.bfloat16),
        (8, 1001, 192, 320, "skewed", 5, jnp.bfloat16),
        (64, 4096, 256, 1408, "skewed", 0, jnp.bfloat16),
        (256, 2048, 128, 256, "skewed", 99, jnp.bfloat16),
        (512, 5000, 128, 128, "routed", 1, jnp.bfloat16),
        (4, 3, 256, 256, "routed", 1, jnp.bfloat16),
        (3, 2000, 1408, 576, "routed", 300, jnp.bfloat16),
        (64, 4096, 256, 1408, "skewed", 7, jnp.float16),
        (8, 1001, 192, 320, "routed", 5, jnp.float16),
    ]
    for case, (groups, rows, depth, width, kind, tail, dtype) in enumerate(cases):
        if chosen and case not in chosen:
            continue
        sizes = sizes_of(groups, rows - tail, kind, case)
        x = normal(case, (rows, depth), dtype=dtype)
        x = x.at[rows - tail :].set(jnp.nan)
        dy = normal(case + 100, (rows, width), dtype=dtype)
        for name, function, reference_function, shape in (
            ("matmul", gm.grouped_matmul, reference, (groups, width, depth)),
            ("swiglu", gm.grouped_swiglu, swiglu_reference, (groups, 2, width, depth)),
        ):
            weights = normal(case + 200, shape, depth**-0.5, dtype)
            poison_free_memory()
            out, pull = jax.vjp(functools.partial(run_product, function, jnp.asarray(sizes)), x, weights)
            got = out, *pull(dy)
            plain = (np.asarray(a.astype(jnp.float32)) for a in (jnp.nan_to_num(x), weights))
            want = reference_function(*plain, sizes, np.asarray(dy.astype(jnp.float32)))
            errors = [measure.relative_error(a, b) for a, b in zip(got, want, strict=True)]
            d_w = got[2]
            exact = not out[rows - tail :].any() and not d_w[np.flatnonzero(sizes == 0)].any()
            ok = exact and all(e < (6e-3 if dtype == jnp.bfloat16 else 1e-3) for e in errors)
            label = f"{name} {groups}x{rows}x{depth}x{width} {kind} {tail} {x.dtype.name}"
            print(f"check {label}:", *(f"{e:.1e}" for e in errors), ok)
            assert ok
    for case, shape in enumerate([(8, 1000, 512, 256), (64, 4103, 256, 384), (128, 700, 512, 256)], start=len(cases)):
        if not chosen or case in chosen:
            check_quantized(*shape)


def dgrad(dy, weights, sizes):
    return gm._rows_times_weights(dy, weights, sizes, False, transposed=True)


def inputs(groups: int, rows: int, depth: int, width: int) -> dict[str, tuple]:
    """Arguments of each product but for the group sizes, made one product at a time (8 GB of weights)."""
    blocks, float8 = depth // 128, jnp.float8_e4m3fn
    uniform = jax.random.uniform
    key = jax.random.key(3)

    def eight_bit(seed, shape, dtype):
        return (normal(seed, shape) * (1 if dtype == float8 else 40)).astype(dtype)

    out = {
        "forward": lambda: (normal(0, (rows, depth)), normal(1, (groups, width, depth), depth**-0.5)),
        "dgrad": lambda: (normal(2, (rows, width)), normal(1, (groups, width, depth), depth**-0.5)),
        "wgrad": lambda: (normal(2, (rows, width)), normal(0, (rows, depth))),
    }
    if width % 256 == 0:
        out["swiglu"] = lambda: (
            normal(0, (rows, depth)),
            normal(1, (groups, 2, width // 2, depth), depth**-0.5),
        )
    out["fp8"] = lambda: (
        eight_bit(0, (rows, depth), float8),
        uniform(key, (rows, blocks)),
        eight_bit(1, (groups, width, depth), float8),
        uniform(key, (groups, width // 128, blocks)),
    )
    out["int8"] = lambda: (
        eight_bit(0, (rows, depth), jnp.int8),
        uniform(key, (rows,)),
        eight_bit(1, (groups, width, depth), jnp.int8),
        uniform(key, (groups, width)),
    )
    return out


FUNCTIONS = {
    "forward": gm.grouped_matmul,
    "dgrad": dgrad,
    "wgrad": gm.grouped_wgrad,
    "swiglu": gm.grouped_swiglu,
    "fp8": quantized.grouped_matmul_fp8,
    "int8": quantized.grouped_matmul_int8,
}


def compile_all(names: list[str], shapes: list[tuple[int, ...]]) -> dict:
    """{(shape, name): compiled}, several at a time."""

    def one(job):
        shape, name = job
        arguments = jax.eval_shape(inputs(*shape)[name])
        sizes = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        return job, jax.jit(FUNCTIONS[name]).lower(*arguments, sizes).compile()

    jobs = [(shape, name) for shape in shapes for name in names if name in inputs(*shape)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(pool.map(one, jobs))


def torch_milliseconds(arguments: tuple, sizes: jax.Array) -> float:
    import torch

    x, weights = map(measure.to_torch, arguments)
    offsets = torch.cumsum(measure.to_torch(sizes), 0, dtype=torch.int32)
    return measure.torch_milliseconds(lambda: torch._grouped_mm(x, weights.transpose(-2, -1), offs=offsets))


def check_quantized(groups: int, rows: int, depth: int, width: int) -> None:
    sizes = sizes_of(groups, rows, "skewed", 1)
    for name in ("fp8", "int8"):
        x, x_scale, weights, w_scale = inputs(groups, rows, depth, width)[name]()
        poison_free_memory()
        out = FUNCTIONS[name](x, x_scale, weights, w_scale, jnp.asarray(sizes))
        x, x_scale, weights, w_scale = (np.asarray(a.astype(jnp.float32)) for a in (x, x_scale, weights, w_scale))
        if name == "fp8":
            x = x * x_scale.repeat(128, 1)
            weights = weights * w_scale.repeat(128, 1).repeat(128, 2)
        else:
            x, weights = x * x_scale[:, None], weights * w_scale[..., None]
        expected, _, _ = reference(x, weights, sizes, np.zeros((rows, width), np.float32))
        error = measure.relative_error(out, expected)
        print(f"check {name} {groups}x{rows}x{depth}x{width}: {error:.1e} {error < 6e-3}", flush=True)
        assert error < 6e-3


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument(
        "--check", nargs="*", type=int, metavar="CASE", help="only compare with references (all cases or these)"
    )
    parser.add_argument("--only", nargs="*", choices=FUNCTIONS, default=list(FUNCTIONS), help="products to time")
    parser.add_argument("--shapes", nargs="*", type=int, default=range(len(SHAPES)), help="the shapes to time, from 0")
    arguments = parser.parse_args()
    records = measure.Records("grouped_matmul", arguments.results)
    if arguments.check is not None:
        return check(arguments.check)
    shapes = [SHAPES[i] for i in arguments.shapes]
    compiled = compile_all(arguments.only, shapes)
    for shape in shapes:
        groups, rows, depth, width = shape
        for name in arguments.only:
            if (shape, name) not in compiled:
                continue
            values = inputs(*shape)[name]()
            for kind in ("even", "routed"):
                sizes = jnp.asarray(sizes_of(groups, rows, kind))
                call = functools.partial(compiled[shape, name], *values, sizes)
                ms = measure.milliseconds(call, jax.block_until_ready)
                flops = 2 * rows * depth * width
                figures = {"ms": ms, "tflops": flops / ms / 1e9}
                if name != "wgrad":
                    weights = next(x for x in values if x.ndim >= 3)
                    figures["weights_gbs"] = weights.nbytes * float((sizes > 0).mean()) / ms / 1e6
                if name == "forward":
                    torch_ms = torch_milliseconds(values, sizes)
                    figures["torch_tflops"] = flops / torch_ms / 1e9
                    figures["torch_weights_gbs"] = figures["weights_gbs"] * ms / torch_ms
                records.add(f"{name}, {groups} groups, {rows} rows, {depth} to {width}, {kind}", **figures)
            del values


if __name__ == "__main__":
    main()
