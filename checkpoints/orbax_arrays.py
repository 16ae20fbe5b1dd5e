"""Arrays that Orbax stores piece by piece, as they are produced, past the system's cache."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from dsparse.checkpoints.saving import DirectWriter


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array to store. pieces: its values in C order, read or computed only when they are written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Stores `Streamed` arrays as Orbax stores NumPy arrays (zarr, one uncompressed chunk), and restores them as such.

    Orbax by itself holds all arrays of an item in memory and writes them through the system's cache.
    """

    async def serialize(
        self,
        values: Sequence[Streamed],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            write_zarr(Path(info.parent_dir) / info.name, value)
        return []


def write_zarr(folder: Path, value: Streamed) -> None:
    """One array in the layout of zarr, version 2."""
    folder.mkdir()
    metadata = {
        "chunks": [max(1, n) for n in value.shape],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": value.dtype.name if value.dtype.kind == "V" else value.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(value.shape),
        "zarr_format": 2,
    }
    (folder / ".zarray").write_text(json.dumps(metadata), encoding="utf-8")
    with DirectWriter(folder / (".".join("0" * len(value.shape)) or "0")) as writer:
        for piece in value.pieces():
            writer.write(memoryview(np.ascontiguousarray(piece, value.dtype).reshape(-1).view(np.uint8)))


def registry():
    """The registry of type handlers for items whose leaves are all `Streamed`."""
    return ocp.type_handlers.create_type_handler_registry((Streamed, StreamedHandler()))
