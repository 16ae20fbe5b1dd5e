"""Top-k kernel: compiled for the H100 (Mosaic GPU's interpreter does not run its per-thread code; benchmarks/kernels
/topk.py --check compares it with numpy on the GPU)."""

import h100
import jax
import jax.numpy as jnp
import pytest

from dsparse.kernels import mosaic
from dsparse.kernels.topk import topk


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize(
    ("rows", "width", "k", "passes", "most_spilled"),
    [
        # Writing rows without ties by themselves spills 92 bytes more, once a row: 0.228 instead of 0.251 ms.
        (2048, 32768, 2048, 1, 136),
        (7, 5000, 512, 1, 64),
        (512, 131072, 4096, 2, 64),
        (3, 33000, 513, 2, 64),
        (1, 1, 1, 1, 64),
    ],
)
def test_compiles(rows, width, k, passes, most_spilled):
    kernels = h100.compile_for_h100(
        lambda scores, lengths: topk(scores, k, lengths), shape(rows, width), shape(rows, dtype=jnp.int32)
    )
    assert len(kernels) == passes
    assert all(kernel.spill_bytes <= most_spilled for kernel in kernels), kernels


@pytest.mark.parametrize(
    ("scores", "k"),
    [(shape(4, 8192, dtype=jnp.bfloat16), 512), (shape(4, 8192), 5000), (shape(4, 100), 512), (shape(0, 100), 5)],
)
def test_unsupported_says_so(scores, k):
    with mosaic.assume_hopper(), pytest.raises(NotImplementedError, match="top-k kernel"):
        jax.eval_shape(lambda s: topk(s, k), scores)


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match="Hopper"):
        topk(jnp.zeros((2, 1024)), 512)
