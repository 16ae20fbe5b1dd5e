"""Multi-token prediction against transformers' own, its loss and gradients, and speculative decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from reference_models import random_model
from transformers.modeling_layers import MtpModel

import dsparse
from dsparse import mtp
from dsparse.training import TrainConfig, make_train_step
from dsparse.training.data import Batch
from dsparse.training.loss import cross_entropy

FAMILIES = ["deepseek_v3", "deepseek_v32"]


def model_with(family: str, layers: int) -> dsparse.Model:
    config = dsparse.ModelConfig.tiny(family, num_nextn_predict_layers=layers, initializer_range=0.1)
    return dsparse.Model(config, rngs=nnx.Rngs(0))


def random_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 256, (rows, length)).astype(np.int32)


def run_layers(model: dsparse.Model, tokens) -> list[np.ndarray]:
    """Logits of every layer, at every position that has the tokens it reads."""

    @jax.jit
    def run(state, tokens):
        merged = nnx.merge(graphdef, state)
        hidden = merged.norm(merged.hidden_states(tokens)[0])
        targets, found = jnp.roll(tokens, -1, axis=1), []
        context = merged.context(tokens, None, None)
        for depth in range(len(merged.mtp)):
            hidden, _ = mtp.predict(merged, depth, hidden, jnp.roll(targets, -depth, axis=1), context)
            found.append(mtp.logits(merged, depth, hidden))
        return found

    graphdef, state = nnx.split(model)
    return [np.asarray(x)[:, : tokens.shape[1] - 1 - depth] for depth, x in enumerate(run(state, jnp.asarray(tokens)))]


def test_logits_equal_transformers(tmp_path):
    """Two layers; transformers reads them from the file that dsparse loads too."""
    from safetensors.torch import load_file, save_file

    reference = random_model("deepseek_v3", num_mtp_layers=2)
    reference.save_pretrained(tmp_path)
    drafter = MtpModel(reference, 2).float().eval()
    donor = random_model("deepseek_v3", seed=1, num_hidden_layers=5)
    tensors, file = {}, tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(2)
    for depth in range(2):
        layer, prefix = drafter.layers[depth], f"model.layers.{3 + depth}."
        layer.mtp_block.load_state_dict(donor.model.layers[3 + depth].state_dict())
        for name in ("enorm", "hnorm", "eh_proj", "post_norm"):
            weight = getattr(layer, name).weight
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2 + (weight.ndim == 1)
            tensors[prefix + name.replace("post_norm", "shared_head.norm") + ".weight"] = weight.data
    donor.save_pretrained(tmp_path / "donor")
    stored = load_file(tmp_path / "donor" / "model.safetensors")
    tensors |= {name: stored[name] for name in stored if ".layers.3." in name or ".layers.4." in name}
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    model = dsparse.from_pretrained(tmp_path, dtype="float32")
    assert len(model.mtp) == 2
    tokens = random_tokens(2, 40)
    ids = torch.tensor(tokens).long()
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True).hidden_states[-1]
        for depth, ours in enumerate(run_layers(model, tokens)):
            count = 39 - depth
            positions = torch.arange(1 + depth, 1 + depth + count)[None]
            hidden = drafter.forward_layer(depth, hidden[:, :count], positions, None, input_ids=ids[:, 1 + depth :])
            np.testing.assert_allclose(ours, reference.lm_head(hidden).numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 2])
def test_speculative_decoding_changes_nothing(family, layers):
    model, prompts, lengths = model_with(family, layers), random_tokens(2, 20), [20, 13]
    ordinary = dsparse.generate(model, prompts, lengths=lengths, max_new_tokens=30, stop_tokens=())
    speculative = dsparse.generate(
        model, prompts, lengths=lengths, max_new_tokens=30, stop_tokens=(), speculative="mtp"
    )
    np.testing.assert_array_equal(speculative, ordinary)
    stop = [int(ordinary[0, 7])]
    ordinary = dsparse.generate(model, prompts, lengths=lengths, max_new_tokens=30, stop_tokens=stop)
    speculative = dsparse.generate(
        model, prompts, lengths=lengths, max_new_tokens=30, stop_tokens=stop, speculative="mtp"
    )
    np.testing.assert_array_equal(speculative, ordinary)


def test_loss_is_the_cross_entropy_of_the_token_after_next():
    """By hand from the layers' logits, over packed segments: no target beyond a segment."""
    model, tokens = model_with("deepseek_v3", 2), random_tokens(2, 24)
    segments = np.repeat([[1, 2]], [15, 9], axis=1).repeat(2, axis=0).astype(np.int32)
    inside = segments[:, 1:] == segments[:, :-1]
    inputs, targets, weights = tokens[:, :-1], tokens[:, 1:], inside.astype(np.float32)
    ids, read_segments = jnp.asarray(targets), jnp.asarray(segments[:, :-1])
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss(state):
        merged = nnx.merge(graphdef, state)
        normed = merged.norm(merged.hidden_states(jnp.asarray(inputs), segment_ids=read_segments)[0])
        return mtp.loss(merged, normed, ids, jnp.asarray(weights), read_segments, cross_entropy)

    expected = 0.0
    for start, stop in ((0, 15), (15, 24)):
        for depth, logits in enumerate(run_layers(model, tokens[:, start:stop])):
            log_softmax = np.asarray(jax.nn.log_softmax(logits[:, :-1], axis=-1))
            expected -= np.take_along_axis(log_softmax, tokens[:, start + 2 + depth : stop, None], axis=-1).sum() / 2
    np.testing.assert_allclose(loss(state), expected, rtol=1e-5)


def test_training_teaches_the_layer_and_raises_acceptance():
    """A repeating text: after some updates drafts are accepted; without the loss weight the layer stays as it is."""
    tokens = np.tile(np.arange(3, 19, dtype=np.int32), 5)[None, :65].repeat(2, axis=0)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, 64), np.float32), np.ones((2, 64), np.int32))
    kept = {}
    for weight in (0.3, 0.0):
        model = model_with("deepseek_v3", 1)
        before = np.asarray(model.mtp[0].eh_proj.weight[...])
        options = {
            "model": "-",
            "data": ("-",),
            "batch_size": 2,
            "sequence_length": 64,
            "learning_rate": 5e-3,
            "warmup_steps": 0,
        }
        state, step = make_train_step(model, TrainConfig(**options, steps=40, mtp_loss_weight=weight))
        for _ in range(40 if weight else 2):
            state, _ = step(state, batch)
        arrays = state.params | state.frozen
        kept[weight] = (before, np.asarray(arrays["mtp.0.eh_proj.weight"]))
        if weight:
            from dsparse.training.step import write_back

            write_back(model, state)
            lengths = np.asarray([20], np.int32)
            out, acceptance = mtp.speculative_generate(model, tokens[:1, :20], lengths, 30, 64, ())
            assert acceptance.rate > 0.8, acceptance
            np.testing.assert_array_equal(
                out, dsparse.generate(model, tokens[:1, :20], max_new_tokens=30, stop_tokens=())
            )
    assert np.abs(kept[0.3][1] - kept[0.3][0]).max() > 1e-3
    np.testing.assert_array_equal(*kept[0.0])


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (0, {"speculative": "mtp"}, "no multi-token prediction layers"),
        (1, {"speculative": "draft"}, "speculative 'draft' is not supported"),
        (1, {"speculative": "mtp", "temperature": 0.5}, "greedy"),
    ],
)
def test_bad_requests_are_explained(layers, options, message):
    with pytest.raises(dsparse.DsparseError, match=message):
        dsparse.generate(model_with("deepseek_v3", layers), random_tokens(1, 5), **options)
