"""Grouped matmul of 8-bit rows and weights on Hopper: e4m3 scaled by blocks, or int8 scaled by row and channel.

As in `grouped_matmul.py`, weights are wgmma's left operand and a group's rows its right one, so the tile is the
output's transpose; warpgroups share its rows. e4m3 products of 128 elements are scaled and added in float32 registers
(the tensor cores keep fewer bits), 64 columns at a time, so that they fit in registers beside the sums of all.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dsparse.kernels import mosaic, tilings
from dsparse.kernels.grouped_matmul import ROW_ALIGNMENT, _padded, _store_rows, blocks_of, row_tiles
from dsparse.kernels.tilings import RowTiling

TILE_K = 128  # one swizzle row, and the block that shares a scale
COLUMNS = 128  # that share a scale
E4M3_MAX = 448.0
WGMMA_COLUMNS = 64  # of the left operand of one instruction


def quantize_rows(x: Float[Array, "M D"]) -> tuple[Float[Array, "M D"], Float[Array, "M D_blocks"]]:
    """e4m3 values and a float32 scale for each 128 of a row (the last block may be shorter): what fp8 products take."""
    rows, depth = x.shape
    blocks = _filled(x.astype(jnp.float32), (-1,)).reshape(rows, -1, TILE_K)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), 1e-12) / E4M3_MAX
    values = (blocks / scale[..., None]).astype(jnp.float8_e4m3fn)
    return values.reshape(rows, -1)[:, :depth], scale


def _filled(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """With zeros up to multiples of 128 along these axes."""
    pads = [(0, -size % TILE_K if axis - x.ndim in axes else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, pads) if any(after for _, after in pads) else x


def grouped_matmul_fp8(
    x: Float[Array, "M D"],
    x_scale: Float[Array, "M D_blocks"],
    weights: Float[Array, "E *parts F D"],
    w_scale: Float[Array, "E *parts F_blocks D_blocks"],
    group_sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "M *parts F"]:
    """(x * x_scale)[rows of e] @ (weights * w_scale)[e].T; a scale for 1 x 128 of x and 128 x 128 of weights.

    Rows sorted by group; 0 past the last group. F and D other than multiples of 128 cost a copy with zeros up to one.
    `parts`: several matrices a group, such as gate and up. No gradient. Raises NotImplementedError where unsupported.
    """
    _check(x, weights, group_sizes, jnp.float8_e4m3fn)
    groups, *parts, width, depth = weights.shape
    blocks = mosaic.cdiv(width, COLUMNS), mosaic.cdiv(depth, TILE_K)
    _check_scale("x_scale", x_scale, (x.shape[0], blocks[1]))
    _check_scale("w_scale", w_scale, (groups, *parts, *blocks))
    tiling = tilings.grouped("float8_e4m3fn", x.shape[0], groups)
    rows = _padded_rows(x.shape[0], tiling)
    weights = _filled(weights, (-2, -1))
    out = _product(
        _padded(_filled(x, (-1,)), rows),
        _padded(x_scale, rows).T,
        weights.reshape(groups, -1, weights.shape[-1]),
        w_scale.reshape(groups, -1, blocks[1]),
        group_sizes,
        tiling=tiling,
        interpret=interpret,
    )
    return out[: x.shape[0]].reshape(x.shape[0], *parts, -1)[..., :width]


def grouped_matmul_int8(
    x: Int[Array, "M D"],
    x_scale: Float[Array, " M"],
    weights: Int[Array, "E F D"],
    w_scale: Float[Array, "E F"],
    group_sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "M F"]:
    """x_scale[rows] * (x[rows of e] @ weights[e].T) * w_scale[e]; exact int32 sums.

    Rows sorted by group; 0 past the last group. F and D are multiples of 128. No gradient. Raises NotImplementedError
    where unsupported.
    """
    _check(x, weights, group_sizes, jnp.int8)
    if weights.shape[1] % COLUMNS or weights.shape[2] % TILE_K:
        raise NotImplementedError(
            f"int8 grouped matmul kernel needs weights [E, F, D] with F and D multiples of 128, not {weights.shape}"
        )
    _check_scale("x_scale", x_scale, x.shape[:1])
    _check_scale("w_scale", w_scale, weights.shape[:2])
    tiling = tilings.grouped("int8", x.shape[0], len(weights))
    rows = _padded_rows(x.shape[0], tiling)
    x_scale = _padded(x_scale[:, None], rows).T
    x_rows = _padded(x, rows)
    out = _product(x_rows, x_scale, weights, w_scale, group_sizes, tiling=tiling, interpret=interpret)
    return out[: x.shape[0]]


def _padded_rows(rows: int, tiling: RowTiling) -> int:
    return max(mosaic.round_up(rows, ROW_ALIGNMENT), tiling.rows)


def _check(x, weights, group_sizes, dtype) -> None:
    mosaic.require_hopper()
    if x.dtype != dtype or weights.dtype != dtype:
        raise NotImplementedError(
            f"this grouped matmul kernel takes {jnp.dtype(dtype)}, not {x.dtype} rows and {weights.dtype} weights"
        )
    groups, *_, width, depth = weights.shape
    if x.ndim != 2 or x.shape[1] != depth or group_sizes.shape != (groups,):
        raise ValueError(f"shapes do not fit: x {x.shape}, weights {weights.shape}, group_sizes {group_sizes.shape}")
    if 0 in (x.shape[0], width, depth):
        raise NotImplementedError(f"grouped matmul kernel needs a row, F and D, not {x.shape} and {weights.shape}")


def _check_scale(name: str, scale, shape: tuple[int, ...]) -> None:
    if scale.dtype != jnp.float32 or scale.shape != shape:
        raise ValueError(f"{name} must be float32{list(shape)}, not {scale.dtype}{list(scale.shape)}")


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))  # lowered once a program
def _product(x, x_scale, weights, w_scale, group_sizes, *, tiling: RowTiling, interpret: bool) -> Float[Array, "M F"]:
    """`x_scale` is [D / 128, M] (e4m3) or [1, M] (int8)."""
    rows, depth = x.shape
    groups, width, _ = weights.shape
    steps, column_tiles = depth // TILE_K, width // tiling.columns
    blockwise = x.dtype == jnp.float8_e4m3fn
    layout = mosaic.swizzled(x.dtype)
    row_layout, column_layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    tiles, count = row_tiles(group_sizes, rows, tiling.rows)
    cluster = 1 if column_tiles % tiling.cluster or interpret else tiling.cluster  # Interpret mode knows no clusters.
    column_groups = column_tiles // cluster
    blocks = blocks_of(cluster, column_groups, tiles.shape[0] * column_groups)

    def kernel(tiles_g, count_g, x_g, xs_g, w_g, ws_g, o_g, x_s, xs_s, w_s, o_s, full, empty):
        sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
        trips = lax.div(count_g[0] * column_groups - sm + blocks - 1, blocks)

        def locate(i):
            index = sm + i * blocks
            tile = lax.div(index, column_groups)
            column_tile = lax.rem(index, column_groups) * cluster + lax.axis_index("cluster")
            return tile, column_tile, tiles_g[tile, 0], pl.multiple_of(tiles_g[tile, 1], ROW_ALIGNMENT)

        def load(i, step):
            tile, column_tile, group, base = locate(i)
            wanted_rows = tiles_g[tile, 3] - base

            def fetch(k, _):
                slot = lax.rem(step + k, tiling.stages)
                depth_slice = pl.ds(k * TILE_K, TILE_K)

                @pl.when(step + k >= tiling.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                for fewer, size in zip((0, *tiling.boxes), tiling.boxes, strict=False):

                    @pl.when((wanted_rows > fewer) & (wanted_rows <= size))
                    def _(size=size):
                        source = x_g.at[pl.ds(base, size), depth_slice]
                        plgpu.copy_gmem_to_smem(
                            source,
                            x_s.at[slot, pl.ds(0, size)],
                            full.at[slot],
                            collective_axes="cluster" if cluster > 1 else None,
                        )

                for at, size in tiling.scale_boxes:
                    source = xs_g.at[k if blockwise else 0, pl.ds(base + at, size)]
                    plgpu.copy_gmem_to_smem(source, xs_s.at[slot, pl.ds(at, size)], full.at[slot])
                column = pl.ds(column_tile * tiling.columns, tiling.columns)
                plgpu.copy_gmem_to_smem(w_g.at[group, column, depth_slice], w_s.at[slot], full.at[slot])
                return ()

            taken = jnp.where(group == groups, 0, steps)
            lax.fori_loop(0, taken, fetch, ())
            return step + taken

        def store(value, tile, column, skipped):
            """value: [columns, rows], from `column` and `skipped` rows behind the tile's base on."""
            base, first, end = (tiles_g[tile, c] for c in (1, 2, 3))
            for j in range(0, value.shape[0], 64):
                for c in range(0, value.shape[1], tiling.staged_rows):
                    size = min(tiling.staged_rows, value.shape[1] - c)
                    row = base + skipped + c
                    staged = o_s.at[wg, pl.ds(0, size)]
                    part = plgpu.layout_cast(value[j : j + 64, c : c + size], plgpu.Layout.WGMMA_TRANSPOSED)
                    staged.transpose((1, 0))[...] = part
                    out = o_g.at[pl.ds(row, size), pl.ds(column + j, 64)]
                    _store_rows(staged, out, first - row, jnp.minimum(end - row, size), width, interpret)

        def multiply(i, step):
            tile, column_tile, group, base = locate(i)
            outside = group == groups
            wanted_rows = jnp.where(outside, 0, tiles_g[tile, 3] - base)

            def blockwise_sums(skipped, size):
                """Of 64 columns each, and the `size` rows behind the first `skipped`."""
                columns = range(0, tiling.columns, WGMMA_COLUMNS)

                def body(k, carry):
                    sums, w_factor = carry
                    next_factor = ws_g[group, column_tile, jnp.minimum(k + 1, steps - 1)]
                    slot = lax.rem(step + k, tiling.stages)
                    plgpu.barrier_wait(full.at[slot])
                    new, scale = [], None
                    for column, total in zip(columns, sums, strict=True):

                        def product(acc, column=column):
                            left = w_s.at[slot, pl.ds(column, WGMMA_COLUMNS)]
                            plgpu.wgmma(acc, left, x_s.at[slot, pl.ds(skipped, size)].transpose((1, 0)))
                            return acc[...]

                        value = pl.run_scoped(product, plgpu.ACC((WGMMA_COLUMNS, size), jnp.float32))
                        if scale is None:
                            scale = plgpu.load(xs_s.at[slot, pl.ds(skipped, size)], layout=column_layout) * w_factor
                        new.append(total + value * lax.broadcast_in_dim(scale, value.shape, [1]))
                    plgpu.barrier_arrive(empty.at[slot])
                    return tuple(new), next_factor

                zeros = plgpu.layout_cast(jnp.zeros((WGMMA_COLUMNS, size), jnp.float32), plgpu.Layout.WGMMA)
                start = tuple(zeros for _ in columns), ws_g[group, column_tile, 0]
                sums, _ = lax.fori_loop(0, steps, body, start)
                return [(column, total) for column, total in zip(columns, sums, strict=True)]

            def channel_sums(skipped, size):
                """Of all columns, and the `size` rows behind the first `skipped`."""

                def scoped(acc):
                    def body(k, _):
                        slot = lax.rem(step + k, tiling.stages)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, w_s.at[slot], x_s.at[slot, pl.ds(skipped, size)].transpose((1, 0)))
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(step + k + tiling.stages - 1, tiling.stages)])

                        return ()

                    lax.fori_loop(0, steps, body, ())
                    return acc[...]

                total = pl.run_scoped(scoped, plgpu.ACC((tiling.columns, size), jnp.int32)).astype(jnp.float32)
                slot = lax.rem(step + steps - 1, tiling.stages)
                x_factor = plgpu.load(xs_s.at[slot, pl.ds(skipped, size)], layout=column_layout)
                channels = ws_g.at[group, pl.ds(column_tile * tiling.columns, tiling.columns)]
                w_factor = plgpu.load(channels, layout=row_layout, optimized=False)
                plgpu.barrier_arrive(empty.at[slot])
                total = total * lax.broadcast_in_dim(x_factor, total.shape, [1])
                return [(0, total * lax.broadcast_in_dim(w_factor, total.shape, [0]))]

            for narrower, rows_of_tile in zip((0, *tiling.widths), tiling.widths, strict=False):

                @pl.when((wanted_rows > narrower) & (wanted_rows <= rows_of_tile))
                def _(rows_of_tile=rows_of_tile):
                    size = rows_of_tile // tiling.warpgroups
                    skipped = wg * size
                    for column, total in (blockwise_sums if blockwise else channel_sums)(skipped, size):
                        store(total.astype(jnp.bfloat16), tile, column_tile * tiling.columns + column, skipped)

            @pl.when(outside)
            def _():
                size = tiling.rows // tiling.warpgroups
                zeros = plgpu.layout_cast(jnp.zeros((tiling.columns, size), jnp.bfloat16), plgpu.Layout.WGMMA)
                store(zeros, tile, column_tile * tiling.columns, wg * size)

            return step + jnp.where(outside, 0, steps)

        @pl.when(wg == tiling.warpgroups)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            steps_taken = lax.fori_loop(0, trips, load, jnp.int32(0))
            if cluster > 1:
                # The other block's last reads of what was shared: it still signals this block's barriers.
                def drain(step, _):
                    plgpu.barrier_wait(empty.at[lax.rem(step, tiling.stages)])
                    return ()

                lax.fori_loop(jnp.maximum(steps_taken - tiling.stages, 0), steps_taken, drain, ())

        @pl.when(wg < tiling.warpgroups)
        def _():
            plgpu.set_max_registers(tiling.registers, action="increase")
            lax.fori_loop(0, trips, multiply, jnp.int32(0))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((tiling.stages, tiling.rows, TILE_K), x.dtype, transforms=layout),
            plgpu.SMEM((tiling.stages, tiling.rows), jnp.float32),
            plgpu.SMEM((tiling.stages, tiling.columns, TILE_K), x.dtype, transforms=layout),
            plgpu.SMEM(
                (tiling.warpgroups, tiling.staged_rows, 64), jnp.bfloat16, transforms=mosaic.swizzled(jnp.bfloat16)
            ),
            plgpu.Barrier(num_arrivals=2 + len(tiling.scale_boxes), num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=tiling.stages)
            if cluster == 1
            else plgpu.ClusterBarrier(
                collective_axes=("cluster",), num_arrivals=tiling.warpgroups, num_barriers=tiling.stages
            ),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=tiling.warpgroups + 1,
        thread_name="wg",
        interpret=mosaic.interpret_params() if interpret else None,
    )(tiles, count, x, x_scale, weights, w_scale)
