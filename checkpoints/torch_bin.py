"""Legacy `.bin` weights: Python pickles, read by torch in its restricted mode and only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsparse.checkpoints.tensorfiles import DTYPES, TensorFiles, TensorInfo, has_nonfinite, read_index, shorten
from dsparse.errors import DsparseError


class PickledTensors(TensorFiles):
    """Tensors that torch has mapped into memory."""

    def __init__(self, tensors: dict[str, TensorInfo], values: dict[str, Any]):
        super().__init__(tensors)
        self._values = values

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        import torch

        info = self.tensors[name]
        source = (
            self._values[name].contiguous().view(torch.uint8)
            if info.shape
            else self._values[name].reshape(1).view(torch.uint8)
        )
        np.copyto(out, source.numpy().reshape(-1).view(info.dtype).reshape(info.shape)[index])
        with self._lock:
            self.bytes_read += out.nbytes
            if has_nonfinite(np.ascontiguousarray(out)):
                self.nonfinite.add(name)


def open_pickles(folder: Path) -> PickledTensors:
    """All tensors of `pytorch_model.bin` or its shards.

    Raises:
        DsparseError: torch is not installed, or a file is missing, damaged or holds more than tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise DsparseError(
            f"{folder}: reading .bin files needs torch, which is not installed (pip install torch)"
        ) from error
    index = folder / "pytorch_model.bin.index.json"
    names = read_index(index)[0] if index.is_file() else ["pytorch_model.bin"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DsparseError(f"{folder}: {shorten(missing, 'missing file')}")
    values: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    dtypes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    dtypes |= {
        torch.float8_e4m3fn: "F8_E4M3",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.uint8: "U8",
        torch.int8: "I8",
    }
    for name in names:
        try:
            loaded = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds: bad zip, bad pickle, refused class
            raise DsparseError(f"{folder / name}: torch cannot read it ({str(error).splitlines()[0]})") from error
        if not isinstance(loaded, dict):
            raise DsparseError(f"{folder / name}: holds a {type(loaded).__name__}, not tensors by name")
        for key, value in loaded.items():
            if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
                raise DsparseError(f"{folder / name}: entry {key} is not a tensor of a supported dtype")
            values[key] = value
            tensors[key] = TensorInfo(key, DTYPES[dtypes[value.dtype]], tuple(value.shape), folder / name, len(tensors))
    return PickledTensors(tensors, values)
