"""Grouped matmul for mixtures of experts on Hopper: rows sorted by group, one weight matrix a group.

Three products, in bfloat16 or float16 with float32 accumulation:

- forward, `x[rows of e] @ weights[e].T`, optionally with gate, up and SwiGLU fused;
- dgrad, `dy[rows of e] @ weights[e]`;
- wgrad, `dy[rows of e].T @ x[rows of e]`, in `grouped_matmul_wgrad.py`.

Forward and dgrad compute the *transposed* output tile: weights are wgmma's left operand (64 output columns an
instruction) and rows its right operand, whose size goes in steps of 8. So a group of 270 rows costs little more than
270 rows, where row tiles of 128 would cost 384. Rows of a group are spread evenly over its tiles, and all tiles of a
group run side by side, so that a weight is read from device memory once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf
from jaxtyping import Array, Float, Int

from dsparse.kernels import mosaic, tilings
from dsparse.kernels.grouped_matmul_wgrad import grouped_wgrad
from dsparse.kernels.tilings import RowTiling

SM_COUNT = 132
TILE_K = 64  # 128 bytes of 16-bit numbers: one swizzle row
ROW_ALIGNMENT = 8  # TMA addresses a tile by whole swizzle atoms of 8 rows
ROW_STEP = 16  # rows of a group's tiles are multiples of this
LEAST_WIDTH, WIDTH_STEP = 128, 64  # what F and D are filled up to with zeros


def row_tiles(
    group_sizes: Int[Array, " E"], rows: int, tile_rows: int
) -> tuple[Int[Array, "tiles 4"], Int[Array, " 1"]]:
    """Splits rows into tiles of at most `tile_rows` within one group each.

    Returns int32[tiles, 4] of (group, first row loaded, first row, end row) and int32[1], how many of the tiles are
    used. Rows past the last group come as tiles of group E. The first row loaded is a multiple of ROW_ALIGNMENT, and
    moved down where a whole tile would reach past the last row.
    """
    groups = group_sizes.shape[0]
    sizes = jnp.append(group_sizes, rows - group_sizes.sum()).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    aligned = starts // ROW_ALIGNMENT * ROW_ALIGNMENT
    counts = jnp.where(sizes > 0, -((aligned - ends) // tile_rows), 0)
    heights = -((aligned - ends) // (jnp.maximum(counts, 1) * ROW_STEP)) * ROW_STEP
    tile_ends = jnp.cumsum(counts)
    most = groups + 1 + (rows + (groups + 1) * (ROW_ALIGNMENT - 1)) // tile_rows
    tile = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum((tile_ends[None, :] <= tile[:, None]).sum(axis=1, dtype=jnp.int32), groups)
    first = aligned[group] + (tile - (tile_ends - counts)[group]) * heights[group]
    end = jnp.minimum(first + heights[group], ends[group])
    base = jnp.clip(first, 0, rows - tile_rows)
    return jnp.stack([group, base, jnp.maximum(first, starts[group]), end], axis=1), tile_ends[-1:]


def blocks_of(cluster: int, column_groups: int, items: int) -> int:
    """Clusters of a persistent kernel over `items` = row tiles x column groups: one on each that the device holds.

    Column groups of a row tile load the same rows. Where that leaves at most one multiprocessor in 25 idle, all of
    them run side by side: bf16 with 8 column groups, even 568 instead of 556 TFLOP/s, routed 527 instead of 517.
    """
    most = SM_COUNT // cluster
    whole = most // column_groups * column_groups
    return min(whole if 25 * (most - whole) <= most else most, items)


def _store_rows(staged, out, first, end, row_stride: int, interpret: bool) -> None:
    """out[r] = staged[r] for first <= r < end, of a swizzled tile in shared memory [rows, 64] of 16-bit numbers.

    TMA stores whole boxes only, so each thread copies its 16 bytes under a predicate.
    """
    if interpret:

        def row(r, _):
            @pl.when((r >= first) & (r < end))
            def _():
                out[r] = staged[r]

            return ()

        lax.fori_loop(0, staged.shape[0], row, ())
        return
    rows = staged.shape[0]
    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(mosaic.swizzled(staged.dtype)), plgpu.RefType(), splat, splat))
    def copy(ctx, staged, out, first, end):
        del ctx
        i32, i64, i8 = (ir.IntegerType.get_signless(bits) for bits in (32, 64, 8))
        chunk_type = ir.VectorType.get((4,), i32)

        def const(value, dtype=i32):
            return arith.constant(dtype, ir.IntegerAttr.get(dtype, value))

        first, end = first.registers.item(), end.registers.item()
        mgpu_utils.warpgroup_barrier()
        source = mgpu_utils.memref_ptr(staged)
        target = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu_utils.memref_ptr(out))
        thread = arith.remui(mgpu_utils.thread_idx(), const(128))
        chunk = arith.remui(thread, const(8))
        for i in range(mosaic.cdiv(rows, 16)):
            row = arith.addi(arith.divui(thread, const(8)), const(16 * i))
            inside = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, row, first), arith.cmpi(arith.CmpIPredicate.slt, row, end)
            )
            branch = scf.IfOp(inside)
            with ir.InsertionPoint(branch.then_block):
                swizzle = arith.muli(arith.xori(chunk, arith.remui(row, const(8))), const(16))
                offset = arith.addi(arith.muli(row, const(128)), swizzle)
                value = llvm.load(chunk_type, mgpu_utils.getelementptr(source, [offset], i8))
                offset = arith.addi(
                    arith.muli(arith.extui(i64, row), const(row_stride * 2, i64)),
                    arith.extui(i64, arith.muli(chunk, const(16))),
                )
                llvm.store(value, mgpu_utils.getelementptr(target, [offset], i8))
                scf.yield_([])
        mgpu_utils.warpgroup_barrier()

    copy(staged, out, first, end)


def _check(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> None:
    *_, out_width, depth = weights.shape
    if x.dtype != weights.dtype or x.dtype not in mosaic.SIXTEEN_BITS:
        raise NotImplementedError(
            f"grouped matmul kernel takes bfloat16 or float16, not {x.dtype} rows and {weights.dtype} weights"
        )
    if x.ndim != 2 or x.shape[1] != depth or group_sizes.shape != weights.shape[:1]:
        raise ValueError(f"shapes do not fit: x {x.shape}, weights {weights.shape}, group_sizes {group_sizes.shape}")
    if 0 in (x.shape[0], out_width, depth):
        raise NotImplementedError(f"grouped matmul kernel needs a row, F and D, not {x.shape} and {weights.shape}")


def _whole_tiles(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """With zeros up to multiples of 64 from 128 along these axes."""
    extra = [max(LEAST_WIDTH, mosaic.round_up(size, WIDTH_STEP)) - size for size in x.shape]
    pads = [(0, extra[axis] if axis - x.ndim in axes else 0) for axis in range(x.ndim)]
    return jnp.pad(x, pads) if any(after for _, after in pads) else x


def _padded(x: jax.Array, rows: int) -> jax.Array:
    return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))


def _rows_times_weights(
    x, weights, group_sizes, interpret: bool, *, transposed: bool = False, swiglu: bool = False, limit=None
):
    """The kernel over rows padded to what it needs (no copy when M is a multiple of 8 and a tile)."""
    out_columns = weights.shape[-1] if transposed else weights.shape[-2]
    tiling = tilings.grouped("16 bits, swiglu" if swiglu else "16 bits", x.shape[0], len(weights))
    rows = max(mosaic.round_up(x.shape[0], ROW_ALIGNMENT), tiling.rows)
    out = _tiles_kernel(
        _padded(x, rows),
        weights,
        group_sizes,
        out_columns=out_columns,
        transposed=transposed,
        swiglu=swiglu,
        limit=limit,
        tiling=tiling,
        interpret=interpret,
    )
    return out[: x.shape[0]]


def _no_gradient(group_sizes):
    return np.zeros(group_sizes.shape, jax.dtypes.float0)


def _weight_gradient(dy, x, group_sizes, interpret: bool):
    rows = max(mosaic.round_up(x.shape[0], ROW_ALIGNMENT), 64)
    return grouped_wgrad(_padded(dy, rows), _padded(x, rows), group_sizes, interpret=interpret)


def grouped_matmul(
    x: Float[Array, "M D"],
    weights: Float[Array, "E F D"],
    group_sizes: Int[Array, " E"],
    interpret: bool = False,
) -> Float[Array, "M F"]:
    """out[rows of e] = x[rows of e] @ weights[e].T, rows sorted by group; 0 past the last group's rows.

    `sum(group_sizes)` is at most M; groups may be empty. F and D other than multiples of 64 from 128 cost a copy with
    zeros up to one. Differentiable in x and weights: rows of the cotangent past the last group must be finite. Raises
    NotImplementedError where unsupported.
    """
    mosaic.require_hopper()
    _check(x, weights, group_sizes)
    out = _matmul(_whole_tiles(x, (-1,)), _whole_tiles(weights, (-2, -1)), group_sizes, interpret)
    return out[:, : weights.shape[-2]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x, weights, group_sizes, interpret):
    return _rows_times_weights(x, weights, group_sizes, interpret)


def _matmul_fwd(x, weights, group_sizes, interpret):
    return _matmul(x, weights, group_sizes, interpret), (x, weights, group_sizes)


def _matmul_bwd(interpret, residuals, dy):
    x, weights, group_sizes = residuals
    dx = _rows_times_weights(dy, weights, group_sizes, interpret, transposed=True)
    return dx, _weight_gradient(dy, x, group_sizes, interpret), _no_gradient(group_sizes)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def grouped_swiglu(
    x: Float[Array, "M D"],
    weights: Float[Array, "E 2 F D"],
    group_sizes: Int[Array, " E"],
    limit: float | None = None,
    interpret: bool = False,
) -> Float[Array, "M F"]:
    """silu(x @ gate[e].T) * (x @ up[e].T), rows sorted by group, `weights[e]` = (gate, up); 0 past the last group.

    limit: gate is at most that, and up within +-limit (DeepSeek-V4). Limits of shapes as in `grouped_matmul`. The
    backward recomputes gate and up.
    """
    mosaic.require_hopper()
    _check(x, weights, group_sizes)
    out = _swiglu(_whole_tiles(x, (-1,)), _whole_tiles(weights, (-2, -1)), group_sizes, limit, interpret)
    return out[:, : weights.shape[-2]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _swiglu(x, weights, group_sizes, limit, interpret):
    return _rows_times_weights(x, weights, group_sizes, interpret, swiglu=True, limit=limit)


def _swiglu_fwd(x, weights, group_sizes, limit, interpret):
    return _swiglu(x, weights, group_sizes, limit, interpret), (x, weights, group_sizes)


def _swiglu_bwd(limit, interpret, residuals, dy):
    x, weights, group_sizes = residuals
    groups, _, width, depth = weights.shape
    stacked = weights.reshape(groups, 2 * width, depth)
    gate, up = jnp.split(_rows_times_weights(x, stacked, group_sizes, interpret).astype(jnp.float32), 2, axis=1)
    dy = dy.astype(jnp.float32)
    gate_moves = up_moves = 1.0
    if limit is not None:
        gate_moves, up_moves = gate < limit, jnp.abs(up) < limit
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = dy * up * (sigmoid + silu * (1 - sigmoid)) * gate_moves
    d_stacked = jnp.concatenate([d_gate, dy * silu * up_moves], axis=1).astype(x.dtype)
    dx = _rows_times_weights(d_stacked, stacked, group_sizes, interpret, transposed=True)
    d_weights = _weight_gradient(d_stacked, x, group_sizes, interpret).reshape(weights.shape)
    return dx, d_weights, _no_gradient(group_sizes)


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@functools.partial(
    jax.jit, static_argnames=("out_columns", "transposed", "swiglu", "limit", "tiling", "interpret")
)  # lowered once a program
def _tiles_kernel(
    x: Float[Array, "M K"],
    weights: Float[Array, "E ..."],
    group_sizes: Int[Array, " E"],
    *,
    out_columns: int,
    transposed: bool,
    swiglu: bool,
    limit: float | None,
    tiling: RowTiling,
    interpret: bool,
) -> Float[Array, "M out_columns"]:
    """The persistent kernel.

    `weights[e]` is [out_columns, K], [K, out_columns] if transposed, or [2, out_columns, K] for swiglu. Warpgroup 2
    loads; 0 and 1 multiply, each half of a tile's rows.
    """
    rows, depth = x.shape
    groups = weights.shape[0]
    steps = depth // TILE_K
    loaded_columns = tiling.columns * (2 if swiglu else 1)
    column_tiles = mosaic.cdiv(out_columns, tiling.columns)
    stages = tiling.stages
    layout = mosaic.swizzled(x.dtype)
    tiles, count = row_tiles(group_sizes, rows, tiling.rows)
    # Two blocks with neighbouring columns share the rows they load. (Interpret mode knows no clusters.)
    cluster = 1 if column_tiles % tiling.cluster or interpret else tiling.cluster
    column_groups = column_tiles // cluster
    blocks = blocks_of(cluster, column_groups, tiles.shape[0] * column_groups)

    def kernel(tiles_g, count_g, x_g, w_g, o_g, x_s, w_s, o_s, full, empty):
        sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
        trips = lax.div(count_g[0] * column_groups - sm + blocks - 1, blocks)

        def locate(i):
            index = sm + i * blocks
            tile = lax.div(index, column_groups)
            # lax.rem would cost the register that spills.
            column_tile = (index - tile * column_groups) * cluster + lax.axis_index("cluster")
            wanted = column_tile * tiling.columns
            return tile, wanted, pl.multiple_of(jnp.minimum(wanted, out_columns - tiling.columns), 64)

        def load(i, step):
            tile, _, column = locate(i)
            group, base = tiles_g[tile, 0], pl.multiple_of(tiles_g[tile, 1], ROW_ALIGNMENT)
            wanted_rows = tiles_g[tile, 3] - base

            def fetch(k, _):
                slot = lax.rem(step + k, stages)
                depth_slice = pl.ds(k * TILE_K, TILE_K)

                @pl.when(step + k >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                for fewer, size in zip((0, *tiling.boxes), tiling.boxes, strict=False):

                    @pl.when((wanted_rows > fewer) & (wanted_rows <= size))
                    def _(size=size):
                        plgpu.copy_gmem_to_smem(
                            x_g.at[pl.ds(base, size), depth_slice],
                            x_s.at[slot, pl.ds(0, size)],
                            full.at[slot],
                            collective_axes="cluster" if cluster > 1 else None,
                        )

                if transposed:
                    plgpu.copy_gmem_to_smem(
                        w_g.at[group, depth_slice, pl.ds(column, tiling.columns)], w_s.at[slot], full.at[slot]
                    )
                elif swiglu:
                    for half in range(2):
                        plgpu.copy_gmem_to_smem(
                            w_g.at[group, half, pl.ds(column, tiling.columns), depth_slice],
                            w_s.at[slot, pl.ds(half * tiling.columns, tiling.columns)],
                            full.at[slot],
                        )
                else:
                    plgpu.copy_gmem_to_smem(
                        w_g.at[group, pl.ds(column, tiling.columns), depth_slice], w_s.at[slot], full.at[slot]
                    )
                return ()

            count = jnp.where(group == groups, 0, steps)
            lax.fori_loop(0, count, fetch, ())
            return step + count

        def left_operand(slot, first, size):
            if transposed:
                return w_s.at[slot, :, pl.ds(first, size)].transpose((1, 0))
            return w_s.at[slot, pl.ds(first, size)]

        def store(values, tile, wanted, column, skipped):
            """values[j]: [64, width], 64 columns from `column + 64 * j`, of rows `skipped` behind the tile's base."""
            base, first, end = (tiles_g[tile, c] for c in (1, 2, 3))
            for j, value in enumerate(values):
                at = column + 64 * j

                @pl.when(at >= wanted)
                def _(value=value, at=at):
                    for c in range(0, value.shape[1], tiling.staged_rows):
                        size = min(tiling.staged_rows, value.shape[1] - c)
                        row = base + skipped + c
                        staged = o_s.at[wg, pl.ds(0, size)]
                        part = plgpu.layout_cast(value[:, c : c + size], plgpu.Layout.WGMMA_TRANSPOSED)
                        staged.transpose((1, 0))[...] = part
                        out = o_g.at[pl.ds(row, size), pl.ds(at, 64)]
                        _store_rows(staged, out, first - row, jnp.minimum(end - row, size), out_columns, interpret)

        def multiply(i, step):
            tile, wanted, column = locate(i)
            group, base, end = (tiles_g[tile, c] for c in (0, 1, 3))
            outside = group == groups
            wanted_width = jnp.where(outside, 0, end - base)

            def product(width, *accs):
                """Products with the `width` rows that are this warpgroup's half."""

                def body(k, _):
                    slot = lax.rem(step + k, stages)
                    plgpu.barrier_wait(full.at[slot])
                    right = x_s.at[slot, pl.ds(wg * width, width)].transpose((1, 0))
                    for i, acc in enumerate(accs):
                        plgpu.wgmma(acc, left_operand(slot, i * tiling.columns, tiling.columns), right)
                    plgpu.wgmma_wait(len(accs))

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(step + k + stages - 1, stages)])

                    return ()

                lax.fori_loop(0, steps, body, ())
                values = [acc[...] for acc in accs]
                plgpu.barrier_arrive(empty.at[lax.rem(step + steps - 1, stages)])
                return values

            for narrower, width in zip((0, *tiling.widths), tiling.widths, strict=False):

                @pl.when((wanted_width > narrower) & (wanted_width <= width))
                def _(width=width):
                    half = width // 2
                    accs = [plgpu.ACC((tiling.columns, half), jnp.float32)] * (1 + swiglu)
                    values = pl.run_scoped(lambda *accs: product(half, *accs), *accs)
                    if swiglu:
                        gate, up = values
                        if limit is not None:
                            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
                        value = gate / (1 + jnp.exp(-gate)) * up
                    else:
                        (value,) = values
                    value = value.astype(x.dtype)
                    parts = [value[j : j + 64] for j in range(0, value.shape[0], 64)]
                    store(parts, tile, wanted, column, wg * half)

            @pl.when(outside)
            def _():
                half = tiling.rows // 2
                zeros = plgpu.layout_cast(jnp.zeros((64, half), x.dtype), plgpu.Layout.WGMMA)
                store([zeros] * (tiling.columns // 64), tile, wanted, column, wg * half)

            return step + jnp.where(outside, 0, steps)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            steps_taken = lax.fori_loop(0, trips, load, jnp.int32(0))
            if cluster > 1:
                # The other block's last reads of what was shared: it still signals this block's barriers.
                def drain(step, _):
                    plgpu.barrier_wait(empty.at[lax.rem(step, stages)])
                    return ()

                lax.fori_loop(jnp.maximum(steps_taken - stages, 0), steps_taken, drain, ())

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(tiling.registers, action="increase")
            lax.fori_loop(0, trips, multiply, jnp.int32(0))

    w_shape = (TILE_K, tiling.columns) if transposed else (loaded_columns, TILE_K)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, out_columns), x.dtype),
        scratch_types=[
            plgpu.SMEM((stages, tiling.rows, TILE_K), x.dtype, transforms=layout),
            plgpu.SMEM((stages, *w_shape), x.dtype, transforms=layout),
            plgpu.SMEM((2, tiling.staged_rows, 64), x.dtype, transforms=layout),
            plgpu.Barrier(num_arrivals=3 if swiglu else 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages)
            if cluster == 1
            else plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=2, num_barriers=stages),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        interpret=mosaic.interpret_params() if interpret else None,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=False),
    )(tiles, count, x, weights)
