"""Outputs and gradients of the sorted, dropless mixture against a dense loop over all experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsparse import ModelConfig
from dsparse.moe import MixtureOfExperts
from dsparse.params import Scope


def dense_loop(params, routing_bias, x, config):
    """Every expert on every token, weighted by what the router gives it: no sorting, no gathering."""
    scores = (
        jax.nn.sigmoid(x @ params["gate"].T)
        if config.scoring_func == "sigmoid"
        else jax.nn.softmax(x @ params["gate"].T)
    )
    choice = scores + routing_bias
    groups = choice.reshape(*choice.shape[:-1], config.n_group, -1)
    best = 2 if config.scoring_func == "sigmoid" else 1
    strength = jnp.sort(groups, axis=-1)[..., -best:].sum(-1)
    kept = strength >= jnp.sort(strength, axis=-1)[..., -config.topk_group, None]
    choice = jnp.where(kept[..., None], groups, -jnp.inf).reshape(choice.shape)
    picked = choice >= jnp.sort(choice, axis=-1)[..., -config.num_experts_per_tok, None]
    weights = jnp.where(picked, scores, 0.0)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdims=True)
    weights = weights * config.routed_scaling_factor
    out = 0.0
    for e in range(config.n_routed_experts):
        gate, up = params["gate_up"][e]
        out += weights[..., e, None] * ((jax.nn.silu(x @ gate.T) * (x @ up.T)) @ params["down"][e].T)
    gate, up = params["shared_gate_up"]
    return out + (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ params["shared_down"].T


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
@pytest.mark.parametrize("skew", [0.0, 4.0])  # 4.0: two experts get every token, the others none
def test_gradients_equal_a_dense_loop(family, skew):
    config = ModelConfig.tiny(family)
    if family == "deepseek_v2" and skew:
        pytest.skip("softmax routers have no selection bias to skew")
    layer = MixtureOfExperts(Scope(nnx.Rngs(0), jnp.dtype("float32")), config)
    rng = np.random.default_rng(0)
    gate = jnp.asarray(rng.normal(size=layer.gate.weight[...].shape), jnp.float32)
    layer.gate.weight.set_value(gate)
    bias = jnp.zeros(config.n_routed_experts)
    if skew:
        bias = bias.at[jnp.array([1, 2])].add(skew)
        layer.gate.e_score_correction_bias.set_value(bias)
    x, target = (jnp.asarray(rng.normal(size=(2, 19, config.hidden_size)), jnp.float32) for _ in range(2))
    tokens = jnp.zeros((2, 19), jnp.int32)
    graphdef, trained, rest = nnx.split(layer, nnx.Param, ...)

    def ours(trained, x):
        return jnp.sum(nnx.merge(graphdef, trained, rest)(x, tokens)[0] * target)

    params = {
        "gate": gate,
        "gate_up": layer.experts.gate_up_proj[...], "down": layer.experts.down_proj[...],
        "shared_gate_up": layer.shared_experts.gate_up_proj[...],
        "shared_down": layer.shared_experts.down_proj.weight[...],
    }  # fmt: skip
    value, (by_params, by_x) = jax.jit(jax.value_and_grad(ours, (0, 1)))(trained, x)
    expected, (expected_params, expected_x) = jax.jit(
        jax.value_and_grad(lambda p, x: jnp.sum(dense_loop(p, bias, x, config) * target), (0, 1))
    )(params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(by_x, expected_x, atol=1e-5)
    actual = {
        "gate": by_params.gate.weight[...],
        "gate_up": by_params.experts.gate_up_proj[...],
        "down": by_params.experts.down_proj[...],
        "shared_gate_up": by_params.shared_experts.gate_up_proj[...],
        "shared_down": by_params.shared_experts.down_proj.weight[...],
    }  # fmt: skip
    for name, gradient in actual.items():
        np.testing.assert_allclose(gradient, expected_params[name], atol=1e-5, err_msg=name)
        assert name == "gate" or np.abs(gradient).max() > 1e-3
    if skew:
        assert not np.asarray(actual["down"])[[0, 3, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "deepseek_v4"])
def test_padding_counts_in_neither_load_nor_balance_loss(family):
    config = ModelConfig.tiny(family)
    layer = MixtureOfExperts(Scope(nnx.Rngs(0), jnp.dtype("float32")), config)
    x = jax.random.normal(jax.random.key(1), (2, 24, config.hidden_size))
    tokens = jnp.arange(48).reshape(2, 24)
    segments = jnp.concatenate([jnp.ones((2, 9), jnp.int32), jnp.full((2, 8), 2), jnp.zeros((2, 7), jnp.int32)], axis=1)
    out, padded = layer(x, tokens, segments)
    expected, alone = layer(x[:, :17], tokens[:, :17])
    np.testing.assert_allclose(out[:, :17], expected, atol=1e-5)
    np.testing.assert_array_equal(padded.load, alone.load)
    assert padded.load.sum() == 2 * 17 * config.num_experts_per_tok
    np.testing.assert_allclose(padded.balance_loss, alone.balance_loss, rtol=1e-5)
