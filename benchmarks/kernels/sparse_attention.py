"""Sparse attention on a Hopper GPU: `python -m benchmarks.kernels.sparse_attention [--check]`.

Prints each shape's median time and TFLOP/s, and the time of plain XLA (a gather, a chunk of queries at a time) in the
same run. A product of a query head with a row counts 2 * H and its value 2 * V; the backward counts five products.
`--check` compares output, log-sum-exp and gradients with a float32 reference on fresh random inputs instead, with NaN
in the memory that they are written to.
"""

import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import measure
from benchmarks.kernels.poison import poison_free_memory
from dsparse.kernels.sparse_attention import sparse_attention
from dsparse.kernels.sparse_attention_decode import pack_cache, sparse_attention_decode, unpack_cache

V = 512
# name, queries, heads, row width, keys, indices a query, sinks, number type
SHAPES = (
    ("V3.2, 8k keys", 4096, 128, 576, 8192, 2048, False, "bfloat16"),
    ("V3.2, 8k keys, float16", 4096, 128, 576, 8192, 2048, False, "float16"),
    ("V3.2, 32k keys", 4096, 128, 576, 32768, 2048, False, "bfloat16"),
    ("64 heads, 32k keys", 4096, 64, 576, 32768, 2048, False, "bfloat16"),
    ("V4, 64 heads, 8k keys", 4096, 64, 512, 8192, 512, True, "bfloat16"),
    ("V4, 64 heads, 32k keys", 4096, 64, 512, 32768, 512, True, "bfloat16"),
    ("V4, 128 heads, 32k keys", 4096, 128, 512, 32768, 1024, True, "bfloat16"),
)
# batch, queries, heads, row width, keys, indices a query, sinks, some indices invalid, number type
CHECKS = (
    (1, 160, 128, 576, 1500, 512, False, False, "bfloat16"),
    (2, 35, 72, 576, 300, 200, True, True, "bfloat16"),
    (2, 40, 16, 512, 333, 130, True, True, "bfloat16"),
    (1, 300, 64, 512, 700, 256, False, True, "bfloat16"),
    (2, 35, 72, 576, 300, 200, True, True, "float16"),
    (1, 300, 64, 512, 700, 256, False, True, "float16"),
)
MOST = {"bfloat16": 5e-3, "float16": 8e-4}  # relative error of outputs and gradients


def random_indices(rng, shape: tuple[int, ...], keys: int) -> np.ndarray:
    *lead, count = shape
    return np.argsort(rng.random((*lead, keys), np.float32), -1)[..., :count].astype(np.int32)


def inputs(queries, heads, width, keys, count, with_sinks, dtype):
    rng = np.random.default_rng(0)
    normal = [
        jax.random.normal(k, s, dtype)
        for k, s in zip(
            jax.random.split(jax.random.key(0), 3),
            ((1, queries, heads, width), (1, keys, width), (1, queries, heads, V)),
            strict=True,
        )
    ]
    # A few hundred distinct lists: sorting one for every query would take longer than the benchmark.
    indices = np.tile(random_indices(rng, (256, count), keys), (queries // 256, 1))[None]
    sinks = jnp.asarray(rng.normal(size=heads), jnp.float32) if with_sinks else None
    return (*normal, jnp.asarray(indices), sinks)


def reference(q, kv, indices, sinks, scale):
    """In float32, with gradients that are defined for queries without any row."""
    valid = (indices >= 0) & (indices < kv.shape[1])
    rows = jax.vmap(lambda table, index: table[index])(kv, jnp.where(valid, indices, 0))
    logits = jnp.einsum("btnh,btkh->btnk", q, rows, precision="highest") * scale
    logits = jnp.where(valid[:, :, None], logits, -jnp.inf)
    sinks = jnp.full(q.shape[2], -jnp.inf) if sinks is None else sinks
    logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[:, None], (*logits.shape[:3], 1))], -1)
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), -1e30))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    weights = jnp.where(some, weights / jnp.where(some, total, 1.0), 0.0)[..., :-1]
    lse = jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + top, -jnp.inf)[..., 0]
    return jnp.einsum("btnk,btkv->btnv", weights, rows[..., :V], precision="highest"), lse


def gather_in_chunks(q, kv, indices, *, scale, chunk=64):
    """What plain XLA does: gathered rows of some queries at a time."""

    def some(part):
        q, indices = part
        rows = kv[0][indices]
        logits = jnp.einsum("tnh,tkh->tnk", q, rows, preferred_element_type=jnp.float32) * scale
        return jnp.einsum("tnk,tkv->tnv", jax.nn.softmax(logits).astype(q.dtype), rows[..., :V])

    def split(x):
        return x[0].reshape(-1, chunk, *x.shape[2:])

    return jax.lax.map(jax.checkpoint(some), (split(q), split(indices))).reshape((*q.shape[:3], V))


def check_shape(shape, seed: int) -> bool:
    good = True
    batch, queries, heads, width, keys, count, with_sinks, with_invalid, dtype = shape
    rng = np.random.default_rng(seed)
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    q = jnp.asarray(normal((batch, queries, heads, width)), dtype)
    kv = jnp.asarray(normal((batch, keys, width)), dtype)
    indices = random_indices(rng, (batch, queries, count), keys)
    if with_invalid:
        indices = np.where(rng.random(indices.shape) < 0.3, -1, indices)
        indices[0, 3], indices[0, 5, 20:], indices[0, 6, 0] = -1, -1, keys + 5
    sinks = jnp.asarray(normal(heads)) if with_sinks else None
    dout, dlse = (
        jnp.asarray(normal((batch, queries, heads, V)), dtype),
        jnp.asarray(normal((batch, queries, heads))),
    )

    def outputs(f, arguments, rest):
        def loss(arguments):
            out, lse = f(*arguments, rest[0])
            total = jnp.sum(out.astype(jnp.float32) * rest[1]) + jnp.sum(jnp.where(lse > -1e29, lse * rest[2], 0.0))
            return total, (out, lse)

        (_, primal), gradients = jax.value_and_grad(loss, has_aux=True)(arguments)
        return primal, gradients

    def kernel(deterministic):
        return lambda q, kv, sinks, indices: sparse_attention(
            q, kv, indices, v_head_dim=V, scale=width**-0.5, sinks=sinks, deterministic=deterministic
        )

    rest = (jnp.asarray(indices), dout, dlse)
    arguments = (q, kv, sinks)

    def plain(q, kv, sinks, indices):
        return reference(q, kv, indices, sinks, width**-0.5)

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    (out, lse), expected = jax.jit(functools.partial(outputs, plain))(wide, rest)
    finite = np.isfinite(np.asarray(lse))
    for deterministic in (False, True):
        run = jax.jit(functools.partial(outputs, kernel(deterministic)))
        poison_free_memory()
        (out_k, lse_k), gradients = run(arguments, rest)
        errors = [measure.relative_error(out_k, out)]
        errors.append(measure.relative_error(np.asarray(lse_k)[finite], np.asarray(lse)[finite]))
        errors += [
            measure.relative_error(a, b)
            for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True)
        ]
        same_empty = bool((np.isfinite(np.asarray(lse_k)) == finite).all())
        again = run(arguments, rest)[1]
        repeats = all(
            bool((a == b).all()) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(again), strict=True)
        )
        passed = max(errors) < MOST[dtype] and errors[1] < 1e-5 and same_empty and (repeats or not deterministic)
        good &= passed
        print(
            shape,
            "deterministic" if deterministic else "",
            "out, lse, gradients:",
            " ".join(f"{e:.1e}" for e in errors),
            f"repeats {repeats}",
            "ok" if passed else "WRONG",
            flush=True,
        )
    return good


def check(seed: int) -> bool:
    results = [check_shape(shape, seed) for shape in CHECKS]
    return all(results)


def check_decode(seed: int) -> bool:
    good = True
    for batch, queries, heads, width, keys, count in (
        (3, 2, 72, 576, 700, 500),
        (2, 1, 16, 512, 400, 300),
        (40, 3, 256, 576, 900, 512),
        (2, 1, 64, 576, 900, 800),
    ):
        rng = np.random.default_rng(seed)
        q = jnp.asarray(rng.standard_normal((batch, queries, heads, width)), jnp.bfloat16)
        kv = jnp.asarray(rng.standard_normal((batch, keys, width)), jnp.bfloat16)
        indices = random_indices(rng, (batch, queries, count), keys)
        indices = jnp.asarray(np.where(rng.random(indices.shape) < 0.3, -1, indices)).at[0, 0].set(-1)
        sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
        for cache in (kv, pack_cache(kv)) if width == 576 else (kv, kv.astype(jnp.float16)):
            q = q.astype(jnp.float16 if cache.dtype == jnp.float16 else q.dtype)
            rows = unpack_cache(cache) if cache.dtype == jnp.uint8 else cache
            wide = (x.astype(jnp.float32) for x in (q, rows))
            out, lse = jax.jit(reference, static_argnums=4)(*wide, indices, sinks, width**-0.5)
            decode = jax.jit(
                lambda q, cache, indices, sinks, width=width: sparse_attention_decode(
                    q, cache, indices, v_head_dim=V, scale=width**-0.5, sinks=sinks
                )
            )
            poison_free_memory()
            out_k, lse_k = decode(q, cache, indices, sinks)
            errors = measure.relative_error(out_k, out), measure.relative_error(lse_k, lse)
            # Blocks that exchange converted rows would err at random: the same rows in 16 bits give the same bits.
            same = cache.dtype != jnp.uint8 or all(
                bool((a == b).all())
                for _ in range(10)
                for a, b in zip(decode(q, cache, indices, sinks), decode(q, rows, indices, sinks), strict=True)
            )
            good &= errors[0] < MOST[q.dtype.name] and errors[1] < 1e-5 and same
            told = *(f"{e:.1e}" for e in errors), "" if same else "DIFFERS FROM 16 BITS"
            print("decode", q.shape, cache.shape, cache.dtype, "out, lse:", *told, flush=True)
    return good


def decode_times(records: measure.Records) -> None:
    for batch in (128,):
        rng = np.random.default_rng(0)
        q = jax.random.normal(jax.random.key(0), (batch, 2, 128, 576), jnp.bfloat16)
        kv = jax.random.normal(jax.random.key(1), (batch, 32768, 576), jnp.bfloat16)
        indices = jnp.asarray(np.tile(random_indices(rng, (8, 2, 2048), 32768), (batch // 8, 1, 1)))
        for cache in (kv, jax.jit(pack_cache)(kv)):

            def decode(q, cache, indices):
                return sparse_attention_decode(q, cache, indices, v_head_dim=V, scale=576**-0.5)

            ms = measure.jax_milliseconds(decode, q, cache, indices)
            flops = 2 * batch * 2 * 128 * 2048 * (576 + V)
            records.add(f"decode {batch} x 2 queries, 32k keys, {cache.dtype!s}", us=ms * 1e3, tflops=flops / ms / 1e9)


def time_shape(shape, quick: bool, records: measure.Records) -> None:
    name, queries, heads, width, keys, count, with_sinks, dtype = shape
    q, kv, dout, indices, sinks = inputs(queries, heads, width, keys, count, with_sinks, dtype)

    def attend(q, kv, indices, sinks):
        return sparse_attention(q, kv, indices, v_head_dim=V, scale=width**-0.5, sinks=sinks)

    def plain(q, kv, indices, sinks):
        return (gather_in_chunks(q, kv, indices, scale=width**-0.5),)  # without sinks

    def backward(f):
        def run(q, kv, indices, sinks, dout):
            return jax.vjp(lambda q, kv: f(q, kv, indices, sinks)[0], q, kv)[1](dout)

        return run

    def times(f, prefix: str) -> dict[str, float]:
        forward_ms = measure.jax_milliseconds(f, q, kv, indices, sinks)
        backward_ms = measure.jax_milliseconds(backward(f), q, kv, indices, sinks, dout) - forward_ms
        pairs = 2 * queries * heads * count / 1e9
        figures = {
            "forward_ms": forward_ms,
            "forward_tflops": pairs * (width + V) / forward_ms,
            "backward_ms": backward_ms,
            "backward_tflops": pairs * (3 * width + 2 * V) / backward_ms,
        }
        return {prefix + name: figure for name, figure in figures.items()}

    records.add(name, **times(attend, ""), **({} if quick else times(plain, "xla_")))


def main() -> None:
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with a float32 reference instead")
    parser.add_argument("--quick", action="store_true", help="leave out plain XLA")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of --check")
    options = parser.parse_args()
    records = measure.Records("sparse_attention", options.results)
    if options.check:
        print("seed", options.seed)
        raise SystemExit(0 if check_decode(options.seed) and check(options.seed) else 1)
    decode_times(records)
    for shape in SHAPES:
        time_shape(shape, options.quick, records)


if __name__ == "__main__":
    main()
