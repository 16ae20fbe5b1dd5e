"""Safetensors files: listed, validated, and read slice by slice straight into buffers the caller owns.

Reading goes through `pread`, so the host's memory holds only what was asked for (a memory map would count every page
it touched), and each piece is checked for NaN and infinity while it is still in the processor's cache.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dsparse.errors import DsparseError

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
        "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F32": np.float32, "F64": np.float64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

PIECE = 1 << 20  # bytes read (and checked) at once: fits a core's cache
MAX_HEADER = 100 << 20  # the format's own limit

# Of each floating dtype: unsigned view, mask without the sign, and the smallest masked value that is infinite or NaN.
_NONFINITE = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7FFF, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x7F800000),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, 0x7F, 0x7F),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, 0x7F, 0x7C),
    np.dtype(ml_dtypes.float8_e8m0fnu): (np.uint8, 0xFF, 0xFF),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `offset` is where its bytes begin."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def has_nonfinite(array: np.ndarray) -> bool:
    """Whether a C-contiguous floating array holds NaN or infinity; a few MiB at a time keeps it in cache."""
    if array.dtype not in _NONFINITE:
        return False
    unsigned, mask, limit = _NONFINITE[array.dtype]
    flat = array.reshape(-1).view(unsigned)
    step = PIECE // flat.itemsize
    return any(np.bitwise_and(flat[i : i + step], unsigned(mask)).max() >= limit for i in range(0, flat.size, step))


class TensorFiles:
    """The tensors of a set of safetensors files.

    bytes_read: what was asked for so far, over all threads. nonfinite: names of tensors read with NaN or infinity.
    once: set it when everything is read just once, as in a conversion: what has been read leaves the system's cache.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]):
        self.tensors = dict(tensors)
        self.once = False
        self.bytes_read = 0
        self.nonfinite: set[str] = set()
        self._lock = threading.Lock()
        self._files: dict[Path, int] = {}

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Copy `tensor[index]` (unit steps) into `out`, of the same dtype and of the slice's shape. Thread-safe."""
        info = self.tensors[name]
        strides = contiguous_strides(info.shape)
        start = sum(s.start * stride for s, stride in zip(index, strides, strict=True)) * info.dtype.itemsize
        whole_rows = all(s == slice(0, n) for s, n in zip(index[1:], info.shape[1:], strict=True))
        if whole_rows and out.flags.c_contiguous:
            bad = self._read_contiguous(info, info.offset + start, out)
        else:
            bad = self._read_strided(info, index, out)
        with self._lock:
            self.bytes_read += out.nbytes
            if bad:
                self.nonfinite.add(name)

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        info = self.tensors[name]
        out = np.empty(info.shape, info.dtype)
        self.read_into(name, tuple(slice(0, n) for n in info.shape), out)
        return out

    def _read_contiguous(self, info: TensorInfo, offset: int, out: np.ndarray) -> bool:
        descriptor, flat, bad = self._descriptor(info.file), out.reshape(-1), False
        buffer, step = memoryview(flat.view(np.uint8)), PIECE
        for begin in range(0, len(buffer), step):
            end = min(begin + step, len(buffer))
            filled = begin
            while filled < end:
                count = os.preadv(descriptor, [buffer[filled:end]], offset + filled)
                if count <= 0:
                    raise DsparseError(
                        f"{info.file}: ends inside tensor {info.name}; the file is truncated, copy it again"
                    )
                filled += count
            size = info.dtype.itemsize
            bad = bad or has_nonfinite(flat[begin // size : end // size])
        if self.once:
            forget(descriptor, offset, len(buffer))
        return bad

    def _read_strided(self, info: TensorInfo, index: tuple[slice, ...], out: np.ndarray) -> bool:
        """Through a memory map of just this tensor, closed at once so that its pages do not stay with the process."""
        begin = info.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(
            self._descriptor(info.file), info.offset + info.nbytes - begin, prot=mmap.PROT_READ, offset=begin
        ) as view:
            source = np.frombuffer(view, info.dtype, math.prod(info.shape), info.offset - begin).reshape(info.shape)
            np.copyto(out, source[index])
            del source
        return has_nonfinite(out if out.flags.c_contiguous else np.ascontiguousarray(out))

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            return self._files[file]


def forget(descriptor: int, offset: int = 0, length: int = 0) -> None:
    """Let the system drop a file's pages (length 0: to its end) from its cache, where it knows how."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def list_safetensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder's safetensors files, single or sharded.

    Raises:
        DsparseError: a file is missing, truncated or not a safetensors file, or the index disagrees with the files.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _list_sharded(folder, index)
    file = folder / "model.safetensors"
    if not file.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise DsparseError(
                f"{folder}: no model.safetensors or model.safetensors.index.json"
                + (f"; the index of {len(found)} .safetensors files is missing" if found else "")
            )
        file = found[0]
    return {info.name: info for info in read_header(file)}


def read_index(index: Path) -> tuple[list[str], list[str]]:
    """The files and the tensors that an index lists."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DsparseError(f"{index}: not an index of weights (no readable weight_map: {error!r})") from error
    return files, list(weight_map)


def _list_sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    files, names = read_index(index)
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise DsparseError(f"{folder}: {shorten(missing, 'missing file')}; {index.name} names them")
    tensors, errors = {}, []
    for name in files:
        try:
            for info in read_header(folder / name):
                if (first := tensors.setdefault(info.name, info)) is not info:
                    errors.append(f"{folder}: tensor {info.name} is in both {first.file.name} and {name}")
        except DsparseError as error:
            errors.append(str(error))
    if errors:
        raise DsparseError("; ".join(errors[:3]) + (f" and {len(errors) - 3} more" if len(errors) > 3 else ""))
    if absent := sorted(set(names) - set(tensors)):
        raise DsparseError(f"{index}: {shorten(absent, 'tensor')} listed but not in the files")
    return tensors


def read_header(file: Path) -> Iterator[TensorInfo]:
    """The tensors a safetensors file declares, its size and offsets checked."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= MAX_HEADER:
            raise DsparseError(f"{file}: not a safetensors file (header length {length if length >= 0 else 'missing'})")
        if 8 + length > size:
            raise DsparseError(f"{file}: truncated inside its header, {size} bytes; copy it again")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [
            (name, DTYPES.get(e["dtype"], e["dtype"]), _whole(e["shape"]), _whole(e["data_offsets"]))
            for name, e in header.items()
        ]
        if any(len(offsets) != 2 for *_, offsets in entries):
            raise ValueError("data_offsets")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DsparseError(f"{file}: not a safetensors file (unreadable header)") from error
    infos = []
    for name, dtype, shape, (begin, end) in entries:
        if not isinstance(dtype, np.dtype):
            raise DsparseError(f"{file}: tensor {name} has dtype {dtype}, which is not supported")
        infos.append(info := TensorInfo(name, dtype, shape, file, 8 + length + begin))
        if info.nbytes != end - begin:
            stated = f"its header says {end - begin}"
            raise DsparseError(f"{file}: tensor {name} of shape {list(shape)} takes {info.nbytes} bytes, {stated}")
    needed = 8 + length
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != needed:
            raise DsparseError(f"{file}: not a safetensors file (tensor {info.name} does not begin where another ends)")
        needed += info.nbytes
    if needed != size:
        state = "truncated" if needed > size else "longer than its header says"
        raise DsparseError(f"{file}: {state}, {size} bytes of {needed}; copy it again")
    return iter(infos)


def _whole(numbers: Iterable[object]) -> tuple[int, ...]:
    """Sizes or offsets as a header states them; ValueError if they are none."""
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(numbers)
    return tuple(numbers)


def shorten(names: Iterable[str], what: str, limit: int = 3) -> str:
    """ "3 tensors (a, b, c)" or "40 tensors (a, b, c and 37 more)"."""
    names = list(names)
    shown = ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
    return f"{len(names)} {what}{'s' * (len(names) != 1)} ({shown})"


def natural(name: str) -> list[int | str]:
    """Sort key that puts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]
