"""The ops: every formulation against the plain reference, and the choice between implementations."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsparse import causal, dispatch, grouped, ops, reference


def random_experts(key, groups=5, width=24, depth=16):
    up, down = (jax.random.normal(k, s) for k, s in zip(
        jax.random.split(key), ((groups, 2, width, depth), (groups, depth, width)), strict=True))  # fmt: skip
    return grouped.Experts(up * 0.2, down * 0.2)


def dense_experts(x, choice, weights, experts):
    """Every expert on every token, then the choice."""
    gate_up = jnp.einsum("td,egfd->tegf", x, experts.gate_up)
    out = jnp.einsum("tef,edf->ted", jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1], experts.down)
    chosen = jax.nn.one_hot(choice, experts.gate_up.shape[0])  # the number past the last expert gives zeros
    return jnp.einsum("ted,tke,tk->td", out, chosen, weights)


sorted_by_reference = functools.partial(
    grouped.sorted_expert_mlp,
    swiglu_rows=lambda x, experts, sizes: reference.swiglu(
        *(reference.grouped_matmul(x, experts.gate_up[:, half], sizes) for half in range(2))
    ),
    down_rows=lambda x, experts, sizes: reference.grouped_matmul(x, experts.down, sizes),
)


@pytest.mark.parametrize(
    "formulation", [grouped.expert_mlp, sorted_by_reference], ids=["blocks in turns", "sorted rows"]
)
@pytest.mark.parametrize("tokens", [1, 3, 9, 70])
@pytest.mark.parametrize("chosen", [1, 3])
def test_experts_equal_the_dense_computation(formulation, tokens, chosen):
    keys = jax.random.split(jax.random.key(tokens), 4)
    x, experts = jax.random.normal(keys[0], (tokens, 16)), random_experts(keys[1])
    choice = jax.random.randint(keys[2], (tokens, chosen), 0, 6).at[0].set(5)  # 5: nobody; expert 4 may stay empty
    choice = jnp.where(choice == 2, 1, choice)  # expert 2 is empty, 1 is crowded
    weights = jax.random.uniform(keys[3], (tokens, chosen))

    def loss(run, x, weights, experts):
        return jnp.sum(jnp.sin(run(x, choice, weights, experts)))

    np.testing.assert_allclose(
        formulation(x, choice, weights, experts), dense_experts(x, choice, weights, experts), atol=1e-5
    )
    ours, expected = (jax.grad(loss, (1, 2, 3))(run, x, weights, experts) for run in (formulation, dense_experts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)
    assert not np.any(ours[2].gate_up[2]), "an expert without tokens has a gradient of exactly zero"


@pytest.mark.parametrize("copied", [1, 7 * 2 * 3 * 24 * 16], ids=["a block a turn", "seven blocks a turn"])
def test_gradients_of_bfloat16_experts_are_summed_in_float32(monkeypatch, copied):
    keys = jax.random.split(jax.random.key(1), 4)
    x, experts = jax.random.normal(keys[0], (4000, 16), jnp.bfloat16), random_experts(keys[1])
    experts = jax.tree.map(lambda w: w.astype(jnp.bfloat16), experts)
    choice = jnp.where(jax.random.uniform(keys[2], (4000, 2)) < 0.9, jnp.array([1, 3]), jnp.array([0, 5]))  # 4 is empty
    weights = jax.random.uniform(keys[3], (4000, 2))

    def gradient(run, *arguments):
        return jax.grad(lambda e: jnp.sum(jnp.sin(run(arguments[0], choice, weights, e).astype(jnp.float32))))(
            arguments[1]
        )

    expected = gradient(dense_experts, *jax.tree.map(lambda a: a.astype(jnp.float32), (x, experts)))
    monkeypatch.setattr(grouped, "COPIED_BYTES", copied)
    ours = gradient(grouped.expert_mlp, x, experts)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        for expert in range(5):  # 28 blocks of experts 1 and 3: added in bfloat16, 6e-3
            error = jnp.linalg.norm(a[expert].astype(jnp.float32) - b[expert])
            assert error <= 4e-3 * jnp.linalg.norm(b[expert]), (expert, error / jnp.linalg.norm(b[expert]))


def test_weights_are_copied_in_turns(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    x, experts = jax.random.normal(keys[0], (50, 16)), random_experts(keys[1])
    choice, weights = jax.random.randint(keys[2], (50, 2), 0, 5), jnp.ones((50, 2))
    whole = grouped.expert_mlp(x, choice, weights, experts)
    monkeypatch.setattr(grouped, "COPIED_BYTES", 3 * 4 * 16 * 24 * 3)
    np.testing.assert_allclose(grouped.expert_mlp(x, choice, weights, experts), whole, atol=1e-6)


@pytest.mark.parametrize("sizes", [[3, 0, 7, 0, 1], [0, 0, 0, 0, 0], [0, 20, 0, 0, 0], [4, 4, 4, 4, 4]])
def test_grouped_matmul_equals_reference(sizes):
    x, weights = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((20, 8), (5, 6, 8))))
    sizes = jnp.array(sizes)
    expected = reference.grouped_matmul(x, weights, sizes)
    np.testing.assert_allclose(ops.grouped_matmul(x, weights, sizes), expected, atol=1e-5)
    assert not np.any(expected[int(sizes.sum()) :])


def test_fp8_blocks_with_ragged_edges():
    weight = jax.random.normal(jax.random.key(0), (200, 300)).astype(jnp.float8_e4m3fn)
    scale = jax.random.uniform(jax.random.key(1), (2, 3), minval=0.5)
    expected = np.asarray(weight, np.float32).copy()
    for row in range(200):
        for column in range(300):
            expected[row, column] *= scale[row // 128, column // 128]
    np.testing.assert_allclose(reference.dequantize(weight, scale, jnp.float32), expected, rtol=1e-6)
    x = jax.random.normal(jax.random.key(2), (3, 300))
    np.testing.assert_allclose(ops.linear(x, weight, scale), x @ expected.T, atol=2e-4)
    with pytest.raises(ValueError, match="needs its block scales"):
        ops.linear(x, weight)


@pytest.mark.parametrize("block", [256, 64, 16])
def test_causal_attention_by_blocks_equals_one_mask(block, monkeypatch):
    monkeypatch.setattr(causal, "QUERY_BLOCK", block)
    q, k = (jax.random.normal(jax.random.key(i), (2, 300, 3, 8)) for i in range(2))
    v, d_out = (jax.random.normal(jax.random.key(i), (2, 300, 3, 5)) for i in range(2, 4))
    segments = jnp.sort(jax.random.randint(jax.random.key(4), (2, 300), 0, 4), axis=1)
    index = jnp.arange(300)
    keep = (index[:, None] >= index) & (segments[:, :, None] == segments[:, None])

    def with_gradients(attend):
        out, gradients = jax.vjp(attend, q, k, v)
        return out, *gradients(d_out)

    ours = with_gradients(lambda q, k, v: ops.causal_attention(q, k, v, scale=0.3, segment_ids=segments))
    expected = with_gradients(lambda q, k, v: reference.causal_attention(q, k, v, keep, 0.3))
    for found, right in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)


def test_gradients_of_causal_attention_keep_each_inputs_dtype():
    q, k, v = (jax.ShapeDtypeStruct((1, 9, 2, 4), dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16))
    attend = functools.partial(causal.causal_attention, scale=1.0, segment_ids=None)
    gradients = jax.eval_shape(jax.grad(lambda *args: jnp.sum(attend(*args).astype(jnp.float32)), (0, 1, 2)), q, k, v)
    assert [g.dtype for g in gradients] == [x.dtype for x in (q, k, v)]


def test_a_named_implementation_is_that_one_or_an_error():
    x, weights, sizes = jnp.ones((4, 8)), jnp.ones((2, 8, 8)), jnp.array([2, 2])
    np.testing.assert_allclose(ops.grouped_matmul(x, weights, sizes, implementation="xla"), 8.0)
    with pytest.raises(NotImplementedError, match="needs a GPU, found cpu"):
        ops.grouped_matmul(x, weights, sizes, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="no implementation 'cuda'"):
        ops.grouped_matmul(x, weights, sizes, implementation="cuda")


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "served", {})
    with caplog.at_level(logging.INFO, "dsparse.ops"):
        for _ in range(3):
            ops.grouped_matmul(jnp.ones((4, 8)), jnp.ones((2, 8, 8)), jnp.array([2, 2]))
    assert [record.getMessage() for record in caplog.records] == [
        "grouped_matmul is served by xla (mosaic_gpu: needs a GPU, found cpu)"
    ]
