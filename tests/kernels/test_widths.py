"""What the entries of the kernels add to arguments until they fit: against references, without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins

from dsparse import gathered, reference
from dsparse.kernels import grouped_matmul as gm
from dsparse.kernels import grouped_matmul_quantized as quantized
from dsparse.kernels import indexer, mosaic, tilings
from dsparse.kernels import sparse_attention as sparse

SIZES = [5, 0, 9]


@pytest.fixture(autouse=True)
def small_and_hopper(monkeypatch):
    """Tiles small enough to interpret."""
    monkeypatch.setattr(tilings, "GROUPED", stand_ins.small_tilings())
    with mosaic.assume_hopper():
        yield


def normal(seed, shape, scale=1.0):
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(jnp.bfloat16)


def error(value, expected) -> float:
    value, expected = (np.asarray(x.astype(jnp.float32)) for x in (value, expected))
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("width", "v_width"), [(96, 64), (64, 64), (512, 512), (544, 500)])
@pytest.mark.parametrize(("queries", "count"), [(3, 300), (70, 40)], ids=["split lists", "whole lists"])
def test_sparse_attention(monkeypatch, width, v_width, queries, count):
    monkeypatch.setattr(sparse.forward_kernel, "forward", stand_ins.forward)
    monkeypatch.setattr(sparse.backward_kernel, "backward", stand_ins.backward)
    q, kv, dout = normal(0, (2, queries, 5, width)), normal(1, (2, 400, width)), normal(2, (2, queries, 5, v_width))
    rng = np.random.default_rng(0)
    indices = np.stack([[rng.permutation(400)[:count] for _ in range(queries)] for _ in range(2)])
    indices[0, 1] = -1
    indices[1, 2, 7:] = -1
    indices, sinks = jnp.asarray(indices, jnp.int32), jnp.asarray(rng.standard_normal(5), jnp.float32)

    def outputs(attend):
        out, pull, lse = jax.vjp(attend, q, kv, sinks, has_aux=True)
        return lse, out, *pull(dout)

    def reordered(result):
        return result[0], result[1]

    got = outputs(
        lambda q, kv, sinks: reordered(
            sparse.sparse_attention(q, kv, indices, v_head_dim=v_width, scale=0.05, sinks=sinks)
        )
    )
    expected = outputs(lambda q, kv, sinks: reordered(gathered.sparse_attention(q, kv, indices, sinks, v_width, 0.05)))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-3)
    assert got[1].shape == (2, queries, 5, v_width)
    for value, wanted in zip(got[1:], expected[1:], strict=True):
        assert value.shape == wanted.shape and error(value, wanted) < 1e-2


def test_lists_are_split_only_for_few_queries(monkeypatch):
    seen = []

    def forward(q, kv, indices, steps, sinks, **options):
        seen.append((len(q), indices.shape[1]))
        return stand_ins.forward(q, kv, indices, steps, sinks, **options)

    monkeypatch.setattr(sparse.forward_kernel, "forward", forward)
    kv = normal(1, (2, 3000, 512))
    for queries, count in ((1, 2048), (1, 100), (70, 2048)):
        indices = jnp.broadcast_to(jnp.arange(count), (2, queries, count))
        sparse.sparse_attention(normal(0, (2, queries, 8, 512)), kv, indices, v_head_dim=512, scale=1.0)
    assert seen == [(2 * 16, 128), (2, 128), (140, 2048)]


@pytest.mark.parametrize(("heads", "width"), [(3, 32), (4, 64), (24, 100)])
def test_indexer(heads, width):
    q, k, weights = normal(0, (1, 16, heads, width)), normal(1, (1, 150, width)), normal(2, (1, 16, heads))
    lengths = jnp.arange(16)[None] * 10
    out = indexer.indexer_logits(q, k, weights, lengths, None, True)
    expected = reference.indexer_logits(*(x.astype(jnp.float32) for x in (q, k, weights)))
    expected = jnp.where(jnp.arange(150) < lengths[..., None], expected, -jnp.inf)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)


def test_indexer_topk_from_starts(monkeypatch):
    def logits(q, k, weights, lengths, k_scale, interpret):
        scores = reference.indexer_logits(q, k, weights)
        return jnp.where(jnp.arange(k.shape[1]) < lengths[..., None], scores, -jnp.inf)

    monkeypatch.setattr(indexer, "_padded_logits", logits)
    monkeypatch.setattr(indexer, "topk", stand_ins.topk)
    q, k, weights = normal(0, (2, 20, 3, 8)), normal(1, (2, 128, 8)), normal(2, (2, 20, 3))
    ends = jnp.broadcast_to(jnp.arange(20) + 1, (2, 20))
    starts = jnp.where(ends > 11, 11, 0)
    expected = stand_ins.indexer_topk(q, k, weights, ends, 6, starts=starts)
    for budget in (1 << 30, 2 * 128 * 4 * 8):  # whole, and in chunks of eight queries
        chosen = indexer.indexer_topk(q, k, weights, ends, 6, starts=starts, logits_bytes=budget)
        np.testing.assert_array_equal(np.sort(chosen), np.sort(expected))


def test_grouped_matmul():
    x, weights, dy = normal(0, (16, 72)), normal(1, (3, 96, 72), 0.1), normal(2, (16, 96))
    sizes = jnp.array(SIZES)
    out, pull = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes, True), x, weights)
    expected, pull_expected = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, sizes), x, weights)
    assert out.shape == (16, 96) and error(out, expected) < 5e-3
    for value, wanted in zip(pull(dy), pull_expected(dy), strict=True):
        assert value.shape == wanted.shape and error(value, wanted) < 1e-2


@pytest.mark.parametrize("limit", [None, 0.501])  # no bfloat16 number, so that none is at the limit
def test_grouped_swiglu(limit):
    x, weights, dy = normal(0, (16, 72)), normal(1, (3, 2, 96, 72), 0.1), normal(2, (16, 96))
    sizes = jnp.array(SIZES)

    def wide(x, weights):
        """In float32, but what is clamped is decided on bfloat16, as the backward pass recomputes it."""
        halves = [reference.grouped_matmul(x, weights[:, half], sizes) for half in range(2)]
        halves = [h + jax.lax.stop_gradient(h.astype(jnp.bfloat16).astype(jnp.float32) - h) for h in halves]
        return reference.swiglu(*halves, limit)

    out, pull = jax.vjp(lambda x, w: gm.grouped_swiglu(x, w, sizes, limit, True), x, weights)
    expected, pull_expected = jax.vjp(wide, *(a.astype(jnp.float32) for a in (x, weights)))
    assert out.shape == (16, 96) and error(out, expected) < 5e-3
    for value, wanted in zip(pull(dy), pull_expected(dy.astype(jnp.float32)), strict=True):
        assert value.shape == wanted.shape and error(value, wanted) < 2e-2


def test_fp8_with_ragged_blocks_and_parts():
    x, weights = normal(0, (16, 200)), normal(1, (3, 2, 96, 200)).astype(jnp.float8_e4m3fn)
    w_scale = jax.random.uniform(jax.random.key(2), (3, 2, 1, 2))
    values, x_scale = quantized.quantize_rows(x)
    assert error(values.astype(jnp.float32) * jnp.repeat(x_scale, 128, axis=1)[:, :200], x) < 0.04
    assert float(jnp.abs(values.astype(jnp.float32)).max()) <= 448
    out = quantized.grouped_matmul_fp8(values, x_scale, weights, w_scale, jnp.array(SIZES), interpret=True)
    expected = stand_ins.grouped_matmul_fp8(values, x_scale, weights, w_scale, jnp.array(SIZES))
    assert out.shape == (16, 2, 96) and error(out, expected) < 5e-3
