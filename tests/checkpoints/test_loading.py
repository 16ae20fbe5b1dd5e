"""Values, dtypes and shardings of loaded parameters."""

import concurrent.futures
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from published import make, tensors, write

import dsparse
from dsparse.checkpoints import loading
from dsparse.checkpoints.convert import convert
from dsparse.checkpoints.plan import make_plan
from dsparse.checkpoints.sources import open_checkpoint
from dsparse.sharding import make_mesh, named_sharding


def parameters(model):
    return {".".join(map(str, key)): variable for key, variable in nnx.to_flat_state(nnx.state(model))}


def dequantized(weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """The definition, block by block: each 128x128 block times its scale."""
    wide = weight.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            wide[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
    return wide.numpy()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("mesh", [None, "tensor=8", "fsdp=4,tensor=2"])
def test_fp8_is_dequantized_exactly(tmp_path: Path, mesh: str | None, native: bool):
    """Ragged blocks, and shards that begin and end inside blocks."""
    path = make(tmp_path / "fp8", fp8=True)
    state = tensors(dsparse.ModelConfig.from_huggingface(path), fp8=True)
    if native:
        convert(path, tmp_path / "native", progress=False)
        path = tmp_path / "native"
    found = parameters(dsparse.from_pretrained(path, dtype="float32", mesh=mesh))
    for layer, expert in ((1, 0), (2, 3)):
        name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
        actual = found["stacks.1.blocks.0.mlp.experts.gate_up_proj"][...][layer - 1, expert, 1]
        np.testing.assert_array_equal(actual, dequantized(state[name], state[name + "_scale_inv"]))
    name = "model.layers.0.self_attn.o_proj.weight"
    actual = found["stacks.0.blocks.0.self_attn.o_proj.weight"][...][0]
    np.testing.assert_array_equal(actual, dequantized(state[name], state[name + "_scale_inv"]))
    assert not [name for name in found if name.endswith("scale_inv")]


def test_fp8_stays_fp8_and_is_scaled_in_the_products(tmp_path: Path):
    path = make(tmp_path / "fp8", fp8=True, dtype=torch.float32)
    stored, wide = dsparse.from_pretrained(path), dsparse.from_pretrained(path, dtype="float32")
    weight = parameters(stored)["stacks.1.blocks.0.mlp.experts.gate_up_proj"]
    assert weight.dtype == jnp.float8_e4m3fn and stored.dtype == jnp.float32
    assert parameters(stored)["stacks.1.blocks.0.mlp.experts.gate_up_proj_scale_inv"].shape == (2, 4, 2, 2, 2)
    tokens = np.random.default_rng(0).integers(0, 128, (2, 16))
    np.testing.assert_allclose(stored(tokens), wide(tokens), atol=1e-4)


def test_layers_stored_in_different_dtypes_are_stacked_apart(tmp_path: Path):
    path = make(tmp_path / "mixed", fp8=True, num_hidden_layers=5)
    config = json.loads((path / "config.json").read_text())
    parsed = dsparse.ModelConfig.from_huggingface(config)
    state, plain = tensors(parsed, fp8=True), tensors(parsed)
    for name in [name for name in state if name.startswith("model.layers.3.")]:
        del state[name]
    state |= {name: value for name, value in plain.items() if name.startswith("model.layers.3.")}
    model = dsparse.from_pretrained(write(tmp_path / "written", config, state))
    assert [(run.start, run.pattern, run.repeats) for run in model.runs] == [(0, 1, 1), (1, 1, 2), (3, 2, 1)]
    assert parameters(model)["stacks.2.blocks.0.mlp.experts.down_proj"].dtype == jnp.bfloat16
    assert parameters(model)["stacks.2.blocks.1.mlp.experts.down_proj"].dtype == jnp.float8_e4m3fn
    assert model(np.zeros((1, 4), np.int32)).shape == (1, 4, 128)


def test_cast_keeps_what_needs_precision(tmp_path: Path):
    found = parameters(dsparse.from_pretrained(make(tmp_path / "a", dtype=torch.float32), dtype="bfloat16"))
    floats = {name: variable.dtype for name, variable in found.items()}
    assert floats.pop("stacks.1.blocks.0.mlp.gate.e_score_correction_bias") == jnp.float32
    assert set(floats.values()) == {jnp.dtype(jnp.bfloat16)}


def test_cast_rounds_to_nearest(tmp_path: Path):
    path = make(tmp_path / "a", dtype=torch.float32)
    expected = tensors(dsparse.ModelConfig.from_huggingface(path), torch.float32)["model.embed_tokens.weight"]
    for name in ("bfloat16", "float16"):
        found = dsparse.from_pretrained(path, dtype=name).embed_tokens.weight[...]
        np.testing.assert_array_equal(found.astype(jnp.float32), expected.to(getattr(torch, name)).float().numpy())


MESHES = ["tensor=4", "data=2,tensor=4", "data=2,fsdp=2,expert=2", "fsdp=8", "expert=4,tensor=2"]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("fp8", [False, True])
def test_sharded_parameters_equal_unsharded(tmp_path: Path, mesh: str, fp8: bool):
    path = make(tmp_path / "a", fp8=fp8, mtp=1)
    whole, sharded = (parameters(dsparse.from_pretrained(path, mesh=m)) for m in (None, mesh))
    made, split = make_mesh(mesh), 0
    for name, variable in sharded.items():
        axes = variable.get_metadata()["axes"]
        assert variable[...].sharding == named_sharding(axes, variable.shape, made), name
        split += not variable[...].sharding.is_fully_replicated
        np.testing.assert_array_equal(np.asarray(variable[...]), np.asarray(whole[name][...]), err_msg=name)
    assert split >= 10, "the mesh splits next to nothing; the test is empty"


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_reads_only_its_slices(tmp_path: Path, mesh: str):
    checkpoint = open_checkpoint(make(tmp_path / "a"))
    made = make_mesh(mesh)
    with checkpoint.files as files, concurrent.futures.ThreadPoolExecutor(2) as pool:
        plan = make_plan(files, checkpoint.config, checkpoint.layout, checkpoint.origin, None, made)
        reader = loading.Reader(files, plan, pool, lambda done: None)
        held, device = 0, made.devices.flat[-1]
        for parameter in plan.parameters:
            sharding = named_sharding(parameter.axes, parameter.shape, made)
            box = next(b for b, devices in loading.device_boxes(sharding, parameter.shape).items() if device in devices)
            buffer = loading.aligned_empty([s.stop - s.start for s in box], parameter.dtype)
            held += buffer.nbytes
            reader.run(list(reader.reads(parameter, box, buffer)))
        total = sum(info.nbytes for info in files.tensors.values())
    assert files.bytes_read == held < 0.7 * total


def test_every_slice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Devices that hold the same slice share one read."""
    path = make(tmp_path / "a")
    opened = []
    monkeypatch.setattr(loading, "warn_nonfinite", opened.append)
    dsparse.from_pretrained(path, mesh="data=2,expert=2,tensor=2")
    (files,) = opened
    assert files.bytes_read == sum(info.nbytes for info in files.tensors.values())


def test_accelerators_are_filled_through_a_small_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The path for devices with memory of their own, with parts far smaller than the arrays."""
    checkpoint = open_checkpoint(make(tmp_path / "a", fp8=True))
    monkeypatch.setattr(loading, "STAGING_BYTES", 30_000)
    sizes = []
    monkeypatch.setattr(
        loading, "aligned_empty", lambda shape, dtype: sizes.append(np.empty(shape, dtype)) or sizes[-1]
    )
    whole = parameters(dsparse.from_pretrained(tmp_path / "a"))
    sizes.clear()
    mesh = make_mesh("fsdp=2,expert=2")
    with checkpoint.files as files, concurrent.futures.ThreadPoolExecutor(2) as pool:
        plan = make_plan(files, checkpoint.config, checkpoint.layout, checkpoint.origin, None, mesh)
        reader = loading.Reader(files, plan, pool, lambda done: None)
        for parameter in plan.parameters:
            sharding = named_sharding(parameter.axes, parameter.shape, mesh)
            array = loading._load_on_accelerator(reader, parameter, sharding)
            expected = whole[".".join(map(str, parameter.key))][...]
            assert array.sharding == sharding
            np.testing.assert_array_equal(np.asarray(array), np.asarray(expected))
    assert max(buffer.nbytes for buffer in sizes) <= 30_000


def test_loaded_arrays_survive_donation(tmp_path: Path):
    """On a CPU they are this process's own buffers, which a donating computation must not corrupt."""
    model = dsparse.from_pretrained(make(tmp_path / "a"))
    before = np.array(model.lm_head.weight[...])
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    np.testing.assert_array_equal(np.asarray(double(model.lm_head.weight[...])), before * 2)


@pytest.mark.parametrize("native", [False, True])
def test_nan_and_infinite_weights_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture, native: bool):
    path = make(tmp_path / "plain")
    config = json.loads((path / "config.json").read_text())
    state = tensors(dsparse.ModelConfig.from_huggingface(config))
    state["model.layers.1.mlp.experts.2.up_proj.weight"][5, 7] = float("nan")
    state["model.layers.2.self_attn.o_proj.weight"][0, 0] = float("-inf")
    path = write(tmp_path / "bad", config, state)
    names = ["model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.2.self_attn.o_proj.weight"]
    if native:
        report = convert(path, tmp_path / "native", progress=False)
        assert list(report.nonfinite) == names
        path, names = tmp_path / "native", ["layer_1.mlp.experts.gate_up_proj", "layer_2.self_attn.o_proj.weight"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dsparse.from_pretrained(path)
    assert [r.getMessage() for r in caplog.records] == [
        f"2 tensors ({names[0]}, {names[1]}) with NaN or infinite values"
    ]


def test_multi_token_prediction_layers_that_the_files_lack_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = make(tmp_path / "a")
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO):
        model = dsparse.from_pretrained(path)
    assert "config promises 1 multi-token prediction layer, the files hold none" in caplog.text
    assert len(model.mtp) == model.config.num_nextn_predict_layers == 0


def test_copies_in_multi_token_prediction_layers_are_tied_only_if_equal(tmp_path: Path):
    tied = dsparse.from_pretrained(make(tmp_path / "tied", mtp=1))
    own = dsparse.from_pretrained(make(tmp_path / "own", mtp=1, tied_mtp=False))
    assert tied.mtp[0].embed_tokens is None and tied.mtp[0].head is None
    assert own.mtp[0].embed_tokens.weight.shape == own.mtp[0].head.weight.shape == (128, 160)
    dsparse.save_pretrained(dsparse.from_pretrained(tmp_path / "own", dtype="float32"), tmp_path / "cast")
