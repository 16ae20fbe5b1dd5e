"""Grouped matmul on the H100 beside torch's: `python -m benchmarks.kernels.grouped_matmul [--check]`."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import measure
from dsparse.kernels import grouped_matmul as gm

SHAPES = [(256, 65536, 7168, 2048), (256, 65536, 2048, 7168), (64, 49152, 2048, 1408), (64, 49152, 1408, 2048)]


def sizes_of(groups: int, rows: int, kind: str, seed: int = 0) -> np.ndarray:
    """int32 group sizes that sum to `rows`: even, routed (multinomial), or skewed (half the groups empty)."""
    rng = np.random.default_rng(seed)
    if kind == "even":
        return np.full(groups, rows // groups, np.int32)
    weights = np.ones(groups) if kind == "routed" else rng.pareto(1.0, groups) * (rng.random(groups) < 0.5) + 1e-9
    return rng.multinomial(rows, weights / weights.sum()).astype(np.int32)


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * scale).astype(jnp.bfloat16)


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


def check() -> None:
    cases = [
        (2, 512, 256, 256, "routed", 0),
        (8, 1000, 512, 512, "routed", 37),
        (8, 1001, 192, 320, "skewed", 5),
        (64, 4096, 256, 1408, "skewed", 0),
        (256, 2048, 128, 256, "skewed", 99),
        (512, 5000, 128, 128, "routed", 1),
        (4, 3, 256, 256, "routed", 1),
        (3, 2000, 1408, 576, "routed", 300),
    ]
    for case, (groups, rows, depth, width, kind, tail) in enumerate(cases):
        sizes = sizes_of(groups, rows - tail, kind, case)
        x = normal(case, (rows, depth))
        x = x.at[rows - tail :].set(jnp.nan)
        dy = normal(case + 100, (rows, width))
        for name, function, reference_function, shape in (
            ("matmul", gm.grouped_matmul, reference, (groups, width, depth)),
            ("swiglu", gm.grouped_swiglu, swiglu_reference, (groups, 2, width, depth)),
        ):
            weights = normal(case + 200, shape, depth**-0.5)
            out, pull = jax.vjp(lambda x, w, f=function, n=jnp.asarray(sizes): f(x, w, n), x, weights)
            got = out, *pull(dy)
            plain = (np.asarray(a.astype(jnp.float32)) for a in (jnp.nan_to_num(x), weights))
            want = reference_function(*plain, sizes, np.asarray(dy.astype(jnp.float32)))
            errors = [measure.relative_error(a, b) for a, b in zip(got, want, strict=True)]
            d_w = got[2]
            exact = not out[rows - tail :].any() and not d_w[np.flatnonzero(sizes == 0)].any()
            ok = exact and all(e < 6e-3 for e in errors)
            print(f"check {name} {groups}x{rows}x{depth}x{width} {kind} {tail}:", *(f"{e:.1e}" for e in errors), ok)
            assert ok


def time_shape(groups: int, rows: int, depth: int, width: int, kind: str, backward: bool) -> None:
    import torch

    sizes = jnp.asarray(sizes_of(groups, rows, kind))
    x, weights = normal(0, (rows, depth)), normal(1, (groups, width, depth), depth**-0.5)
    flops = 2 * rows * depth * width
    teraflops = {"forward": measure.jax_milliseconds(gm.grouped_matmul, x, weights, sizes)}
    offsets = torch.cumsum(measure.to_torch(sizes), 0, dtype=torch.int32)
    x_torch, w_torch = measure.to_torch(x), measure.to_torch(weights)
    teraflops["torch"] = measure.torch_milliseconds(
        lambda: torch._grouped_mm(x_torch, w_torch.transpose(-2, -1), offs=offsets)
    )
    if backward:
        dy = normal(2, (rows, width))

        def dgrad(dy, weights, sizes):
            return gm._rows_times_weights(dy, weights, sizes, False, transposed=True)

        teraflops["dgrad"] = measure.jax_milliseconds(dgrad, dy, weights, sizes)
        teraflops["wgrad"] = measure.jax_milliseconds(gm.grouped_wgrad, dy, x, sizes)
        stacked = weights.reshape(groups, 2, width // 2, depth)
        teraflops["swiglu"] = measure.jax_milliseconds(gm.grouped_swiglu, x, stacked, sizes)
    print(
        f"{groups:4d} groups {rows} x {depth} x {width} {kind:7s}",
        *(f"{name} {flops / ms / 1e9:.0f}" for name, ms in teraflops.items()),
        "TFLOP/s",
        f"({teraflops['forward']:.2f} ms, {teraflops['torch'] / teraflops['forward']:.2f}x torch)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare with float32 references")
    arguments = parser.parse_args()
    print(measure.versions())
    if arguments.check:
        return check()
    for shape in SHAPES:
        for kind in ("even", "routed"):
            time_shape(*shape, kind, backward=kind == "routed")


if __name__ == "__main__":
    main()
