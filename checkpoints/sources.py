"""Opening a Hugging Face folder: which files hold the weights, and which small files travel with them."""

from __future__ import annotations

from pathlib import Path

from dsparse.checkpoints.tensorfiles import TensorFiles, list_safetensors
from dsparse.errors import DsparseError

SIDE_FILE_BYTES = 64 << 20
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".lock"}
REPLACED = {"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "dsparse.json"}


def open_checkpoint(folder: Path, allow_pickle: bool = False) -> TensorFiles:
    """The tensors of a Hugging Face folder.

    Raises:
        DsparseError: there are none, or a file is damaged, or only pickles are there and `allow_pickle` is off.
    """
    has_pickles = any(folder.glob("pytorch_model*.bin"))
    if any(folder.glob("*.safetensors*")) or not has_pickles:
        return TensorFiles(list_safetensors(folder))
    if not allow_pickle:
        raise DsparseError(f"{folder}: only .bin files, which are Python pickles; allow them (allow_pickle) if you trust their source")
    from dsparse.checkpoints.torch_bin import open_pickles

    return open_pickles(folder)


def side_files(folder: Path) -> dict[str, bytes]:
    """What lies beside the weights and should stay with them: tokenizer, generation config, chat template, licence."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    wanted = (file for file in files if file.suffix not in WEIGHT_SUFFIXES and file.name not in REPLACED)
    return {file.name: file.read_bytes() for file in wanted if file.stat().st_size <= SIDE_FILE_BYTES}
