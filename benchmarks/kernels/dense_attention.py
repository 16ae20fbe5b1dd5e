"""Dense attention by cuDNN on a GPU: `python -m benchmarks.kernels.dense_attention`.

Errors of output and gradients against float32 on plain XLA, whole rows, packed segments and rows of a cache; then the
time at the widths of V3 beside plain XLA, and beside values filled up to the keys' width (what jax.nn takes).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import measure
from dsparse import ops, reference
from dsparse.kernels import cudnn

# length, heads, widths of keys and values, packed segments
CHECKS = ((512, 8, 192, 128, False), (77, 4, 96, 64, False), (3, 4, 96, 64, False), (300, 4, 256, 256, False))
CHECKS += ((512, 8, 192, 128, True), (200, 4, 96, 64, True))
MOST_ERROR = 1e-2
SCALE = 0.1
TIMED = (8192, 128, 192, 128)


def inputs(length: int, heads: int, width: int, value_width: int, batch: int = 2):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((batch, length, heads, width),) * 2 + ((batch, length, heads, value_width),) * 2
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def with_gradients(attend, dout, *args):
    out, pull = jax.vjp(attend, *args)
    return out, *pull(dout.astype(out.dtype))


def check(records: measure.Records) -> bool:
    good = True
    for length, heads, width, value_width, packed in CHECKS:
        *args, dout = inputs(length, heads, width, value_width)
        segments = np.sort(np.random.default_rng(0).integers(0, 4, (2, length)), axis=1).astype(np.int32)
        segments = jnp.asarray(segments) if packed else None

        def run(implementation, args, segments=segments, dout=dout):
            attend = functools.partial(
                ops.causal_attention, scale=SCALE, segment_ids=segments, implementation=implementation
            )
            return jax.jit(functools.partial(with_gradients, attend))(dout, *args)

        with jax.default_matmul_precision("highest"):
            expected = run("xla", [x.astype(jnp.float32) for x in args])
        errors = [measure.relative_error(a, b) for a, b in zip(run("cudnn", args), expected, strict=True)]
        passed = max(errors) < MOST_ERROR
        good &= passed
        case = f"check {length} tokens, {heads} heads of {width} and {value_width}{', packed' if packed else ''}"
        records.add(case, passed=passed, **dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)))
    return good


def check_cached(records: measure.Records) -> bool:
    """A chunk of 64 queries at places 100 and 37 of a cache of 256 rows."""
    q, k, v, _ = inputs(256, 4, 192, 128)
    q, positions = q[:, :64], jnp.array([[100], [37]]) + jnp.arange(64)

    def attend(implementation, q, k, v):
        past = jnp.concatenate([k, v], axis=-1).reshape(*k.shape[:2], -1)
        expand = functools.partial(_split, heads=4)
        options = {"v_head_dim": 128, "scale": SCALE, "implementation": implementation}
        return ops.cached_attention(q, past, expand, positions, **options)

    with jax.default_matmul_precision("highest"):
        keep = jnp.arange(256) <= positions[..., None]
        expected = reference.causal_attention(*(x.astype(jnp.float32) for x in (q, k, v)), keep, SCALE)
    error = measure.relative_error(jax.jit(attend, static_argnums=0)("cudnn", q, k, v), expected)
    records.add("check rows of a cache", passed=error < MOST_ERROR, out=error)
    return error < MOST_ERROR


def _split(past, heads):
    return jnp.split(past.reshape(*past.shape[:2], heads, -1), [192], axis=-1)


def time(records: measure.Records) -> None:
    length, heads, width, value_width = TIMED
    q, k, v, dout = inputs(*TIMED, batch=1)
    pairs = length * (length + 1) / 2 * heads * 2

    def filled(q, k, v, *, scale):
        v = jnp.pad(v, ((0, 0),) * 3 + ((0, width - value_width),))
        return cudnn.attention(q, k, v, scale=scale, causal=True)[..., :value_width]

    def xla(q, k, v, *, scale):
        return ops.causal_attention(q, k, v, scale=scale, implementation="xla")

    native = functools.partial(cudnn.attention, causal=True)
    for name, attend in (("cudnn", native), ("cudnn, values filled up", filled), ("xla", xla)):
        attend = functools.partial(attend, scale=SCALE)
        forward = measure.jax_milliseconds(attend, q, k, v)
        both = measure.jax_milliseconds(functools.partial(with_gradients, attend), dout, q, k, v)
        records.add(
            f"{length} tokens, {heads} heads of {width} and {value_width}, {name}",
            forward_ms=forward,
            forward_tflops=pairs * (width + value_width) / forward / 1e9,
            backward_ms=both - forward,
            backward_tflops=pairs * (3 * width + 2 * value_width) / (both - forward) / 1e9,
        )


def main() -> None:
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with float32")
    parser.add_argument("--quick", action="store_true", help="only time")
    arguments = parser.parse_args()
    records = measure.Records("dense_attention", arguments.results)
    good = [] if arguments.quick else [check(records), check_cached(records)]
    if not arguments.check:
        time(records)
    raise SystemExit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
