"""Indexer kernel: interpreted on the CPU with race detection, and compiled for the H100 without one."""

import h100
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsparse.kernels import indexer, mosaic

FP8 = jnp.float8_e4m3fn


def inputs(batch, queries, keys, heads, dtype):
    r = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(r[0], (batch, queries, heads, 128)).astype(dtype)
    k = jax.random.normal(r[1], (batch, keys, 128)).astype(dtype)
    scale = jax.random.uniform(r[3], (batch, keys)) if dtype == FP8 else None
    return q, k, jax.random.normal(r[2], (batch, queries, heads)), scale


def reference(q, k, weights, lengths, scale):
    scores = jnp.einsum("btnh,bsh->btns", q.astype(jnp.float32), k.astype(jnp.float32))
    logits = jnp.einsum("btns,btn->bts", jax.nn.relu(scores), weights)
    logits = logits if scale is None else logits * scale[:, None]
    return jnp.where(jnp.arange(k.shape[1]) < lengths[..., None], logits, -jnp.inf)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "dtype", "offset"),
    [
        (1, 8, 384, 64, jnp.bfloat16, 120),
        (1, 8, 256, 64, jnp.float16, 100),
        (2, 2, 200, 64, FP8, 0),
    ],  # a hidden tile; padded queries and keys
)
def test_logits(batch, queries, keys, heads, dtype, offset):
    q, k, weights, scale = inputs(batch, queries, keys, heads, dtype)
    lengths = jnp.broadcast_to(jnp.arange(queries) + offset, (batch, queries))
    with mosaic.assume_hopper():
        out = indexer.indexer_logits(q, k, weights, lengths, scale, True)
    np.testing.assert_allclose(out, reference(q, k, weights, lengths, scale), rtol=1e-4, atol=1e-4)


def test_gradient(monkeypatch):
    monkeypatch.setattr(indexer, "GRADIENT_BYTES", 3 * 64 * 128 * 4)  # chunks of 3 of 8 queries
    q, k, weights, _ = inputs(1, 8, 128, 64, jnp.bfloat16)
    lengths = jnp.arange(8)[None] * 16
    d_logits = jax.random.normal(jax.random.key(5), (1, 8, 128))
    d_q, d_k, d_weights, _, _ = indexer._logits_bwd(True, (q, k, weights, lengths), d_logits)

    def loss(q, k, weights):
        logits = reference(q, k, weights, lengths, None)
        return jnp.where(jnp.isfinite(logits), logits * d_logits, 0).sum()

    expected = jax.grad(loss, (0, 1, 2))(q.astype(jnp.float32), k.astype(jnp.float32), weights)
    for value, want in zip((d_q, d_k, d_weights), expected, strict=True):
        assert np.linalg.norm(value.astype(jnp.float32) - want) < 6e-3 * np.linalg.norm(want)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, FP8])
@pytest.mark.parametrize(
    ("queries", "keys", "heads"), [(2048, 32768, 64), (1, 1000, 64), (130, 640, 32), (130, 640, 4)]
)
def test_compiles(queries, keys, heads, dtype):
    scale = (shape(1, keys),) if dtype == FP8 else ()
    kernels = h100.compile_for_h100(
        indexer.indexer_logits,
        shape(1, queries, heads, 128, dtype=dtype),
        shape(1, keys, 128, dtype=dtype),
        shape(1, queries, heads),
        shape(1, queries, dtype=jnp.int32),
        *scale,
    )
    assert len(kernels) == 1 and not kernels[0].spill_bytes and not kernels[0].serialized_wgmma, kernels


def test_logits_and_topk_compile_together_in_chunks():
    kernels = h100.compile_for_h100(
        lambda *a: indexer.indexer_topk(*a, 2048, logits_bytes=1 << 24),
        shape(1, 300, 64, 128, dtype=jnp.bfloat16),
        shape(1, 8192, 128, dtype=jnp.bfloat16),
        shape(1, 300, 64),
        shape(1, 300, dtype=jnp.int32),
    )
    assert len(kernels) == 2


@pytest.mark.parametrize(
    ("heads", "width", "dtype"), [(257, 128, jnp.bfloat16), (64, 136, jnp.bfloat16), (64, 128, jnp.float32)]
)
def test_unsupported_says_so(heads, width, dtype):
    with mosaic.assume_hopper(), pytest.raises(NotImplementedError, match="indexer kernel"):
        jax.eval_shape(
            indexer.indexer_logits,
            shape(1, 8, heads, width, dtype=dtype),
            shape(1, 256, width, dtype=dtype),
            shape(1, 8, heads),
            shape(1, 8, dtype=jnp.int32),
        )
