import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import BIAS, random_batch, settings, small_model

from dsparse.errors import DsparseError
from dsparse.training.optimizer import learning_rate_schedule
from dsparse.training.step import is_decayed, make_train_step, merge, named_variables, write_back

GATE = BIAS.rpartition(".")[0]


@functools.cache
def compiled(**options):
    """Host copy of the first state, and the update."""
    options = {"batch_size": 8, "max_grad_norm": 0.1, "weight_decay": 0.5} | options
    state, update = make_train_step(small_model(), settings(**options))
    return jax.tree.map(np.array, state), update


def start(**options):
    state, update = compiled(**options)
    return jax.device_put(state), update


def arrays(state):
    return jax.tree.map(lambda a: np.array(a), state.params | state.frozen)


def gate_of(model):
    return model.stacks[0].blocks[1].mlp.gate


def plain_loss(model, batch):
    logits = jax.nn.log_softmax(model(batch.tokens, segment_ids=batch.segment_ids))
    picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * batch.weights) / jnp.sum(batch.weights)


def test_an_update_is_clipped_adamw_on_the_plain_loss():
    batch, model = random_batch(8, 16), small_model()
    graphdef, _ = nnx.split(model)
    variables = named_variables(model)
    (state, update), before = start(), {name: np.array(variable[...]) for name, variable in variables.items()}
    frozen = {name: jnp.asarray(before[name]) for name in state.frozen}
    params = {name: jnp.asarray(before[name]) for name in state.params}
    loss, gradients = jax.value_and_grad(lambda p: plain_loss(merge(graphdef, p | frozen), batch))(params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values()))
    assert norm > 0.1

    state, metrics = update(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert metrics["tokens"] == batch.weights.sum() and metrics["finite"] and int(state.step) == 1
    rate = float(metrics["learning_rate"])
    for name, gradient in gradients.items():  # the first AdamW step: mean and variance are bias-corrected to g and g^2
        g, decay = np.asarray(gradient) * 0.1 / norm, 0.5 * is_decayed(name, variables[name])
        expected = before[name] - rate * (g / (np.abs(g) + 1e-8) + decay * before[name])
        clear = np.abs(g) > 1e-5  # elsewhere the direction g / |g| is a matter of rounding
        np.testing.assert_allclose(np.asarray(state.params[name])[clear], expected[clear], atol=2e-5, err_msg=name)
        assert state.params[name].dtype == jnp.float32


def test_norms_and_biases_are_not_decayed():
    model = small_model(attention_bias=True)
    decayed = {name: is_decayed(name, variable) for name, variable in named_variables(model).items()}
    kept = {name for name, decay in decayed.items() if not decay}
    assert kept == {name for name in decayed if "norm" in name or "bias" in name}
    assert any("bias" in name for name in kept)


def test_accumulation_equals_one_large_batch():
    batch = random_batch(8, 16)
    batch = batch._replace(weights=batch.weights * (np.arange(8) % 3 != 0)[:, None])  # parts of unequal weight
    results = []
    for options in ({}, {"gradient_accumulation": 4}):
        state, update = start(**options)
        state, metrics = update(state, batch)
        results.append((metrics, arrays(state)))
    (one, whole), (many, parts) = results
    for name in ("loss", "grad_norm", "balance_loss", "tokens"):
        np.testing.assert_allclose(one[name], many[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(one["expert_load"], many["expert_load"])
    for name in whole:
        assert np.mean(np.abs(whole[name] - parts[name]) > 1e-4) < 1e-3, name  # a tiny gradient's sign may round away


def test_packed_documents_do_not_see_each_other():
    model, batch = small_model(), random_batch(1, 20)
    whole = model.hidden_states(batch.tokens, segment_ids=batch.segment_ids)[0]
    second = model.hidden_states(batch.tokens[:, 10:18])[0]
    np.testing.assert_allclose(whole[:, 10:18], second, atol=1e-5)


def test_router_biases_move_towards_underused_experts_and_balance_the_load():
    model, batch = small_model(), random_batch(8, 16)
    skewed = np.zeros(gate_of(model).e_score_correction_bias[...].shape, np.float32)
    skewed[:, 3] = 0.2
    gate_of(model).e_score_correction_bias.set_value(jnp.asarray(skewed))
    _, _, routings = model.hidden_states(batch.tokens, segment_ids=batch.segment_ids)
    load = np.asarray(routings[0].load)
    state, update = start(learning_rate=0.0, router_bias_update_rate=0.004)
    state = state._replace(frozen=state.frozen | {BIAS: jnp.asarray(skewed)})
    state, metrics = update(state, batch)
    np.testing.assert_allclose(state.frozen[BIAS], skewed + 0.004 * np.sign(load.mean() - load), atol=1e-6)
    np.testing.assert_allclose(metrics["expert_load"], load.max(-1) / load.mean(-1), rtol=1e-6)
    first = float(metrics["expert_load"].max())
    for _ in range(80):
        state, metrics = update(state, batch)
    assert first > 3.5 > 2.0 > float(metrics["expert_load"].max())


def test_the_balance_loss_is_the_sequence_wise_one():
    """DeepSeek-V3, equations 17-20, written out."""
    model, batch = small_model(), random_batch(8, 16)
    config, gate = model.config, gate_of(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, config.hidden_size)), jnp.float32)
    graphdef, state = nnx.split(gate)
    routing = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))(x, jnp.zeros((2, 16), jnp.int32), None)
    scores = jax.nn.sigmoid(x @ gate.weight[...][0].T)
    expected, k, e = 0.0, config.num_experts_per_tok, config.n_routed_experts
    for row in range(2):
        share = np.mean(scores[row] / scores[row].sum(-1, keepdims=True), axis=0)
        for expert in range(e):
            frequency = e / (k * 16) * np.sum(np.asarray(routing.experts[row]) == expert)
            expected += frequency * share[expert] / 2
    np.testing.assert_allclose(routing.balance_loss, expected, rtol=1e-5)

    moved = []
    for options in ({}, {"balance_loss_weight": 1.0}):
        state, update = start(**options)
        state, metrics = update(state, batch)
        moved.append((float(metrics["loss"]), np.asarray(state.optimizer[1][0].mu[f"{GATE}.weight"])))
    assert moved[0][0] == pytest.approx(moved[1][0]) and np.abs(moved[0][1] - moved[1][1]).max() > 1e-4


def test_an_update_that_is_not_finite_changes_nothing():
    state, update = start()
    state = state._replace(params=state.params | {"norm.weight": state.params["norm.weight"].at[3].set(jnp.nan)})
    before = jax.tree.map(np.array, state)
    state, metrics = update(state, random_batch(8, 16))
    assert not metrics["finite"] and np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_prediction_layers_that_get_no_gradient_stay_as_they_are():
    state, update = start()
    before = arrays(state)
    state, _ = update(state, random_batch(8, 16))
    after = arrays(state)
    ahead = [name for name in after if name.startswith("mtp.")]
    assert len(ahead) > 10 and set(state.frozen) == {*ahead, BIAS}
    for name in ahead:
        np.testing.assert_array_equal(before[name], after[name])
    model = small_model(seed=1)
    write_back(model, state)
    np.testing.assert_array_equal(model.lm_head.weight[...], after["lm_head.weight"])
    with_their_own_loss, _ = make_train_step(model, settings(mtp_loss_weight=0.1))
    assert {name for name in ahead if not name.endswith("e_score_correction_bias")} < set(with_their_own_loss.params)
    with pytest.raises(DsparseError, match="no multi-token prediction layers"):
        make_train_step(small_model(num_nextn_predict_layers=0), settings(mtp_loss_weight=0.1))


@pytest.mark.parametrize(("options", "tolerance"), [({"dtype": "bfloat16"}, 3e-2), ({"remat": "full"}, 1e-5)])
def test_precision_and_remat_change_the_loss_little(options, tolerance):
    losses = []
    for extra in ({}, options):
        state, update = start(**extra)
        for _ in range(2):
            state, metrics = update(state, random_batch(8, 16))
        losses.append(float(metrics["loss"]))
        assert {array.dtype for array in state.params.values()} == {jnp.dtype("float32")}
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_schedules_warm_up_and_fall_to_their_last_value():
    def rates(**options):
        schedule = learning_rate_schedule(settings(learning_rate=1.0, steps=10, warmup_steps=4, **options))
        return [float(schedule(step)) for step in range(10)]

    for schedule in ("cosine", "linear", "constant"):
        np.testing.assert_allclose(rates(schedule=schedule)[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates(schedule="linear")[4:], np.linspace(1, 0.1, 6), rtol=1e-6)
    assert rates(schedule="cosine")[-1] == pytest.approx(0.1) and rates(schedule="constant")[-1] == 1.0
    assert rates(schedule="cosine", final_learning_rate=0.0)[-1] == pytest.approx(0.0, abs=1e-7)
