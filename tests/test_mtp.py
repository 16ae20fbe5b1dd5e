"""Multi-token prediction against transformers' own, its loss and gradients, and speculative decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from reference_models import random_model
from transformers.modeling_layers import MtpModel
from v4_models import random_reference

import dsparse
from dsparse import generation, mtp
from dsparse.model import split
from dsparse.training import TrainConfig, make_train_step
from dsparse.training.data import Batch
from dsparse.training.loss import cross_entropy
from dsparse.training.step import write_back

KINDS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
SMALL = {  # one layer of each kind: compiling is what takes time here
    "deepseek_v3": {"num_hidden_layers": 2},
    "deepseek_v32": {"num_hidden_layers": 2},
    "deepseek_v4": {"num_hidden_layers": 3, "layer_types": KINDS, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
}


def model_with(family: str, layers: int) -> dsparse.Model:
    options = SMALL[family] | {"num_nextn_predict_layers": layers, "initializer_range": 0.1}
    return dsparse.Model(dsparse.ModelConfig.tiny(family, **options), rngs=nnx.Rngs(0))


def random_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 256, (rows, length)).astype(np.int32)


def run_layers(model: dsparse.Model, tokens) -> list[np.ndarray]:
    """Logits of every layer, at every position that has the tokens it reads."""

    @jax.jit
    def run(state, tokens):
        merged = nnx.merge(graphdef, state)
        context, found = merged.context(tokens, None, None), []
        carried = mtp.first_input(merged, merged.residual(context)[0])
        for depth in range(len(merged.mtp)):
            carried, normed, _ = mtp.predict(merged, depth, carried, jnp.roll(tokens, -1 - depth, axis=1), context)
            found.append(mtp.logits(merged, depth, normed))
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


def test_v4_logits_equal_the_published_formula(tmp_path):
    """Two layers; transformers has none for V4: its decoder layers, joined as in DeepSeek's inference code."""
    from safetensors.torch import load_file, save_file
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead

    reference, kinds = (
        random_reference(seed=4),
        {"layer_types": ["sliding_attention"] * 2, "mlp_layer_types": ["moe"] * 2},
    )
    donor = random_reference(seed=5, num_hidden_layers=2, **kinds)
    reference.config.num_nextn_predict_layers = 2
    reference.save_pretrained(tmp_path)
    donor.save_pretrained(tmp_path / "donor")
    stored, generator = load_file(tmp_path / "donor" / "model.safetensors"), torch.Generator().manual_seed(6)
    added = {k.replace("model.layers", "mtp"): v for k, v in stored.items() if ".layers." in k}
    for depth in range(2):
        shapes = {"e_proj.weight": (64, 64), "h_proj.weight": (64, 64), "hc_head_fn": (2, 128), "hc_head_base": (2,)}
        shapes |= {"hc_head_scale": (1,), "enorm.weight": (64,), "hnorm.weight": (64,), "norm.weight": (64,)}
        for name, shape in shapes.items():
            added[f"mtp.{depth}.{name}"] = torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | added, file, metadata={"format": "pt"})

    model, tokens = dsparse.from_pretrained(tmp_path, dtype="float32"), random_tokens(2, 40)
    ids, hyper = torch.tensor(tokens).long(), DeepseekV4HyperHead(donor.config)
    with torch.no_grad():
        found = []
        reference.model.hc_head.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        reference(ids)
        streams = found[0]
        for depth, ours in enumerate(run_layers(model, tokens)):
            part = {k.removeprefix(f"mtp.{depth}."): v for k, v in added.items() if k.startswith(f"mtp.{depth}.")}

            def norm(x, name, part=part):
                return torch.nn.functional.rms_norm(x, (64,), part[name + ".weight"], donor.config.rms_norm_eps)

            read = reference.model.embed_tokens(ids[:, 1 + depth :])
            streams = streams[:, : read.shape[1]]
            x = (norm(read, "enorm") @ part["e_proj.weight"].T)[:, :, None]
            x = x + norm(streams, "hnorm") @ part["h_proj.weight"].T
            positions = torch.arange(read.shape[1])[None]
            mask = create_sliding_window_causal_mask(donor.config, read, None, None, position_ids=positions)
            rope = {"main": donor.model.rotary_emb(read, position_ids=positions, layer_type="main")}
            streams = donor.model.layers[depth](
                x, position_embeddings=rope, position_ids=positions, attention_mask=mask
            )
            hyper.load_state_dict({f"hc_{name}": part[f"hc_head_{name}"] for name in ("fn", "base", "scale")})
            expected = reference.lm_head(norm(hyper(streams), "norm"))
            np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4, rtol=0)


def generations(model, prompts, lengths, **options):
    """Ordinary and speculative continuations, what each told the callback, and the drafts accepted."""
    found, told, acceptance = [], [], []
    for speculative in (None, "mtp"):
        calls = []
        found.append(
            dsparse.generate(
                model, prompts, lengths=lengths, speculative=speculative, on_acceptance=acceptance.append,
                on_token=lambda tokens, finished, calls=calls: calls.append((tokens.tolist(), finished.tolist())), **options,
            )
        )  # fmt: skip
        told.append(calls)
    return found, told, acceptance


@pytest.mark.parametrize(("family", "layers"), [("deepseek_v3", 1), ("deepseek_v32", 2), ("deepseek_v4", 2)])
def test_speculative_decoding_changes_nothing(family, layers):
    """Ragged prompts, one shorter than the layers reach back; stop tokens; the same calls of the callback."""
    model, prompts, lengths = model_with(family, layers), random_tokens(3, 20), [20, 13, 1]
    ordinary = dsparse.generate(model, prompts, lengths=lengths, max_new_tokens=30, stop_tokens=())
    stop = [int(ordinary[0, 7]), int(ordinary[1, 3])]
    (ordinary, speculative), told, _ = generations(model, prompts, lengths, max_new_tokens=30, stop_tokens=stop)
    np.testing.assert_array_equal(speculative, ordinary)
    assert told[0] == told[1] and 4 < len(told[0]) <= 30


def test_chunks_of_a_prompt_fill_the_same_caches(monkeypatch):
    model, prompts, lengths = model_with("deepseek_v4", 2), random_tokens(2, 40), np.array([40, 17])
    structure, state = split(model)
    filled = []
    for size in (64, 16):
        monkeypatch.setattr(generation, "PREFILL_CHUNK", size)
        caches = generation._empty_caches(structure, state, 2, 48, 2)
        filled.append(generation.prefill(structure, state, caches, prompts, lengths))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), *filled)


def test_sampling_with_drafts_draws_the_same_tokens():
    """Accepting the drafts that sampling would have drawn keeps the distribution, even the very tokens of a seed."""
    model, prompts = model_with("deepseek_v3", 2), random_tokens(2, 20)
    options = {"max_new_tokens": 25, "temperature": 0.7, "top_p": 0.9, "seed": 5, "stop_tokens": ()}
    (ordinary, speculative), _, _ = generations(model, prompts, None, **options)
    np.testing.assert_array_equal(speculative, ordinary)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_loss_is_the_cross_entropy_of_the_token_after_next(family):
    """By hand from the layers' logits, over packed segments: no target beyond a segment."""
    model, tokens = model_with(family, 2), random_tokens(2, 24)
    segments = np.repeat([[1, 2]], [15, 9], axis=1).repeat(2, axis=0).astype(np.int32)
    inside = segments[:, 1:] == segments[:, :-1]
    inputs, targets, weights = tokens[:, :-1], tokens[:, 1:], inside.astype(np.float32)
    ids, read_segments = jnp.asarray(targets), jnp.asarray(segments[:, :-1])
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss(state):
        merged = nnx.merge(graphdef, state)
        residual, _, _ = merged.residual(merged.context(jnp.asarray(inputs), None, read_segments))
        return mtp.loss(merged, residual, ids, jnp.asarray(weights), read_segments, cross_entropy)

    expected = 0.0
    for start, stop in ((0, 15), (15, 24)):
        for depth, logits in enumerate(run_layers(model, tokens[:, start:stop])):
            log_softmax = np.asarray(jax.nn.log_softmax(logits[:, :-1], axis=-1))
            expected -= np.take_along_axis(log_softmax, tokens[:, start + 2 + depth : stop, None], axis=-1).sum() / 2
    np.testing.assert_allclose(loss(state), expected, rtol=1e-5)


def repeating_text() -> np.ndarray:
    return np.tile(np.arange(3, 19, dtype=np.int32), 5)[None, :65].repeat(2, axis=0)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_training_teaches_the_layers_and_raises_acceptance(family):
    model, tokens = model_with(family, 2), repeating_text()
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, 64), np.float32), np.ones((2, 64), np.int32))
    options = {"model": "-", "data": ("-",), "batch_size": 2, "sequence_length": 64, "learning_rate": 5e-3}
    state, step = make_train_step(model, TrainConfig(**options, steps=40, mtp_loss_weight=0.3))
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["mtp_loss"]))
    assert losses[0] > 4 and losses[-1] < 0.5
    write_back(model, state)
    (ordinary, speculative), _, (acceptance,) = generations(
        model, tokens[:1, :20], None, max_new_tokens=30, stop_tokens=()
    )
    np.testing.assert_array_equal(speculative, ordinary)
    assert acceptance.rate > 0.8, acceptance


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (0, {"speculative": "mtp"}, "no multi-token prediction layers"),
        (1, {"speculative": "draft"}, "speculative 'draft' is not supported"),
    ],
)
def test_bad_requests_are_explained(layers, options, message):
    with pytest.raises(dsparse.DsparseError, match=message):
        dsparse.generate(model_with("deepseek_v3", layers), random_tokens(1, 5), **options)
