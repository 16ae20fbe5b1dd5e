"""Writing checkpoints: safetensors shards, an index, config.json and the files found beside the original."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsparse.checkpoints.mapping import TOP, Layout, Slot, layout_of
from dsparse.checkpoints.plan import SCALE, Parameter, model_parameters
from dsparse.checkpoints.tensorfiles import DTYPE_NAMES, natural
from dsparse.config import ModelConfig
from dsparse.errors import DsparseError
from dsparse.model import Model
from dsparse.origin import Origin
from dsparse.params import QUANTIZED

WRITE_BYTES = 8 << 20  # bytes handed to the system at once


@dataclasses.dataclass(frozen=True)
class Export:
    """A tensor to write, and where its values come from."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    slot: Slot | None  # None: kept aside

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def exports_of_parameter(
    layout: Layout, origin: Origin, layer: int, path: str, shape: tuple[int, ...], dtype
) -> Iterator[Export]:
    """The tensors that hold one layer's parameter, under the names they came with."""
    whole, dtype = Slot(layer, path), np.dtype(origin.dtypes.get((layer, path), dtype))
    if layout.rule(layer, path).choices and whole in origin.names:
        name = origin.names[whole]
        yield Export(name, dtype, layout.parse(name)[1].tensor_shape(shape), whole)
        return
    for name, slot, tensor_shape in layout.tensors(layer, path, shape):
        yield Export(origin.names.get(slot, name), dtype, tensor_shape, slot)


def exports_of(layout: Layout, origin: Origin, parameters: Sequence[Parameter]) -> list[Export]:
    """Every tensor to write, layer by layer."""
    exports = [
        export
        for parameter in parameters
        for layer in parameter.layers
        for export in exports_of_parameter(
            layout, origin, layer, parameter.path, parameter.layer_shape, parameter.dtype
        )
    ]
    by_slot = {export.slot: export for export in exports}
    exports += [
        dataclasses.replace(by_slot[Slot(*slot)], name=name) for name, slot in origin.tied.items() if slot in by_slot
    ]
    exports += [Export(name, value.dtype, value.shape, None) for name, value in origin.kept.items()]
    return sorted(exports, key=lambda e: (_layer_of(layout, e), natural(e.name)))


def _layer_of(layout: Layout, export: Export) -> int:
    return layout.parse(export.name)[0].layer


def shard(exports: Sequence[Export], max_shard_size: int) -> list[list[Export]]:
    """Split tensors, in order, into files of at most `max_shard_size` bytes (one tensor may exceed it)."""
    shards: list[list[Export]] = [[]]
    filled = 0
    for export in exports:
        if shards[-1] and filled + export.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(export)
        filled += export.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(folder: Path, shards: Sequence[Sequence[Export]]) -> None:
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    weight_map = {export.name: name for name, exports in zip(names, shards, strict=True) for export in exports}
    total = sum(export.nbytes for exports in shards for export in exports)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(
    file: Path, exports: Sequence[Export], value: Callable[[Export], np.ndarray], progress=lambda done: None
) -> None:
    """One safetensors file, written under a temporary name until it is complete."""
    header, offset = {}, 0
    for export in exports:
        end = offset + export.nbytes
        header[export.name] = {
            "dtype": DTYPE_NAMES[export.dtype],
            "shape": list(export.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(file.name + ".tmp")
    with DirectWriter(partial) as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for export in exports:
            array = np.ascontiguousarray(value(export), export.dtype)
            assert array.nbytes == export.nbytes, export.name
            writer.write(memoryview(array.reshape(-1).view(np.uint8)))
            progress(export.nbytes)
    partial.rename(file)


class DirectWriter:
    """Writes a file past the system's cache where the file system can (O_DIRECT), and is on the disk when closed.

    Copying gigabytes into a cache that nobody will read costs more than writing them.
    """

    def __init__(self, path: Path):
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        try:
            self.descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError:  # not on this file system
            self.descriptor = os.open(path, flags, 0o644)
        self.buffer = memoryview(mmap.mmap(-1, WRITE_BYTES))  # O_DIRECT wants whole pages, in memory and in the file
        self.filled = self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            count = min(len(data), WRITE_BYTES - self.filled)
            self.buffer[self.filled : self.filled + count] = data[:count]
            self.filled += count
            self.size += count
            data = data[count:]
            if self.filled == WRITE_BYTES:
                self._flush()

    def _flush(self) -> None:
        end = -(-self.filled // mmap.PAGESIZE) * mmap.PAGESIZE
        rest = self.buffer[:end]
        while rest:
            try:
                rest = rest[os.write(self.descriptor, rest) :]
            except OSError as error:  # the file system refuses, or the disk ends within a page: go the usual way
                flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & getattr(os, "O_DIRECT", 0):
                    raise
                fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.filled = 0

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None:
                self._flush()
                os.ftruncate(self.descriptor, self.size)
                os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)


def export_config(config: ModelConfig, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """config.json with every entry it came with, its dtype and quantization brought in line with the parameters."""
    written = dict(config.huggingface)
    floats: dict[str, int] = {}
    for p in parameters:
        if jnp.issubdtype(p.dtype, jnp.floating) and p.dtype.itemsize > 1 and not p.path.endswith(SCALE):
            floats[p.dtype.name] = floats.get(p.dtype.name, 0) + p.nbytes
    main = max(floats, key=floats.get, default=config.dtype)
    if main != config.dtype:
        written["torch_dtype" if "torch_dtype" in written and "dtype" not in written else "dtype"] = main
    if not any(p.dtype in QUANTIZED for p in parameters):
        written.pop("quantization_config", None)
    return written


def write_side_files(folder: Path, config: dict[str, Any], origin: Origin) -> None:
    for name, content in origin.files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(destination: Path, needed: int, force: bool) -> Iterator[Path]:
    """A temporary sibling that becomes `destination` if the block succeeds and is removed if it fails.

    Raises:
        DsparseError: the destination exists (unless `force`), or the disk lacks `needed` bytes.
    """
    check_target(destination, force)
    check_space(destination, needed)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(temporary, destination)
    except OSError as error:
        raise DsparseError(f"{destination}: not written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(destination: Path, force: bool) -> None:
    if destination.exists() and not force and (not destination.is_dir() or any(destination.iterdir())):
        raise DsparseError(f"{destination}: exists already; choose another folder or overwrite it (force)")


def check_space(destination: Path, needed: int) -> None:
    parent = next(folder for folder in destination.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise DsparseError(
            f"{destination}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free on that disk"
        )


def replace_folder(temporary: Path, destination: Path) -> None:
    """Rename, moving an older destination out of the way first."""
    old = None
    if destination.exists():
        old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
        destination.rename(old)
    temporary.rename(destination)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def save_huggingface(model: Model, path: Path, max_shard_size: int, force: bool, names: str) -> None:
    """Write a model as a Hugging Face folder, holding one layer's parameter on the host at a time."""
    layout, origin = layout_of(model.config, published=names == "published"), model.origin
    if names != "stored":
        origin = dataclasses.replace(origin, names={})
    state = nnx.state(model)
    parameters = model_parameters(state, model.runs, model.config)
    exports = exports_of(layout, origin, parameters)
    value = LayerReader(state, parameters, origin)
    config = export_config(model.config, parameters)
    with new_folder(path, sum(e.nbytes for e in exports), force) as folder:
        shards = shard(exports, max_shard_size)
        for name, part in zip(shard_names(len(shards)), shards, strict=True):
            write_shard(folder / name, part, value)
        write_index(folder, shards)
        write_side_files(folder, config, origin)


def save_native(model: Model, path: Path, force: bool) -> None:
    """Write a model as dsparse's own checkpoint, holding one layer's parameter on the host at a time."""
    from dsparse.checkpoints import native
    from dsparse.checkpoints.orbax_arrays import Streamed

    state, origin = nnx.state(model), model.origin
    parameters = model_parameters(state, model.runs, model.config)
    values = LayerReader(state, parameters, origin)
    config = export_config(model.config, parameters)
    with new_folder(path, sum(p.nbytes for p in parameters), force) as folder:
        for layer, paths in by_layer(parameters).items():
            arrays = {
                path: Streamed(p.layer_shape, p.dtype, lambda layer=layer, path=path: [values.fetch(layer, path)])
                for path, p in paths.items()
            }
            native.write_layer(folder, layer, arrays)
        write_side_files(folder, config, origin)
        native.write_manifest(folder, origin)


def by_layer(parameters: Sequence[Parameter]) -> dict[int, dict[str, Parameter]]:
    """Parameters of each layer by path, the first layer first and what is outside the layers last."""
    layers: dict[int, dict[str, Parameter]] = {}
    for parameter in parameters:
        for layer in parameter.layers:
            layers.setdefault(layer, {})[parameter.path] = parameter
    return dict(sorted(layers.items(), key=lambda item: (item[0] == TOP, item[0])))


class LayerReader:
    """Values of exports out of a model's arrays; keeps the parameters of one layer at a time on the host."""

    def __init__(self, state: nnx.State, parameters: Sequence[Parameter], origin: Origin):
        flat = dict(nnx.to_flat_state(state))
        self.where = {
            (layer, p.path): (flat[p.key], row if p.stacked else None)
            for p in parameters
            for row, layer in enumerate(p.layers)
        }
        self.origin = origin
        self.layer = TOP
        self.host: dict[str, np.ndarray] = {}

    def __call__(self, export: Export) -> np.ndarray:
        if export.slot is None:
            return self.origin.kept[export.name]
        layer, path, index = export.slot
        if layer != self.layer:
            self.layer, self.host = layer, {}
        if path not in self.host:
            self.host[path] = self.fetch(layer, path)
        return self.host[path][index].astype(export.dtype, copy=False)

    def fetch(self, layer: int, path: str) -> np.ndarray:
        variable, row = self.where[layer, path]
        array = variable[...]
        devices = array.sharding.device_set
        if len(devices) == 1 and next(iter(devices)).platform == "cpu":
            return np.asarray(array) if row is None else np.asarray(array)[row]  # a view: nothing is copied
        return jax.device_get(array if row is None else array[row])
