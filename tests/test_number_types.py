"""Models in 16-bit numbers beside the same weights in float32."""

import numpy as np
import pytest
from flax import nnx

import dsparse

FAMILIES = ("deepseek_v3", "deepseek_v32", "deepseek_v4")
# relative error of half the tokens' logits; where an expert or a token is chosen otherwise, it is larger
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
@pytest.mark.parametrize("dtype", MOST)
def test_logits_are_near_float32(folder, tokens, dtype):
    segments = np.repeat([[0, 1, 2]], [3, 40, 27], axis=1).repeat(2, axis=0)
    exact, rounded = (
        np.asarray(dsparse.from_pretrained(folder, dtype=d)(tokens, segment_ids=segments)) for d in ("float32", dtype)
    )
    errors = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.isfinite(errors).all() and LEAST < np.median(errors) < MOST[dtype], np.median(errors)


def test_ragged_rows_are_continued_as_alone(folder, tokens):
    model = dsparse.from_pretrained(folder, dtype="float16")
    together = dsparse.generate(model, tokens, lengths=[70, 3], max_new_tokens=4, stop_tokens=())
    for row, length, text in zip(tokens, (70, 3), together, strict=True):
        alone = dsparse.generate(model, row[None, :length], max_new_tokens=4, stop_tokens=())
        np.testing.assert_array_equal(text, alone[0])
