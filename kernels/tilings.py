"""How kernels cut their work into tiles, for each class of shapes: chosen once on an H100, not searched for at start.

Every entry was timed beside its alternatives in one process, in turns, on the shapes of `benchmarks.kernels`; comments
say what an alternative cost. What is not here has no alternative that fits into registers and shared memory.
"""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class RowTiling:
    """A tile of a grouped matmul: output columns, and rows of one group, shared among the multiplying warpgroups."""

    columns: int
    warpgroups: int  # that multiply
    widths: tuple[int, ...]  # rows a tile may be multiplied with; the last is the most rows of a tile
    boxes: tuple[int, ...]  # rows a load may take; the last is the most rows of a tile
    stages: int  # of the load pipeline
    registers: int  # of a multiplying thread
    cluster: int  # blocks with neighbouring columns that share the rows they load
    staged_rows: int  # of the output that pass through shared memory at once
    scale_boxes: tuple[tuple[int, int], ...] = ()  # (first, rows) of loads of row scales: up to 256, 128-byte aligned

    @property
    def rows(self) -> int:
        return self.widths[-1]


# 288 rows: of 256 groups of 256 rows on average, nearly all fit into one tile, so that a weight is multiplied once.
_SIXTEEN_BITS = RowTiling(
    columns=128,
    warpgroups=2,
    widths=(64, 128, 192, 224, 256, 272, 288),
    boxes=(64, 128, 256, 288),
    stages=4,
    registers=232,
    # Rows loaded by each block alone: even 537 instead of 553 TFLOP/s, routed 513 instead of 518; by four: 360, 347.
    cluster=2,
    staged_rows=64,
)
GROUPED = {
    "16 bits": _SIXTEEN_BITS,
    "16 bits, swiglu": dataclasses.replace(_SIXTEEN_BITS, columns=64),  # of gate and of up
    "float8_e4m3fn": RowTiling(
        columns=128,
        warpgroups=2,
        # 288 rows as well, in products of 72: routed 698 instead of 655 TFLOP/s, even 872 instead of 889; it spills
        widths=(64, 128, 192, 256),
        boxes=(256,),
        stages=4,
        registers=240,
        cluster=2,  # rows loaded by each block alone: 711-785 instead of 878-997 TFLOP/s
        staged_rows=32,
        scale_boxes=((0, 256),),
    ),
    "int8": RowTiling(
        columns=128,
        warpgroups=3,
        widths=(48, 96, 144, 192, 240, 288),  # wgmma's integers take multiples of 16 rows
        boxes=(96, 192, 288),
        stages=4,
        registers=160,
        cluster=1,  # two spill
        staged_rows=32,
        scale_boxes=((0, 160), (160, 128)),
    ),
}


FEW_ROWS = 16  # of a group on average, up to which reading weights takes all the time
_FOR_FEW_ROWS = {"widths": (16, 32, 64), "boxes": (16, 32, 64), "stages": 8, "cluster": 1}


def grouped(kind: str, rows: int, groups: int) -> RowTiling:
    """Of so many rows in so many groups. Decoding has few: low tiles leave memory for more loads on their way.

    GB/s of weights read by 256 experts, low tiles and high ones: 4 rows each, bf16 2860 and 2660, fp8 2830 and 2580; 16
    each, 2817 and 2711, 2755 and 2644; 32 each, where some groups are higher than a tile, 2700 and 2682, 2624 and 2601.
    Rows that belong to no group count too: experts spread over devices get low tiles only with fewer rows still.
    """
    tiling = GROUPED[kind]
    if rows > FEW_ROWS * groups or kind == "int8":  # int8's three warpgroups take multiples of 48 rows
        return tiling
    return dataclasses.replace(tiling, **_FOR_FEW_ROWS, scale_boxes=((0, 64),) if tiling.scale_boxes else ())


@dataclasses.dataclass(frozen=True)
class WeightTiling:
    """A tile of a grouped matmul's weight gradient, [columns of dy, columns of x], and rows multiplied at once."""

    columns_f: int
    columns_d: int
    rows: int
    stages: int
    staged: int  # boxes of 64 columns that a warpgroup stores at once


# Three stages and stores of four boxes: even 437 instead of 493 TFLOP/s, routed 395 instead of 435; stores of one box: 460
# and 411. Measured while both warpgroups still waited for each other to clear rows: one a step behind the other, so that
# one stores while the other multiplies, even 460 instead of 496, routed 409 instead of 391; clusters of two that share the
# rows of x they load, no difference (even 463 instead of 482, routed 399 instead of 396, within the noise of both).
WEIGHT_GRADIENT = {
    "wide": WeightTiling(columns_f=128, columns_d=256, rows=64, stages=4, staged=2),  # x has 256 columns or more
    "narrow": WeightTiling(columns_f=128, columns_d=128, rows=64, stages=4, staged=2),
}


def weight_gradient(width_d: int) -> WeightTiling:
    return WEIGHT_GRADIENT["wide" if width_d >= 256 else "narrow"]


# Sparse attention: registers of a thread of the left, right and gathering warpgroup, by what a row is stored as.
# They sum to 504 at most. Dequantizing takes more of them than copying.
SPARSE_FORWARD_REGISTERS = {"16 bits": (224, 216, 64), "fp8": (216, 208, 80)}
# Columns of the row gradient that the two computing warpgroups add at once, by row width: as many as registers allow
# beside those of the query gradient.
SPARSE_BACKWARD_COLUMNS = {512: (128, 128), 576: (128, 64)}


class IndexerTiling(NamedTuple):
    """Of the lightning indexer's logits."""

    columns: int  # queries x heads of a block
    keys: int  # that a block multiplies at once, half of them a warpgroup
    stages: int


INDEXER = IndexerTiling(columns=256, keys=128, stages=4)
