import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsparse.training import loss as loss_module
from dsparse.training.loss import cross_entropy


def plain(hidden, head, targets, weights):
    logits = jnp.einsum("BTD,VD->BTV", hidden, head).astype(jnp.float32)
    return -jnp.sum(weights * jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 50 * 3 * 4, 1 << 30])  # one time step, uneven chunks, all at once
def test_loss_and_gradients_equal_the_plain_ones(monkeypatch, chunk_bytes):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
    rng = np.random.default_rng(0)
    hidden, head = (
        jnp.asarray(rng.normal(size=(3, 11, 16)), jnp.float32),
        jnp.asarray(rng.normal(size=(50, 16)), jnp.float32),
    )
    targets = jnp.asarray(rng.integers(0, 50, (3, 11)))
    weights = jnp.asarray(rng.integers(0, 2, (3, 11)), jnp.float32)
    expected, expected_gradients = jax.value_and_grad(plain, (0, 1))(hidden, head, targets, weights)
    np.testing.assert_allclose(cross_entropy(hidden, head, targets, weights), expected, rtol=1e-6)
    actual, gradients = jax.value_and_grad(lambda h, w: 3.0 * cross_entropy(h, w, targets, weights), (0, 1))(
        hidden, head
    )
    np.testing.assert_allclose(actual, 3.0 * expected, rtol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, 3.0 * theirs, atol=2e-5)


def test_no_array_holds_the_logits_of_all_tokens():
    batch, time, vocab = 4, 4096, 16384

    def step(hidden, head, targets, weights):
        return jax.grad(cross_entropy, (0, 1))(hidden, head, targets, weights)

    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (
        ((batch, time, 8), jnp.bfloat16), ((vocab, 8), jnp.float32),
        ((batch, time), jnp.int32), ((batch, time), jnp.float32),
    )]  # fmt: skip
    memory = jax.jit(step).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * loss_module.CHUNK_BYTES < batch * time * vocab * 4
