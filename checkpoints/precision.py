"""Casting on the host while weights stream past: FP8 blocks to floating point, bf16 to float32."""

from __future__ import annotations

import functools
import itertools
import math

import ml_dtypes
import numpy as np

from dsparse.checkpoints.tensorfiles import TensorFiles
from dsparse.params import FLOAT8, FP4_BLOCK, FP8_BLOCK, PACKED_FP4

CAST_BYTES = 4 << 20  # source bytes cast at once
_BF16, _F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


def read_as(files: TensorFiles, name: str, scale_name: str | None, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Fill `out` with `tensor[index]` in out's dtype; an FP8 tensor is multiplied by its block scales."""
    info = files.tensors[name]
    if info.dtype == out.dtype and scale_name is None:
        files.read_into(name, index, out)
        return
    scale = None if scale_name is None else files.read(scale_name).astype(np.float32)
    if info.dtype == PACKED_FP4 and scale is not None:
        _read_fp4(files, name, scale, index, out)
        return
    matrix = max(0, len(index) - 2)  # leading axes are cast one index at a time, rows a few MiB at a time
    for lead in itertools.product(*(range(s.start, s.stop) for s in index[:matrix])):
        at = tuple(slice(i, i + 1) for i in lead)
        target = out[(*(i - s.start for i, s in zip(lead, index[:matrix], strict=True)), ...)]
        for begin, end in _row_blocks(index[matrix:], info.dtype.itemsize):
            rows = index[matrix:] if begin is None else (slice(begin, end), *index[matrix + 1 :])
            part = target if begin is None else target[begin - index[matrix].start : end - index[matrix].start]
            raw = np.empty(part.shape, info.dtype)
            files.read_into(name, (*at, *rows), raw.reshape((1,) * matrix + raw.shape))
            if scale is None:
                cast_into(raw, part)
            else:
                dequantize_into(raw, scale[lead], rows, part)


def _read_fp4(files: TensorFiles, name: str, scale: np.ndarray, index: tuple[slice, slice], out: np.ndarray) -> None:
    """Fill `out` with rows and columns `index` of the unpacked weight: e2m1 values times one scale for 32 of a row."""
    rows, columns = index
    packed = slice(columns.start // 2, -(-columns.stop // 2))
    factor = scale[:, np.arange(columns.start, columns.stop) // FP4_BLOCK]
    step = max(1, CAST_BYTES // (packed.stop - packed.start))
    for begin in range(rows.start, rows.stop, step):
        end = min(begin + step, rows.stop)
        raw = np.empty((end - begin, packed.stop - packed.start), np.int8)
        files.read_into(name, (slice(begin, end), packed), raw)
        wide = float4_pairs()[raw.view(np.uint8)].reshape(end - begin, -1)
        wide = wide[:, columns.start % 2 :][:, : columns.stop - columns.start] * factor[begin:end]
        cast_into(wide, out[begin - rows.start : end - rows.start])


@functools.cache
def float4_pairs() -> np.ndarray:
    """The two e2m1 values of each of the 256 bytes, the low nibble first: float32 [256, 2]."""
    byte = np.arange(256, dtype=np.uint8)
    return np.stack([byte & 15, byte >> 4], axis=-1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def _row_blocks(index: tuple[slice, ...], itemsize: int):
    """Ranges of rows of about CAST_BYTES; (None, None) for a scalar."""
    if not index:
        return [(None, None)]
    row_bytes = itemsize * math.prod(s.stop - s.start for s in index[1:])
    step = max(FP8_BLOCK, CAST_BYTES // max(1, row_bytes))
    return [(begin, min(begin + step, index[0].stop)) for begin in range(index[0].start, index[0].stop, step)]


def cast_into(source: np.ndarray, out: np.ndarray) -> None:
    """out[...] = source in out's dtype."""
    if (
        source.dtype == _BF16 and out.dtype == _F32
    ):  # bf16 is float32's upper half: much faster than an element-wise cast
        np.left_shift(source.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, source.astype(out.dtype))


def dequantize_into(raw: np.ndarray, scale_inv: np.ndarray, index: tuple[slice, slice], out: np.ndarray) -> None:
    """out[...] = FP8 values times the scales of their 128x128 blocks (DeepSeek-V3, section 3.3.2).

    index: which rows and columns of the whole weight `raw` holds; they need not begin or end at a block's edge.
    """
    rows, columns = index
    column_blocks = np.arange(columns.start, columns.stop) // FP8_BLOCK
    table, begin = float8_values(raw.dtype), rows.start
    while begin < rows.stop:
        end = min((begin // FP8_BLOCK + 1) * FP8_BLOCK, rows.stop)
        part = slice(begin - rows.start, end - rows.start)
        wide = table[raw[part].view(np.uint8)]
        wide *= scale_inv[begin // FP8_BLOCK, column_blocks]
        cast_into(wide, out[part])
        begin = end


@functools.cache
def float8_values(dtype: np.dtype) -> np.ndarray:
    """The 256 values of an 8-bit floating-point dtype, float32."""
    assert dtype in FLOAT8
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
