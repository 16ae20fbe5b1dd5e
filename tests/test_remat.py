"""What the backward pass computes again must not change what it computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsparse
from dsparse.remat import POLICIES

FAMILIES = {
    "deepseek_v3": {},
    "deepseek_v32": {"index_topk": 8},
    "deepseek_v4": {
        "index_topk": 8,
        "layer_types": ["compressed_sparse_attention"] * 4,
        "num_hash_layers": 0,
        "num_hidden_layers": 4,
    },
}


@functools.cache
def gradient_of(family: str, policy: str):
    """The gradient of a loss: its compiled program, its operations as text, and the model's arrays."""
    config = dsparse.ModelConfig.tiny(family, **FAMILIES[family])
    graphdef, state = nnx.split(dsparse.Model(config, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 64))

    def loss(state):
        model = nnx.merge(graphdef, state)
        model.remat = policy
        return jnp.mean(jnp.square(model.hidden_states(tokens)[0]))

    traced = jax.jit(jax.grad(loss, allow_int=True)).trace(state)
    return traced.lower().compile(), str(traced.jaxpr), state


def leaves(family: str, policy: str):
    program, _, state = gradient_of(family, policy)
    gradient = program(state)
    return [np.array(leaf) for leaf in jax.tree.leaves(gradient) if leaf.dtype == jnp.float32]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same(family):
    expected, *others = (leaves(family, policy) for policy in POLICIES)
    assert sum(np.abs(leaf).max() > 0 for leaf in expected) > len(expected) / 2
    for other in others:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), other, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_takes_less_memory_and_runs_no_choice_attention_or_expert_again(family):
    memory, operations = {}, {}
    for policy in POLICIES:
        program, text, _ = gradient_of(family, policy)
        memory[policy] = program.memory_analysis().temp_size_in_bytes
        operations[policy] = {name: text.count(f"{name}[") for name in ("top_k", "sort", "while", "dot_general")}
    none, selective, full = (operations[policy] for policy in ("none", "selective", "full"))
    assert memory["full"] < memory["selective"] < 0.8 * memory["none"]
    assert all(selective[name] == none[name] < full[name] for name in ("top_k", "sort"))
    assert selective["while"] == none["while"]  # experts in turns
    again = selective["dot_general"] - none["dot_general"]  # up-projections, and queries moved into latent space
    assert 0 < again < (full["dot_general"] - none["dot_general"]) / 2
