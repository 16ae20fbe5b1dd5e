"""Training on eight virtual devices equals training on one."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small import random_batch, settings, small_model

from dsparse.errors import DsparseError
from dsparse.sharding import named_sharding
from dsparse.training.step import make_train_step

EXPERTS = "stacks.0.blocks.1.mlp.experts.gate_up_proj"  # [layers, experts, gate|up, mlp, embed]
HEAD = "lm_head.weight"  # [vocab, embed]


def two_updates(mesh, parts):
    """Loss and gradient norm of two updates, the first update's gradients (its mean in AdamW), and the last state."""
    config = settings(
        batch_size=16, mesh=mesh, gradient_accumulation=parts, balance_loss_weight=1e-2, max_grad_norm=0.0
    )
    model = small_model(mesh=mesh, num_nextn_predict_layers=0)
    state, update = make_train_step(model, config)
    scalars, gradients = [], None
    for seed in range(2):
        batch = random_batch(16, 32, seed=seed)
        if mesh:
            batch = jax.device_put(batch, named_sharding(("batch", None), batch.tokens.shape, model.mesh))
        state, metrics = update(state, batch)
        scalars.append([float(metrics[name]) for name in ("loss", "grad_norm", "balance_loss", "tokens")])
        gradients = gradients or jax.tree.map(np.array, state.optimizer[1][0].mu)
    return np.array(scalars), gradients, state


@functools.cache
def on_one_device():
    return two_updates(None, 1)


@pytest.mark.parametrize(
    ("mesh", "parts", "experts", "head"),
    [
        ("data=2,tensor=4", 1, P(None, None, None, "tensor", None), P("tensor", None)),
        ("fsdp=8", 1, P(None, None, None, None, "fsdp"), P(None, "fsdp")),
        ("data=2,fsdp=2,expert=2", 2, P(None, "expert", None, None, "fsdp"), P(None, "fsdp")),
        pytest.param("expert=8", 1, P(None, "expert", None, None, None), P(None, None), marks=pytest.mark.heavy),
        pytest.param("data=8", 2, P(None, None, None, None, None), P(None, None), marks=pytest.mark.heavy),
        pytest.param(
            "fsdp=2,expert=2,tensor=2",
            1,
            P(None, "expert", None, "tensor", "fsdp"),
            P("tensor", "fsdp"),
            marks=pytest.mark.heavy,
        ),
    ],
)
def test_a_mesh_changes_where_not_what(mesh, parts, experts, head):
    expected, expected_gradients, one = on_one_device()
    scalars, gradients, state = two_updates(mesh, parts)
    np.testing.assert_allclose(scalars, expected, rtol=2e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected_gradients[name], atol=1e-6, err_msg=name)
    for name, value in (one.params | one.frozen).items():
        other = np.asarray((state.params | state.frozen)[name])
        assert np.mean(np.abs(other - value) > 1e-4) < 1e-3, name  # AdamW divides tiny gradients by themselves
    for arrays in (state.params, state.optimizer[1][0].mu, state.optimizer[1][0].nu):
        assert arrays[EXPERTS].sharding.spec == experts and arrays[HEAD].sharding.spec == head


def test_a_batch_the_mesh_does_not_divide_is_refused():
    config = settings(batch_size=6, mesh="data=4")
    with pytest.raises(DsparseError, match="mesh data=4: its 4 parts of the batch do not divide the 6 rows"):
        make_train_step(small_model(mesh="data=4"), config)
