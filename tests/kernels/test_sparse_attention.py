"""Sparse attention kernels without a GPU.

They compile for the H100 and fit its registers, one is interpreted with race detection, and what they cannot do they
refuse. The numbers on a GPU: `python -m benchmarks.kernels.sparse_attention --check`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h100 import compile_for_h100

from dsparse import reference
from dsparse.kernels import mosaic
from dsparse.kernels import sparse_attention_forward as forward_kernel
from dsparse.kernels.sparse_attention import sparse_attention
from dsparse.kernels.sparse_attention_decode import pack_cache, sparse_attention_decode, unpack_cache

# batch, queries, heads, row width, keys, indices a query, sinks
SHAPES = {
    "v32": (1, 512, 128, 576, 8192, 2048, False),
    "v4": (2, 256, 64, 512, 8192, 512, True),
    "ragged": (2, 7, 24, 576, 77, 100, True),
    "narrow": (2, 300, 4, 96, 300, 64, False),  # filled up to 512
}


def arguments(batch, queries, heads, width, keys, count, with_sinks, dtype=jnp.bfloat16):
    shape = jax.ShapeDtypeStruct
    sinks = (shape((heads,), jnp.float32),) if with_sinks else ()
    q, kv = shape((batch, queries, heads, width), dtype), shape((batch, keys, width), dtype)
    return q, kv, shape((batch, queries, count), jnp.int32), *sinks


def attend(q, kv, indices, sinks=None, **options):
    return sparse_attention(q, kv, indices, v_head_dim=min(q.shape[-1], 512), scale=0.04, sinks=sinks, **options)


def fits(kernel, spill_bytes: int = 0) -> None:
    """Few enough registers, and matrix products that run asynchronously."""
    assert kernel.spill_bytes <= spill_bytes, kernel.log
    assert not kernel.serialized_wgmma, kernel.log


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_compiles_for_the_h100(shape, dtype):
    (kernel,) = compile_for_h100(attend, *arguments(*shape, dtype))
    fits(kernel)


@pytest.mark.parametrize(
    ("name", "deterministic", "dtype"),
    [
        ("v32", False, jnp.bfloat16),
        ("v4", False, jnp.bfloat16),
        ("ragged", True, jnp.bfloat16),
        ("v32", False, jnp.float16),
        ("v4", True, jnp.float16),
    ],
)
def test_gradients_compile_for_the_h100(name, deterministic, dtype):
    def loss(*args):
        out, lse = attend(*args, deterministic=deterministic)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    # A kernel that was compiled before, as the forward may have been, is not compiled again.
    *_, backward = compile_for_h100(jax.grad(loss, (0, 1)), *arguments(*SHAPES[name], dtype))
    fits(backward, spill_bytes=128)  # a few values around the additions to dKV, whose speed memory bounds


@pytest.mark.parametrize(
    ("batch", "heads", "cache"),
    [
        *itertools.product((1, 128), (128,), (jnp.bfloat16, jnp.float16, jnp.uint8)),
        (128, 64, jnp.uint8),  # one block a query: none to share rows with
    ],
)
def test_decode_compiles_for_the_h100(batch, heads, cache):
    quantized = cache == jnp.uint8
    q, kv, indices = arguments(batch, 2, heads, 576, 4096, 2048, False, jnp.bfloat16 if quantized else cache)
    if quantized:
        kv = jax.ShapeDtypeStruct((batch, 4096, 656), jnp.uint8)

    def decode(*args):
        return sparse_attention_decode(*args, v_head_dim=512, scale=0.04)

    (kernel,) = compile_for_h100(decode, q, kv, indices)
    fits(kernel, spill_bytes=16 if quantized else 0)  # three addresses of the dequantizing warpgroup


@pytest.mark.parametrize(
    ("width", "dtype", "most"), [(512, jnp.bfloat16, 4e-3), (576, jnp.bfloat16, 4e-3), (576, jnp.float16, 5e-4)]
)
def test_interpreted_forward_has_no_races_and_equals_the_reference(width, dtype, most):
    # One block takes both queries in turn; the second has few rows, and some indices name none.
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 64, width)), dtype)
    kv = jnp.asarray(rng.standard_normal((1, 150, width)), dtype)
    indices = jnp.asarray(rng.integers(-1, 150, (2, 128)), jnp.int32).at[1, 70:].set(-1)
    sinks = jnp.asarray(rng.standard_normal(64), jnp.float32)
    steps = jnp.ones(2, jnp.int32)
    interpret = mosaic.interpret_params(detect_races=True)
    out, lse = forward_kernel.forward(q, kv, indices, steps, sinks, scale=0.04, num_blocks=1, interpret=interpret)
    wide = q[None].astype(jnp.float32), kv.astype(jnp.float32), indices[None]
    expected, expected_lse = reference.sparse_attention(*wide, v_head_dim=512, scale=0.04, sinks=sinks)
    error = jnp.linalg.norm(out.astype(jnp.float32) - expected[0]) / jnp.linalg.norm(expected)
    assert error < most
    np.testing.assert_allclose(lse, expected_lse[0], atol=1e-5)


def test_refuses_what_it_cannot_do():
    def zeros(*shapes, dtype=jnp.bfloat16):
        return [jnp.zeros(shape, dtype) for shape in shapes]

    indices = jnp.zeros((1, 2, 8), jnp.int32)
    with pytest.raises(NotImplementedError, match="Hopper"):
        attend(*zeros((1, 2, 4, 576), (1, 9, 576)), indices)
    with mosaic.assume_hopper():
        with pytest.raises(NotImplementedError, match="bfloat16"):
            attend(*zeros((1, 2, 4, 576), (1, 9, 576), dtype=jnp.float32), indices)
        with pytest.raises(NotImplementedError, match="up to 576"):
            attend(*zeros((1, 2, 4, 640), (1, 9, 640)), indices)
        with pytest.raises(NotImplementedError, match="queries bfloat16"):
            sparse_attention_decode(
                *zeros((1, 2, 4, 576), dtype=jnp.float16), *zeros((1, 9, 656), dtype=jnp.uint8), indices,
                v_head_dim=512, scale=1.0,
            )  # fmt: skip


def test_cache_format_keeps_the_rotary_columns_and_rounds_the_rest():
    rows = jax.random.normal(jax.random.key(0), (3, 5, 576), jnp.bfloat16)
    cache = pack_cache(rows)
    assert cache.shape == (3, 5, 656)
    assert cache.dtype == jnp.uint8
    again = unpack_cache(cache)
    np.testing.assert_array_equal(again[..., 512:], rows[..., 512:])
    error = jnp.linalg.norm((again - rows).astype(jnp.float32)) / jnp.linalg.norm(rows.astype(jnp.float32))
    assert 1e-3 < error < 0.04
    np.testing.assert_array_equal(pack_cache(again), cache)
