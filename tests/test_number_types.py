"""Models in 16-bit numbers beside the same weights in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsparse
from dsparse.compression import Compressor
from dsparse.params import Scope

FAMILIES = ("deepseek_v3", "deepseek_v32", "deepseek_v4")
# Relative error of the first tokens' logits; where an expert or a token is chosen otherwise, later ones' is larger.
FIRST = 12
LEAST, MOST = 1e-5, {"float16": 4e-3, "bfloat16": 3e-2}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    config = dsparse.ModelConfig.tiny(request.param, initializer_range=0.1)
    path = tmp_path_factory.mktemp("number_types") / request.param
    dsparse.save_pretrained(dsparse.Model(config, rngs=nnx.Rngs(0)), path)
    return path


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(2, 256, (2, 70)).astype(np.int32)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numbers too large for the type
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", MOST)
def test_logits_are_near_float32(folder, tokens, dtype, packed):
    segments = np.repeat([[0, 1, 2]], [3, 40, 27], axis=1).repeat(2, axis=0) if packed else None
    exact, rounded = (
        np.asarray(dsparse.from_pretrained(folder, dtype=d)(tokens, segment_ids=segments)) for d in ("float32", dtype)
    )
    errors = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    error = np.median(errors[:, :FIRST])
    assert np.isfinite(errors).all() and LEAST < error < MOST[dtype], error


@pytest.mark.parametrize("dtype", ["float32", *MOST])
def test_a_window_without_tokens_gives_numbers(dtype):
    config = dsparse.ModelConfig.tiny("deepseek_v4")
    compressor = Compressor(Scope(nnx.Rngs(0), jnp.dtype(dtype)), config, rate=2, head_dim=4, series=2)
    rows = jax.random.normal(jax.random.key(0), (1, 6, 16)).astype(dtype)
    values, gates = compressor._gathered(rows, jnp.array([[[-1, -1, -1, -1], [-1, -1, 0, 1]]]))
    weights = jax.nn.softmax(gates.astype(jnp.float32) + compressor._bias(), axis=2)
    assert np.isfinite(weights).all() and not weights[0, 1, :2].any() and np.isfinite(values).all()


def test_ragged_rows_are_continued_as_alone(folder, tokens):
    model = dsparse.from_pretrained(folder, dtype="float16")
    together = dsparse.generate(model, tokens, lengths=[70, 3], max_new_tokens=4, stop_tokens=())
    for row, length, text in zip(tokens, (70, 3), together, strict=True):
        alone = dsparse.generate(model, row[None, :length], max_new_tokens=4, stop_tokens=())
        np.testing.assert_array_equal(text, alone[0])
