"""A checkpoint loaded as stored and written back has the same tensors, bit for bit, whatever the path it takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published import make, raw_tensors, tensors, write
from support import load_transformers, trained_checkpoint

import dsparse
from dsparse.checkpoints.convert import convert

CASES = {
    "bfloat16": {},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "sharded": {"shards": 3},
    "fp8": {"fp8": True},
    "mtp": {"mtp": 1},
    "mtp with its own embedding and head": {"mtp": 2, "tied_mtp": False},
    "fp8 mtp": {"fp8": True, "mtp": 1},
    "v2": {"family": "deepseek_v2"},
    "tied embeddings": {"tie_word_embeddings": True, "mtp": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def assert_equal_checkpoints(found: Path, expected: Path):
    assert raw_tensors(found) == raw_tensors(expected)
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    assert (found / "tokenizer.json").read_bytes() == (expected / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_saved_bit_for_bit(tmp_path: Path, case: str):
    source = make(tmp_path / "source", **CASES[case])
    model = dsparse.from_pretrained(source)
    dsparse.save_pretrained(model, tmp_path / "back", max_shard_size="200KB" if case == "sharded" else "5GB")
    assert_equal_checkpoints(tmp_path / "back", source)
    if case == "sharded":
        assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3


@pytest.mark.parametrize("case", CASES)
def test_converted_there_and_back_bit_for_bit(tmp_path: Path, case: str):
    source = make(tmp_path / "source", **CASES[case])
    there = convert(source, tmp_path / "native", progress=False)
    convert(tmp_path / "native", tmp_path / "back", max_shard_size="200KB", progress=False)
    assert_equal_checkpoints(tmp_path / "back", source)
    assert there.format == "dsparse" and there.peak_memory > 0 and there.bytes_read >= there.bytes_written


def test_native_checkpoint_through_a_model(tmp_path: Path):
    source = make(tmp_path / "source", fp8=True, mtp=1)
    dsparse.save_pretrained(dsparse.from_pretrained(source), tmp_path / "native", format="dsparse")
    dsparse.save_pretrained(dsparse.from_pretrained(tmp_path / "native"), tmp_path / "back")
    assert_equal_checkpoints(tmp_path / "back", source)


def test_orbax_reads_the_native_format(tmp_path: Path):
    import orbax.checkpoint as ocp

    source = make(tmp_path / "source")
    convert(source, tmp_path / "native", progress=False)
    numpy = {
        path: ocp.RestoreArgs(restore_type=np.ndarray) for path in ("input_layernorm.weight", "mlp.experts.down_proj")
    }
    arguments = ocp.args.PyTreeRestore(dict.fromkeys(numpy, 0), restore_args=numpy, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        layer = checkpointer.restore(tmp_path / "native" / "weights" / "layer_00002", arguments)
    stored = raw_tensors(source)["model.layers.2.mlp.experts.1.down_proj.weight"][2]
    assert layer["mlp.experts.down_proj"][1].tobytes() == stored


def test_names_of_fused_experts_and_unused_buffers_survive(tmp_path: Path):
    """Spellings that are not the published ones, and tensors the model has no use for."""
    source = make(tmp_path / "plain")
    config = json.loads((source / "config.json").read_text())
    state = tensors(dsparse.ModelConfig.from_huggingface(config))
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = [[state.pop(f"{prefix}{e}.{part}_proj.weight") for part in ("gate", "up", "down")] for e in range(4)]
        state[prefix + "gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
        state[prefix + "down_proj"] = torch.stack([down for *_, down in experts])
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    fused = write(tmp_path / "fused", config, state)
    dsparse.save_pretrained(dsparse.from_pretrained(fused), tmp_path / "back")
    assert_equal_checkpoints(tmp_path / "back", fused)
    convert(fused, tmp_path / "native", progress=False)
    convert(tmp_path / "native", tmp_path / "again", progress=False)
    assert_equal_checkpoints(tmp_path / "again", fused)
    tokens = np.arange(40).reshape(2, 20)
    np.testing.assert_array_equal(dsparse.from_pretrained(fused)(tokens), dsparse.from_pretrained(source)(tokens))


@pytest.mark.parametrize("name", ["demo", "v3"])
def test_trained_checkpoint_bit_for_bit(tmp_path: Path, name: str):
    source = trained_checkpoint(name)
    model = dsparse.from_pretrained(source)
    assert not model.mtp  # promised by the config, absent from the files
    dsparse.save_pretrained(model, tmp_path / "back")
    assert_equal_checkpoints(tmp_path / "back", source)
    assert (tmp_path / "back/generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


@pytest.mark.parametrize("case", ["float32", "mtp", "v2"])
def test_transformers_loads_the_export(tmp_path: Path, case: str):
    source = make(tmp_path / "source", **CASES[case])
    model = dsparse.from_pretrained(source, dtype="float32")
    dsparse.save_pretrained(model, tmp_path / "export")
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "float32"
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24))
    with torch.no_grad():
        expected = load_transformers(tmp_path / "export")(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(tokens), expected, atol=1e-4)


def test_dequantized_export_drops_the_quantization(tmp_path: Path):
    source = make(tmp_path / "source", fp8=True)
    convert(source, tmp_path / "plain", format="huggingface", dtype="bfloat16", progress=False)
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert not [name for name in raw_tensors(tmp_path / "plain") if name.endswith("_scale_inv")]
    published = tensors(dsparse.ModelConfig.from_huggingface(source), fp8=True)
    assert raw_tensors(tmp_path / "plain").keys() == {name for name in published if not name.endswith("_scale_inv")}
