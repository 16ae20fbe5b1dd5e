"""DeepSeek-V4's checkpoint layouts: both name tables and their mixture, FP8 with e8m0 scales, experts in packed FP4."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from support import trained_checkpoint

import dsparse
from dsparse.checkpoints.convert import convert
from dsparse.checkpoints.tensorfiles import TensorFiles, read_header

E8M0, E4M3, E2M1 = ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


def tensors(folder):
    with TensorFiles({t.name: t for file in sorted(folder.glob("*.safetensors")) for t in read_header(file)}) as files:
        return {name: files.read(name) for name in files.tensors}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


SMALL = {
    "num_hidden_layers": 3, "num_nextn_predict_layers": 1, "vocab_size": 64, "n_routed_experts": 4,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
}  # fmt: skip
RAGGED = {"hidden_size": 192, "moe_intermediate_size": 64, "q_lora_rank": 136}  # of 128x128 blocks
WHOLE = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128, "o_lora_rank": 64}
QUANTIZATION = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip


def small_model(**options):
    """With a multi-token prediction layer."""
    config = dsparse.ModelConfig.tiny("deepseek_v4", **(SMALL | RAGGED | options))
    return dsparse.Model(config, rngs=nnx.Rngs(0))


def quantized_checkpoint(folder, **options):
    """DeepSeek's published form of a small model, and the float32 tensors its quantized ones stand for."""
    dsparse.save_pretrained(small_model(**options), folder, names="published")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": QUANTIZATION}))
    plain, stored, meant = tensors(folder), {}, {}
    for name, value in plain.items():
        if ".experts." in name:
            scale = 2.0 ** np.ceil(np.log2(np.abs(value.reshape(len(value), -1, 32)).max(axis=-1) / 6))
            codes = (value / np.repeat(scale, 32, axis=1)).astype(E2M1)
            bits = codes.view(np.uint8) & 15
            stored[name] = (bits[:, 0::2] | bits[:, 1::2] << 4).view(np.int8)
            meant[name] = codes.astype(np.float32) * np.repeat(scale, 32, axis=1)
        elif (
            name.endswith((".wq_a.weight", ".wq_b.weight", ".wkv.weight", ".wo_a.weight", ".w1.weight", ".w3.weight"))
            and "compressor" not in name
        ):
            rows, columns = value.shape
            blocks = np.zeros((-(-rows // 128), -(-columns // 128)), np.float32)
            for i, j in np.ndindex(*blocks.shape):
                blocks[i, j] = np.abs(value[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]).max()
            scale = 2.0 ** np.ceil(np.log2(blocks / 448))
            wide = np.repeat(np.repeat(scale, 128, axis=0)[:rows], 128, axis=1)[:, :columns]
            stored[name] = (value / wide).astype(E4M3)
            meant[name] = stored[name].astype(np.float32) * wide
        else:
            stored[name] = meant[name] = value
            continue
        stored[name.removesuffix("weight") + "scale"] = scale.astype(E8M0)
    write_tensors(folder / "model.safetensors", stored)
    return stored, meant


def write_tensors(file, values):
    names = {
        np.dtype(E8M0): "F8_E8M0",
        np.dtype(E4M3): "F8_E4M3",
        np.dtype(np.int8): "I8",
        np.dtype(np.float32): "F32",
        np.dtype(np.int32): "I32",
    }
    header, offset = {}, 0
    for name, value in values.items():
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(v.tobytes() for v in values.values()))


def test_trained_mixture_round_trips(tmp_path):
    folder = trained_checkpoint("v4")
    dsparse.save_pretrained(dsparse.from_pretrained(folder), tmp_path / "out")
    assert_same_tensors(tensors(folder), tensors(tmp_path / "out"))
    convert(folder, tmp_path / "native", progress=False)
    convert(tmp_path / "native", tmp_path / "back", progress=False)
    assert_same_tensors(tensors(folder), tensors(tmp_path / "back"))


def test_quantized_checkpoint_keeps_its_bits_and_computes_what_they_mean(tmp_path):
    stored, meant = quantized_checkpoint(tmp_path / "published")
    model = dsparse.from_pretrained(tmp_path / "published")
    assert len(model.mtp) == 1
    dsparse.save_pretrained(model, tmp_path / "out")
    assert_same_tensors(stored, tensors(tmp_path / "out"))
    tokens = np.arange(60, dtype=np.int32)[None]
    write_tensors(tmp_path / "published" / "model.safetensors", meant)
    expected = dsparse.from_pretrained(tmp_path / "published", dtype="float32")
    np.testing.assert_allclose(model(tokens), expected(tokens), atol=1e-4)
    write_tensors(tmp_path / "published" / "model.safetensors", stored)
    unpacked = dsparse.from_pretrained(tmp_path / "published", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(unpacked), nnx.state(expected))


@pytest.mark.parametrize("names", ["transformers", "published"])
def test_both_layouts_hold_the_same_model(tmp_path, names):
    model = small_model(mlp_bias=True)
    dsparse.save_pretrained(model, tmp_path / "out", names=names)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    prefix = {"transformers": "model.layers.1.attn.wq_a.weight", "published": "layers.1.attn.wq_a.weight"}[names]
    assert prefix.replace("attn.wq_a.weight", "ffn.shared_experts.w1.bias") in written
    assert prefix in written and "mtp.0.hc_head_fn" in written and "head.weight" in written
    jax.tree.map(np.testing.assert_array_equal, nnx.state(dsparse.from_pretrained(tmp_path / "out")), nnx.state(model))


@pytest.mark.parametrize("names", ["transformers", "published"])
def test_transformers_reads_the_quantized_export(tmp_path, monkeypatch, names):
    """FP8 and packed FP4, both layouts: transformers dequantizes them on a CPU; no tensor is missing or left over."""
    from transformers.quantizers import quantizer_finegrained_fp8

    # asked for to place weights on several devices, which a CPU does not need
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda *_: True)
    quantized_checkpoint(tmp_path / "published", **WHOLE, initializer_range=0.2, expert_dtype="fp4")
    model = dsparse.from_pretrained(tmp_path / "published")
    dsparse.save_pretrained(model, tmp_path / "out", names=names)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = np.arange(60, dtype=np.int32)[None]
    with torch.no_grad():
        expected = reference.eval()(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(model(tokens), expected, atol=1e-4)
