"""Opening a checkpoint of any format: which files hold the weights, and which small files travel with them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dsparse.checkpoints import native
from dsparse.checkpoints.mapping import Layout, layout_of
from dsparse.checkpoints.tensorfiles import TensorFiles, list_safetensors
from dsparse.config import ModelConfig
from dsparse.errors import DsparseError
from dsparse.origin import Origin

SIDE_FILE_BYTES = 64 << 20
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".lock"}
REPLACED = {"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", native.MANIFEST}
JOURNAL = "conversion.json"  # in a folder that is still being converted


class Checkpoint(NamedTuple):
    """An opened checkpoint. native: in dsparse's own format, else Hugging Face's."""

    files: TensorFiles
    config: ModelConfig
    layout: Layout
    origin: Origin
    native: bool


def open_checkpoint(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint's config and list its tensors. Close `files` when done.

    Raises:
        DsparseError: no checkpoint is there, or a file is damaged, or only pickles are there and `allow_pickle` is off.
    """
    check_folder(folder)
    config = ModelConfig.from_huggingface(folder)
    if native.is_native(folder):
        origin = native.read_manifest(folder)
        origin.files.update(side_files(folder))
        return Checkpoint(TensorFiles(native.list_native(folder)), config, native.LAYOUT, origin, native=True)
    files = _open_huggingface(folder, allow_pickle)
    return Checkpoint(files, config, layout_of(config), Origin(str(folder), side_files(folder)), native=False)


def check_folder(folder: Path) -> None:
    """Raise DsparseError unless a folder is there that no conversion has left unfinished."""
    if not folder.is_dir():
        unfinished = partial_folder(folder)
        hint = f"; {unfinished} is an unfinished conversion: run it again" if unfinished.exists() else ""
        raise DsparseError(f"{folder}: not found; expected the folder of a model{hint}")
    if (folder / JOURNAL).exists():
        raise DsparseError(f"{folder}: an unfinished conversion; run the same conversion again to finish it")


def partial_folder(destination: Path) -> Path:
    """Where a conversion to `destination` is built before it is renamed."""
    return destination.with_name(f".{destination.name}.partial")


def _open_huggingface(folder: Path, allow_pickle: bool) -> TensorFiles:
    has_pickles = any(folder.glob("pytorch_model*.bin"))
    if any(folder.glob("*.safetensors*")) or not has_pickles:
        return TensorFiles(list_safetensors(folder))
    if not allow_pickle:
        raise DsparseError(
            f"{folder}: only .bin files, which are Python pickles; allow them (allow_pickle) if you trust their source"
        )
    from dsparse.checkpoints.torch_bin import open_pickles

    return open_pickles(folder)


def side_files(folder: Path) -> dict[str, bytes]:
    """What lies beside the weights and should stay with them: tokenizer, generation config, chat template, licence."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    wanted = (file for file in files if file.suffix not in WEIGHT_SUFFIXES and file.name not in REPLACED)
    return {file.name: file.read_bytes() for file in wanted if file.stat().st_size <= SIDE_FILE_BYTES}
