"""dsparse's own format: one Orbax checkpoint for each layer and one for the rest, beside config and tokenizer.

    config.json, tokenizer.json, ...   as found beside the original
    dsparse.json                       manifest: format version, unusual tensor names, ties; written last
    weights/top, weights/layer_00000   Orbax (zarr, uncompressed): one array for each parameter, as the model holds it

Weights do not compress; uncompressed, an array is one plain file, and loading reads the slices it needs from it just as
from safetensors.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsparse.checkpoints.mapping import TOP, Layout, Prefix, Slot
from dsparse.checkpoints.saving import Export, write_shard
from dsparse.checkpoints.tensorfiles import DTYPES, TensorFiles, TensorInfo, read_header
from dsparse.errors import DsparseError
from dsparse.origin import Origin

if TYPE_CHECKING:
    from dsparse.checkpoints.orbax_arrays import Streamed

MANIFEST = "dsparse.json"
VERSION = 1
WEIGHTS = "weights"
ASIDE = "aside.safetensors"  # tensors that the model does not use
LAYOUT = Layout(prefixes=(Prefix("layer_{}."),), top=(), layer=())  # parameters under their own paths

_ZARR_DTYPES = {dtype.str: dtype for dtype in DTYPES.values() if dtype.kind != "V"} | {
    d.name: d for d in DTYPES.values()
}


def is_native(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def item_name(layer: int) -> str:
    return "top" if layer == TOP else f"layer_{layer:05d}"


def write_layer(folder: Path, layer: int, arrays: Mapping[str, Streamed]) -> None:
    """One Orbax item with the parameters of a layer (TOP: the rest), by path. Complete or not there at all."""
    import orbax.checkpoint as ocp

    from dsparse.checkpoints.orbax_arrays import registry

    path = folder / WEIGHTS / item_name(layer)
    for unfinished in path.parent.glob(f"{path.name}.orbax*"):
        shutil.rmtree(unfinished)
    with _quiet():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry())
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.absolute(), ocp.args.PyTreeSave(dict(arrays)))


def write_manifest(folder: Path, origin: Origin) -> None:
    """Names, ties and what is kept aside; its presence says that the checkpoint is complete."""
    if origin.kept:
        exports = [Export(name, value.dtype, value.shape, None) for name, value in origin.kept.items()]
        write_shard(folder / ASIDE, exports, lambda export: origin.kept[export.name])
    manifest = {
        "format": "dsparse",
        "version": VERSION,
        "names": [[name, *slot] for slot, name in origin.names.items()],
        "dtypes": [[layer, path, dtype] for (layer, path), dtype in origin.dtypes.items()],
        "tied": [[name, *slot] for name, slot in origin.tied.items()],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Origin:
    """The origin that was written, without the side files."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["version"]
        names = {Slot(layer, path, tuple(index)): name for name, layer, path, index in manifest["names"]}
        dtypes = {(layer, path): dtype for layer, path, dtype in manifest["dtypes"]}
        tied = {name: Slot(layer, path, tuple(index)) for name, layer, path, index in manifest["tied"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DsparseError(f"{file}: not a dsparse manifest ({error!r})") from error
    if version != VERSION:
        raise DsparseError(
            f"{file}: format version {version}, this dsparse reads version {VERSION}; convert the original again"
        )
    with TensorFiles({t.name: t for t in read_header(folder / ASIDE)} if (folder / ASIDE).is_file() else {}) as aside:
        kept = {name: aside.read(name) for name in aside.tensors}
    return Origin(str(folder), names=names, dtypes=dtypes, tied=tied, kept=kept)


def list_native(folder: Path) -> dict[str, TensorInfo]:
    """Every array of a native checkpoint, under the names of `LAYOUT`."""
    tensors = {}
    for item in sorted((folder / WEIGHTS).glob("*")):
        match = re.fullmatch(r"top|layer_([0-9]{5})", item.name)
        if match is not None:
            prefix = LAYOUT.prefixes[0].format(int(match[1])) if match[1] else ""
            tensors |= {prefix + name: info for name, info in list_item(item, prefix)}
    if not tensors:
        raise DsparseError(f"{folder}: {MANIFEST} is there but {WEIGHTS} is empty; convert the original again")
    return tensors


def list_item(item: Path, prefix: str = "") -> Iterator[tuple[str, TensorInfo]]:
    """Name and place of each array of one item."""
    for array in sorted(p for p in item.iterdir() if (p / ".zarray").is_file()):
        try:
            zarr = json.loads((array / ".zarray").read_text(encoding="utf-8"))
            shape, chunks, dtype = tuple(zarr["shape"]), tuple(zarr["chunks"]), _ZARR_DTYPES[zarr["dtype"]]
            plain = zarr["compressor"] is None and chunks == shape and zarr["order"] == "C"
        except (ValueError, KeyError, TypeError) as error:
            raise DsparseError(f"{array}/.zarray: unreadable ({error!r}); convert the original again") from error
        if not plain:
            raise DsparseError(f"{array}: compressed or in chunks, as dsparse does not write it; save the model again")
        file = array / (".".join("0" * len(shape)) or "0")
        info = TensorInfo(prefix + array.name, dtype, shape, file, 0)
        actual = file.stat().st_size if file.is_file() else -1
        if actual != info.nbytes:
            state = "missing" if actual < 0 else f"{actual} bytes of {info.nbytes}"
            raise DsparseError(f"{file}: {state}; copy the checkpoint again or convert the original again")
        yield array.name, info


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns of what is as it should be: its merged format (OCDBT) is off, and no leaf is a JAX array."""
    absl = logging.getLogger("absl")

    def drop(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "Skipping merge of OCDBT" not in message and "No jax.Array in TypeHandlerRegistry" not in message

    absl.addFilter(drop)
    try:
        yield
    finally:
        absl.removeFilter(drop)
