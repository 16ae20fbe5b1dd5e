"""Grouped matmul kernels: interpreted on the CPU with race detection, and compiled for the H100 without one."""

import dataclasses

import h100
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_ins

from dsparse import reference
from dsparse.kernels import grouped_matmul as gm
from dsparse.kernels import grouped_matmul_quantized as quantized
from dsparse.kernels import mosaic, tilings

SIZES = [5, 0, 60, 31]  # of 112 rows: empty, ragged, and a tail past the last group
ROWS = 112


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles small enough to interpret; several to a group."""
    monkeypatch.setattr(tilings, "GROUPED", stand_ins.small_tilings())
    with mosaic.assume_hopper():
        yield


def normal(seed, shape, scale=1.0, dtype=jnp.bfloat16):
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def groups():
    for group, (size, end) in enumerate(zip(SIZES, np.cumsum(SIZES), strict=True)):
        yield group, slice(end - size, end)


def product(x, weights):
    out = np.zeros((x.shape[0], weights.shape[1]), np.float32)
    for group, rows in groups():
        out[rows] = x[rows] @ weights[group].T
    return out


def error(value, expected):
    value = np.asarray(value.astype(jnp.float32))
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def float32(*arrays):
    return (np.asarray(a.astype(jnp.float32)) for a in arrays)


@pytest.mark.parametrize(("dtype", "most"), [(jnp.bfloat16, 3e-3), (jnp.float16, 4e-4)])
def test_grouped_matmul_and_gradients(small_tiles, dtype, most):
    shapes = ((ROWS, 128), 1.0), ((4, 192, 128), 0.1), ((ROWS, 192), 1.0)
    x, weights, dy = (normal(seed, *shape, dtype) for seed, shape in enumerate(shapes))
    sizes = jnp.array(SIZES)
    x = x.at[sum(SIZES) :].set(jnp.nan)
    out, pull = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes, True), x, weights)
    d_x, d_w = pull(dy)
    x, weights, dy = float32(jnp.nan_to_num(x), weights, dy)
    expected_d_w = np.stack([dy[rows].T @ x[rows] for _, rows in groups()])
    assert error(out, product(x, weights)) < most
    assert error(d_x, product(dy, weights.transpose(0, 2, 1))) < most
    assert error(d_w, expected_d_w) < most
    assert not out[sum(SIZES) :].any() and not d_w[1].any()


def test_weight_gradient_of_groups_that_are_loaded_in_several_rounds():
    sizes = [300, 0, 330]
    dy, x = normal(0, (640, 128)), normal(1, (640, 128))
    with mosaic.assume_hopper():
        out = gm.grouped_wgrad(dy, x, jnp.array(sizes), interpret=True)
    dy, x = float32(dy, x)
    expected = np.stack([dy[:300].T @ x[:300], np.zeros((128, 128)), dy[300:630].T @ x[300:630]])
    assert error(out, expected) < 3e-3


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_few_rows(kind):
    """As a step of decoding has: tiles of their own."""
    sizes, rows, groups = jnp.array([3, 0, 7, 1]), 16, 4
    x, weights = normal(0, (rows, 128)), normal(1, (groups, 128, 128), 0.1)
    assert tilings.grouped("16 bits", rows, groups).rows < tilings.grouped("16 bits", 1000, groups).rows
    with mosaic.assume_hopper():
        if kind == "fp8":
            x, weights = (a.astype(jnp.float8_e4m3fn) for a in (x, weights))
            ones = jnp.ones((rows, 1)), jnp.ones((groups, 1, 1))
            out = quantized.grouped_matmul_fp8(x, ones[0], weights, ones[1], sizes, interpret=True)
        else:
            out = gm.grouped_matmul(x, weights, sizes, True)
    expected = reference.grouped_matmul(*(a.astype(jnp.float32) for a in (x, weights)), sizes)
    assert error(out, np.asarray(expected)) < 3e-3 and not out[11:].any()


def test_grouped_swiglu(small_tiles):
    x, weights = normal(0, (ROWS, 128)), normal(1, (4, 2, 128, 128), 0.1)
    out = gm.grouped_swiglu(x, weights, jnp.array(SIZES), interpret=True)
    x, weights = float32(x, weights)
    gate, up = product(x, weights[:, 0]), product(x, weights[:, 1])
    assert error(out, gate / (1 + np.exp(-gate)) * up) < 3e-3
    assert not out[sum(SIZES) :].any()


def test_fp8(small_tiles):
    x, weights = (normal(i, s).astype(jnp.float8_e4m3fn) for i, s in enumerate([(ROWS, 256), (4, 128, 256)]))
    x_scale, w_scale = (jax.random.uniform(jax.random.key(2 + i), s) for i, s in enumerate([(ROWS, 2), (4, 1, 2)]))
    out = quantized.grouped_matmul_fp8(x, x_scale, weights, w_scale, jnp.array(SIZES), interpret=True)
    x, x_scale, weights, w_scale = float32(x, x_scale, weights, w_scale)
    expected = product(x * x_scale.repeat(128, 1), weights * w_scale.repeat(128, 1).repeat(128, 2))
    assert error(out, expected) < 3e-3


def test_int8(small_tiles):
    x, weights = (
        jax.random.randint(jax.random.key(i), s, -127, 128, jnp.int8)
        for i, s in enumerate([(ROWS, 256), (4, 128, 256)])
    )
    x_scale, w_scale = (jax.random.uniform(jax.random.key(2 + i), s) for i, s in enumerate([(ROWS,), (4, 128)]))
    out = quantized.grouped_matmul_int8(x, x_scale, weights, w_scale, jnp.array(SIZES), interpret=True)
    x, x_scale, weights, w_scale = float32(x, x_scale, weights, w_scale)
    assert error(out, product(x * x_scale[:, None], weights * w_scale[..., None])) < 3e-3


@pytest.mark.parametrize("sizes", [[0, 0, 0], [7, 0, 1000], [300, 289, 1], [1024, 0, 0]])
def test_row_tiles_cover_every_row_once(sizes):
    rows = 1024
    tiles, count = gm.row_tiles(jnp.array(sizes), rows, 288)
    group_of_row = np.append(np.repeat(np.arange(3), sizes), np.full(rows - sum(sizes), 3))
    covered = np.zeros(rows, int)
    for group, base, first, end in np.asarray(tiles)[: int(count[0])]:
        assert base % gm.ROW_ALIGNMENT == 0 and base <= first < end <= base + 288 and base + 288 <= rows
        assert (group_of_row[first:end] == group).all()
        covered[first:end] += 1
    assert (covered == 1).all()


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def check_compiled(function, *args, most_spilled=0):
    kernels = h100.compile_for_h100(function, *args)
    assert kernels and all(k.spill_bytes <= most_spilled and not k.serialized_wgmma for k in kernels), kernels
    return kernels


def test_compiles_as_it_runs():
    check_compiled(gm.grouped_matmul, shape(65536, 7168), shape(256, 2048, 7168), shape(256, dtype=jnp.int32))


def highest_only() -> dict[str, tilings.RowTiling]:
    """The table with one height of a tile each: the highest uses the most registers."""
    return {name: dataclasses.replace(tiling, widths=tiling.widths[-1:]) for name, tiling in tilings.GROUPED.items()}


def backward(function):
    def run(x, weights, sizes, dy):
        return jax.vjp(lambda x, w: function(x, w, sizes), x, weights)[1](dy)

    return run


@pytest.mark.parametrize(
    ("function", "rows", "weights", "dtype"),
    [
        (gm.grouped_swiglu, 65536, (256, 2, 2048, 7168), jnp.bfloat16),
        (gm.grouped_matmul, 49153, (64, 1408, 2048), jnp.bfloat16),  # an odd number of column tiles; rows to pad
        (backward(gm.grouped_matmul), 65536, (256, 2048, 7168), jnp.bfloat16),
        (backward(gm.grouped_swiglu), 4096, (64, 2, 1408, 2048), jnp.bfloat16),
        (backward(gm.grouped_swiglu), 65536, (256, 2, 2048, 7168), jnp.float16),
        (backward(gm.grouped_matmul), 8, (2, 192, 128), jnp.bfloat16),
        (gm.grouped_matmul, 1024, (256, 2048, 7168), jnp.bfloat16),  # few rows
        (gm.grouped_swiglu, 1024, (256, 2, 2048, 7168), jnp.float16),
    ],
)
def test_compiles(monkeypatch, function, rows, weights, dtype):
    monkeypatch.setattr(tilings, "GROUPED", highest_only())
    sizes = shape(weights[0], dtype=jnp.int32)
    extra = () if function in (gm.grouped_matmul, gm.grouped_swiglu) else (shape(rows, weights[-2], dtype=dtype),)
    check_compiled(function, shape(rows, weights[-1], dtype=dtype), shape(*weights, dtype=dtype), sizes, *extra)


@pytest.mark.parametrize(("name", "rows"), [("fp8", 4096), ("fp8", 64), ("int8", 4096)])
def test_quantized_compiles(monkeypatch, name, rows):
    fp8 = name == "fp8"
    monkeypatch.setattr(tilings, "GROUPED", highest_only())
    dtype = jnp.float8_e4m3fn if fp8 else jnp.int8
    scales = ((rows, 4), (16, 8, 4)) if fp8 else ((rows,), (16, 1024))
    check_compiled(
        quantized.grouped_matmul_fp8 if fp8 else quantized.grouped_matmul_int8,
        shape(rows, 512, dtype=dtype),
        shape(*scales[0], dtype=jnp.float32),
        shape(16, 1024, 512, dtype=dtype),
        shape(*scales[1], dtype=jnp.float32),
        shape(16, dtype=jnp.int32),
        most_spilled=64,
    )


@pytest.mark.parametrize(
    ("x", "weights"),
    [
        (shape(64, 128, dtype=jnp.float32), shape(2, 128, 128, dtype=jnp.float32)),
        (shape(0, 128), shape(2, 128, 128)),
    ],
)
def test_unsupported_says_so(x, weights):
    with mosaic.assume_hopper(), pytest.raises(NotImplementedError, match="grouped matmul kernel"):
        jax.eval_shape(gm.grouped_matmul, x, weights, shape(2, dtype=jnp.int32))


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match="Hopper"):
        gm.grouped_matmul(normal(0, (64, 128)), normal(1, (2, 128, 128)), jnp.array([1, 2]))
