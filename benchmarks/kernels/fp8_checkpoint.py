"""A copy of a checkpoint whose routed experts are stored in FP8 blocks of 128x128, as DeepSeek publishes its models."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128
E4M3_MAX = 448.0


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values [F, D] and what each block of them is to be multiplied with, float32; ragged edges are blocks too."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / E4M3_MAX
    values = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return values.to(torch.float8_e4m3fn), scale


def write(source: Path, target: Path) -> Path:
    """Writes the copy of the Hugging Face folder `source`, tokenizer included, and returns `target`."""
    target.mkdir(parents=True)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)
    tensors = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    for name in [name for name in tensors if ".experts." in name and name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantized(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target
