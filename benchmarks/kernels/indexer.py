"""Indexer logits and their top-k on the H100: `python -m benchmarks.kernels.indexer [--check]`."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import measure
from benchmarks.kernels.poison import poison_free_memory
from dsparse.kernels import indexer

FP8 = jnp.float8_e4m3fn
SHAPES = [(2048, 32768, 64), (4096, 8192, 64), (2048, 32768, 32)]  # queries, keys, heads


def inputs(batch: int, queries: int, keys: int, heads: int, dtype, seed: int = 0, width: int = 128):
    r = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(r[0], (batch, queries, heads, width)).astype(dtype)
    k = jax.random.normal(r[1], (batch, keys, width)).astype(dtype)
    weights = jax.random.normal(r[2], (batch, queries, heads))
    scale = jax.random.uniform(r[3], (batch, keys)) + 0.5 if dtype == FP8 else None
    return q, k, weights, scale


def reference(q, k, weights, lengths, scale):
    scores = jnp.einsum("btnh,bsh->btns", q.astype(jnp.float32), k.astype(jnp.float32), precision="highest")
    logits = jnp.einsum("btns,btn->bts", jax.nn.relu(scores), weights, precision="highest")
    logits = logits if scale is None else logits * scale[:, None]
    return jnp.where(jnp.arange(k.shape[1]) < lengths[..., None], logits, -jnp.inf)


def check(chosen: list[int]) -> None:
    cases = [
        (1, 64, 512, 64, 448),
        (2, 33, 1000, 64, 900),
        (1, 1, 4096, 64, 4095),
        (3, 130, 700, 32, 100),
        (1, 257, 640, 16, 5),
        (1, 8, 256, 128, 0),
    ]
    for case, (batch, queries, keys, heads, offset) in enumerate(cases):
        if chosen and case not in chosen:
            continue
        lengths = jnp.minimum(jnp.arange(queries) + offset + jnp.arange(batch)[:, None], keys)
        for dtype in (jnp.bfloat16, jnp.float16, FP8):
            q, k, weights, scale = inputs(batch, queries, keys, heads, dtype, case)
            poison_free_memory()
            out = indexer.indexer_logits(q, k, weights, lengths, scale)
            expected = reference(q, k, weights, lengths, scale)
            seen = jnp.isfinite(expected)
            error = measure.relative_error(jnp.where(seen, out, 0), jnp.where(seen, expected, 0))
            ok = bool((jnp.isneginf(out) == ~seen).all()) and error < 1e-3
            print(f"check {batch}x{queries}x{keys}x{heads} {jnp.dtype(dtype).name}: {error:.1e} {ok}", flush=True)
            assert ok
            k_top = min(512, keys)
            selected = indexer.indexer_topk(q, k, weights, lengths, k_top, scale, logits_bytes=batch * keys * 4 * 16)
            whole = indexer.indexer_topk(q, k, weights, lengths, k_top, scale)
            assert (selected == whole).all() and ((selected >= 0).sum(-1) == jnp.minimum(lengths, k_top)).all()
        for dtype, most in ((jnp.bfloat16, 6e-3), (jnp.float16, 1e-3)):
            check_gradient(inputs(batch, queries, keys, heads, dtype, case)[:3], lengths, most)


def check_gradient(primals, lengths, most: float) -> None:
    q, k, weights = primals
    cotangent = jax.random.normal(jax.random.key(9), (*lengths.shape, k.shape[1]))

    def loss(function, *args):
        out = function(*args)
        return jnp.where(jnp.isfinite(out), out * cotangent, 0).sum()

    poison_free_memory()
    got = jax.grad(lambda *a: loss(indexer.indexer_logits, *a, lengths), (0, 1, 2))(q, k, weights)
    wide = q.astype(jnp.float32), k.astype(jnp.float32), weights
    want = jax.grad(lambda *a: loss(reference, *a, lengths, None), (0, 1, 2))(*wide)
    errors = [measure.relative_error(a, b) for a, b in zip(got, want, strict=True)]
    print(f"check gradient {q.dtype.name}", *(f"{e:.1e}" for e in errors), flush=True)
    assert all(e < most for e in errors)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument(
        "--check",
        nargs="*",
        type=int,
        metavar="CASE",
        help="only compare with float32 references (of all cases or these)",
    )
    arguments = parser.parse_args()
    records = measure.Records("indexer", arguments.results)
    if arguments.check is not None:
        return check(arguments.check)
    for queries, keys, heads in SHAPES:
        for dtype in (FP8, jnp.bfloat16):
            q, k, weights, scale = inputs(1, queries, keys, heads, dtype)
            for name, offset in (("causal", keys - queries), ("full", keys)):
                lengths = jnp.minimum(jnp.arange(queries) + offset + 1, keys)[None]
                flops = 2 * heads * 128 * int(np.asarray(lengths).sum())
                args = (q, k, weights, lengths) + (() if scale is None else (scale,))
                ms = measure.jax_milliseconds(indexer.indexer_logits, *args)
                figures = {"ms": ms, "tflops": flops / ms / 1e9}
                if name == "causal":
                    figures["with_topk_ms"] = measure.jax_milliseconds(
                        lambda q, k, w, n, *s: indexer.indexer_topk(q, k, w, n, 2048, *s), *args
                    )
                    if heads == 64 and dtype == jnp.bfloat16:
                        figures["xla_ms"] = measure.jax_milliseconds(xla_logits, q, k, weights, lengths)
                kind = f"{jnp.dtype(dtype).name} {name}"
                records.add(f"{queries} queries, {keys} keys, {heads} heads, {kind}", **figures)


def xla_logits(q, k, weights, lengths):
    def chunk(part):
        q, weights, lengths = part
        scores = jnp.einsum("tnh,sh->tns", q, k[0], preferred_element_type=jnp.float32)
        logits = jnp.einsum("tns,tn->ts", jax.nn.relu(scores), weights)
        return jnp.where(jnp.arange(k.shape[1]) < lengths[:, None], logits, -jnp.inf)

    parts = (x[0].reshape(-1, 128, *x.shape[2:]) for x in (q, weights, lengths))
    return jax.lax.map(chunk, tuple(parts))


if __name__ == "__main__":
    main()
