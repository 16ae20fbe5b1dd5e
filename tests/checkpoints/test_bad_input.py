"""Damaged and mismatched checkpoints: one line that names the file or tensor and says what to do."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published import make, raw_tensors, tensors, write
from safetensors.torch import load_file, save_file

import dsparse
from dsparse.checkpoints import saving
from dsparse.checkpoints.convert import convert


def edited(source: Path, destination: Path, edit) -> Path:
    """A copy of a checkpoint after `edit(state)`."""
    config = json.loads((source / "config.json").read_text())
    state = tensors(dsparse.ModelConfig.from_huggingface(config), fp8="quantization_config" in config)
    edit(state)
    return write(destination, config, state)


def message_of(call, *arguments, **options) -> str:
    """The error's text, checked to be one line."""
    with pytest.raises(dsparse.DsparseError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


def test_missing_folder_config_and_weights(tmp_path: Path, source: Path):
    assert "nowhere: not found" in message_of(dsparse.from_pretrained, tmp_path / "nowhere")
    (source / "model.safetensors").rename(source / "elsewhere")
    assert "no model.safetensors" in message_of(dsparse.from_pretrained, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"n_group": 3}))
    assert "source/config.json: config field n_group (3) does not" in message_of(dsparse.from_pretrained, source)
    (source / "config.json").unlink()
    assert "config.json: not found" in message_of(dsparse.from_pretrained, source)


def test_missing_shard(tmp_path: Path):
    source = make(tmp_path / "sharded", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    message = message_of(dsparse.from_pretrained, source)
    assert "1 missing file (model-00002-of-00003.safetensors)" in message


def test_missing_index(tmp_path: Path):
    source = make(tmp_path / "sharded", shards=3)
    (source / "model.safetensors.index.json").unlink()
    assert "the index of 3 .safetensors files is missing" in message_of(dsparse.from_pretrained, source)


def test_unreadable_index(tmp_path: Path):
    source = make(tmp_path / "sharded", shards=2)
    (source / "model.safetensors.index.json").write_text("{")
    assert "not an index of weights" in message_of(dsparse.from_pretrained, source)


def test_index_lists_a_tensor_that_is_not_there(tmp_path: Path):
    source = make(tmp_path / "sharded", shards=2)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.extra"] = "model-00001-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 tensor (model.layers.9.extra) listed but not in the files" in message_of(dsparse.from_pretrained, source)


def test_truncated_files(source: Path):
    file = source / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f"model.safetensors: truncated, {len(whole) - 1} bytes of {len(whole)}" in message_of(
        dsparse.from_pretrained, source
    )
    file.write_bytes(whole[:100])
    assert "truncated inside its header" in message_of(dsparse.from_pretrained, source)
    file.write_bytes(b"")
    assert "not a safetensors file" in message_of(dsparse.from_pretrained, source)


@pytest.mark.parametrize(
    "start", [b"PK\x03\x04 a zip archive after all", b"\x10\0\0\0\0\0\0\0not json at all!!", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_wrong_magic(source: Path, start: bytes):
    (source / "model.safetensors").write_bytes(start + bytes(100))
    assert "not a safetensors file" in message_of(dsparse.from_pretrained, source)


def test_header_of_impossible_sizes(source: Path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "tensor a of shape [3] takes 12 bytes, its header says 8" in message_of(dsparse.from_pretrained, source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [-1, 160]}, "unreadable header"),
        ({"shape": 3}, "unreadable header"),
        ({"data_offsets": ["0", "8"]}, "unreadable header"),
        ({"data_offsets": [0, 8, 16]}, "unreadable header"),
        ({"data_offsets": [-8, 40952]}, "unreadable header"),
        ({"data_offsets": [4, 40964]}, "does not begin where another ends"),
    ],
)
def test_header_entries_that_make_no_sense(source: Path, changes, message: str):
    file = source / "model.safetensors"
    blob = file.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    header["model.embed_tokens.weight"] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + blob[start:])
    assert message in message_of(dsparse.from_pretrained, source)


def test_more_bytes_than_the_header_says(source: Path):
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "longer than its header says" in message_of(dsparse.from_pretrained, source)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.experts.2.up_proj"])
def test_integers_where_floating_point_belongs(tmp_path: Path, source: Path, dtype, name: str):
    name = f"model.layers.1.{name}.weight"
    bad = edited(source, tmp_path / "bad", lambda state: state.update({name: state[name].to(dtype)}))
    for call in (dsparse.from_pretrained, lambda path: dsparse.from_pretrained(path, dtype="float32")):
        message = message_of(call, bad)
        assert f"{name} is {str(dtype).removeprefix('torch.')} where the model needs floating point" in message


def test_a_tensor_in_two_shards(tmp_path: Path):
    source = make(tmp_path / "sharded", shards=2)
    second = load_file(source / "model-00002-of-00002.safetensors")
    second["model.embed_tokens.weight"] = torch.zeros(128, 160)
    save_file(second, source / "model-00002-of-00002.safetensors")
    message = message_of(dsparse.from_pretrained, source)
    assert "model.embed_tokens.weight is in both model-00001-of-00002.safetensors and model-00002-of-" in message


def test_unsupported_dtype(source: Path):
    header = json.dumps({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "tensor a has dtype C64, which is not supported" in message_of(dsparse.from_pretrained, source)


@pytest.mark.parametrize("call", [dsparse.from_pretrained, lambda path: convert(path, path.with_name("out"))])
def test_all_mismatches_in_one_message(tmp_path: Path, source: Path, call):
    def edit(state):
        state["model.layers.1.self_attn.o_project.weight"] = state.pop("model.layers.1.self_attn.o_proj.weight")
        state["model.layers.7.input_layernorm.weight"] = torch.ones(160)
        state["model.surprise"] = torch.ones(2)
        state["model.layers.2.mlp.experts.3.up_proj.weight"] = torch.zeros(8, 160, dtype=torch.bfloat16)
        state["lm_head.weight"] = torch.zeros(100, 160)
        for expert in range(4):
            del state[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]

    bad = edited(source, tmp_path / "bad", edit)
    message = message_of(call, bad)
    assert "5 missing tensors (model.layers.1.mlp.experts.0.down_proj.weight, " in message and "and 2 more)" in message
    assert "model.layers.1.self_attn.o_project.weight: renamed from model.layers.1.self_attn.o_proj.weight?" in message
    assert "unexpected tensors" in message and "model.surprise" in message
    assert "model.layers.2.mlp.experts.3.up_proj.weight is [8, 160] where the config asks for [136, 160]" in message
    assert "lm_head.weight is [100, 160] where the config asks for [128, 160]" in message
    assert not (tmp_path / "out").exists()


def test_an_unexpected_layer_is_named_not_dropped(tmp_path: Path, source: Path):
    bad = edited(source, tmp_path / "bad", lambda s: s.update({"model.layers.3.enorm.weight": torch.ones(160)}))
    assert "missing tensors (model.layers.3." in message_of(dsparse.from_pretrained, bad)


def test_fp8_without_scales(tmp_path: Path):
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    bad = edited(make(tmp_path / "fp8", fp8=True), tmp_path / "bad", lambda state: state.pop(name))
    for dtype in (None, "float32"):
        assert f"1 missing tensor ({name})" in message_of(dsparse.from_pretrained, bad, dtype=dtype)


def test_experts_of_different_dtypes(tmp_path: Path, source: Path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    bad = edited(source, tmp_path / "bad", lambda state: state.update({name: state[name].float()}))
    message = message_of(dsparse.from_pretrained, bad)
    assert "stored in different dtypes" in message and f"float32 {name}" in message
    assert dsparse.from_pretrained(bad, dtype="float32").dtype == "float32"


def test_two_names_for_one_tensor(tmp_path: Path, source: Path):
    def edit(state):
        state["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(4, 272, 160, dtype=torch.bfloat16)

    message = message_of(dsparse.from_pretrained, edited(source, tmp_path / "bad", edit))
    assert "8 unexpected tensors (model.layers.1.mlp.experts.0.gate_proj.weight" in message


def test_unknown_dtype_format_quantization_and_sizes(tmp_path: Path, source: Path):
    assert "dtype 'int3' is not supported" in message_of(dsparse.from_pretrained, source, dtype="int3")
    assert "quantization 'x' is not supported" in message_of(dsparse.from_pretrained, source, quantization="x")
    assert "format 'gguf' is not supported" in message_of(convert, source, tmp_path / "out", format="gguf")
    model = dsparse.from_pretrained(source)
    assert "format 'gguf' is not supported" in message_of(
        dsparse.save_pretrained, model, tmp_path / "out", format="gguf"
    )
    message = message_of(dsparse.save_pretrained, model, tmp_path / "out", max_shard_size="big")
    assert "max_shard_size 'big'" in message


def test_pickles_only_when_allowed(tmp_path: Path, source: Path):
    state = tensors(dsparse.ModelConfig.from_huggingface(source))
    (source / "model.safetensors").unlink()
    names = list(state)
    torch.save({n: state[n] for n in names[::2]}, source / "pytorch_model-00001-of-00002.bin")
    torch.save({n: state[n] for n in names[1::2]}, source / "pytorch_model-00002-of-00002.bin")
    weight_map = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(names)}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "only .bin files" in message_of(dsparse.from_pretrained, source)
    model = dsparse.from_pretrained(source, allow_pickle=True)
    dsparse.save_pretrained(model, tmp_path / "back")
    expected = raw_tensors(make(tmp_path / "same"))
    assert raw_tensors(tmp_path / "back") == expected
    convert(source, tmp_path / "native", allow_pickle=True, progress=False)
    convert(tmp_path / "native", tmp_path / "again", progress=False)
    assert raw_tensors(tmp_path / "again") == expected


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, source: Path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    (source / "model.safetensors").unlink()
    torch.save({"a": Evil()}, source / "pytorch_model.bin")
    assert "torch cannot read it" in message_of(dsparse.from_pretrained, source, allow_pickle=True)
    torch.save([torch.ones(1)], source / "pytorch_model.bin")
    assert "holds a list, not tensors by name" in message_of(dsparse.from_pretrained, source, allow_pickle=True)
    (source / "pytorch_model.bin.index.json").write_text("{")
    assert "not an index of weights" in message_of(dsparse.from_pretrained, source, allow_pickle=True)
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": 3}}')
    assert "1 missing file (3)" in message_of(dsparse.from_pretrained, source, allow_pickle=True)
    (source / "pytorch_model.bin.index.json").unlink()
    (source / "pytorch_model.bin").write_bytes(b"no pickle")
    assert "torch cannot read it" in message_of(dsparse.from_pretrained, source, allow_pickle=True)
    assert not (tmp_path / "it ran").exists()


def test_damaged_native_checkpoints(tmp_path: Path, source: Path):
    native = tmp_path / "native"
    convert(source, native, progress=False)
    chunk = native / "weights/layer_00001/mlp.experts.down_proj/0.0.0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-5])
    assert f"0.0.0: {len(whole) - 5} bytes of {len(whole)}" in message_of(dsparse.from_pretrained, native)
    chunk.unlink()
    assert "0.0.0: missing" in message_of(dsparse.from_pretrained, native)
    shutil.rmtree(native / "weights/layer_00001")
    assert "missing tensors (layer_1." in message_of(dsparse.from_pretrained, native)
    manifest = json.loads((native / "dsparse.json").read_text())
    (native / "dsparse.json").write_text(json.dumps(manifest | {"version": 99}))
    assert "format version 99" in message_of(dsparse.from_pretrained, native)
    (native / "dsparse.json").write_text("{}")
    assert "not a dsparse manifest" in message_of(dsparse.from_pretrained, native)


def test_existing_target(tmp_path: Path, source: Path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious.txt").write_text("keep me")
    model = dsparse.from_pretrained(source)
    for call in (lambda: convert(source, target), lambda: dsparse.save_pretrained(model, target)):
        assert "target: exists already" in message_of(call)
        assert [file.name for file in target.iterdir()] == ["precious.txt"]
    convert(source, target, force=True, progress=False)
    assert not (target / "precious.txt").exists()
    dsparse.save_pretrained(dsparse.from_pretrained(target), target, force=True)
    assert raw_tensors(target) == raw_tensors(source)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_no_disk_space_is_seen_before_writing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    model = dsparse.from_pretrained(source)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for call in (lambda: convert(source, tmp_path / "out"), lambda: dsparse.save_pretrained(model, tmp_path / "out")):
        assert re.search(r"out: 0\.00 GB are needed and 0\.00 GB are free", message_of(call))
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("format", ["dsparse", "huggingface"])
def test_a_disk_that_fills_up(tmp_path: Path, source: Path, format: str):
    """Written under a file size limit, which the system reports like a full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import dsparse;"
        "from dsparse.checkpoints.convert import convert; model = dsparse.from_pretrained(sys.argv[1]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "for call in (lambda: convert(sys.argv[1], sys.argv[2], format=sys.argv[3], progress=False),"
        " lambda: dsparse.save_pretrained(model, sys.argv[2], format=sys.argv[3])):\n"
        "  try: call()\n"
        "  except dsparse.DsparseError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out"), format],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("File too large" in line for line in lines), done.stdout + done.stderr[-2000:]
    assert not (tmp_path / "out").exists()


def test_failed_save_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    model = dsparse.from_pretrained(source)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_index", fail)
    assert "out: not written (No space left on device)" in message_of(dsparse.save_pretrained, model, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_float64_needs_a_dtype(tmp_path: Path, source: Path):
    bad = edited(
        source, tmp_path / "bad", lambda state: state.update({"lm_head.weight": state["lm_head.weight"].double()})
    )
    assert "lm_head.weight is float64" in message_of(dsparse.from_pretrained, bad)
    assert np.isfinite(dsparse.from_pretrained(bad, dtype="float32")(np.zeros((1, 2), np.int32))).all()
