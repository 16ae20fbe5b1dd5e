"""Grouped matmul of 8-bit rows and weights on Hopper: e4m3 scaled by blocks, or int8 scaled by row and channel.

As in `grouped_matmul.py`, weights are wgmma's left operand and a group's rows its right one, so the tile is the
output's transpose. e4m3 products of 128 elements are scaled and added in float32 registers (the tensor cores keep fewer
bits); a tile's rows go in a few parts, so that one part's products fit in registers beside the sums of all.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, Int, Int8

from dsparse.kernels import mosaic
from dsparse.kernels.grouped_matmul import ROW_ALIGNMENT, SM_COUNT, STAGED_ROWS, _padded, _store_rows, row_tiles

TILE_K = 128  # one swizzle row, and the block that shares a scale
COLUMNS = 128
ROWS = 256
PART_ROWS = 128  # rows whose products are in registers at once
STAGES = 4
WIDTHS = (32, 64, 96, 128, 160, 192, 224, 256)


def grouped_matmul_fp8(
    x: Float8e4m3fn[Array, "M D"],
    x_scale: Float[Array, "M D_blocks"],
    weights: Float8e4m3fn[Array, "E F D"],
    w_scale: Float[Array, "E F_blocks D_blocks"],
    group_sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> BFloat16[Array, "M F"]:
    """(x * x_scale)[rows of e] @ (weights * w_scale)[e].T; a scale for 1 x 128 of x and 128 x 128 of weights.

    Rows sorted by group; 0 past the last group. F and D are multiples of 128. No gradient. Raises
    NotImplementedError where unsupported.
    """
    _check(x, weights, group_sizes, jnp.float8_e4m3fn)
    groups, width, depth = weights.shape
    _check_scale("x_scale", x_scale, (x.shape[0], depth // TILE_K))
    _check_scale("w_scale", w_scale, (groups, width // COLUMNS, depth // TILE_K))
    rows = _padded_rows(x.shape[0])
    x_scale = _padded(x_scale, rows).T
    return _product(_padded(x, rows), x_scale, weights, w_scale, group_sizes, interpret)[: x.shape[0]]


def grouped_matmul_int8(
    x: Int8[Array, "M D"],
    x_scale: Float[Array, " M"],
    weights: Int8[Array, "E F D"],
    w_scale: Float[Array, "E F"],
    group_sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> BFloat16[Array, "M F"]:
    """x_scale[rows] * (x[rows of e] @ weights[e].T) * w_scale[e]; exact int32 sums. Limits as `grouped_matmul_fp8`."""
    _check(x, weights, group_sizes, jnp.int8)
    _check_scale("x_scale", x_scale, x.shape[:1])
    _check_scale("w_scale", w_scale, weights.shape[:2])
    rows = _padded_rows(x.shape[0])
    x_scale = _padded(x_scale[:, None], rows).T
    return _product(_padded(x, rows), x_scale, weights, w_scale, group_sizes, interpret)[: x.shape[0]]


def _padded_rows(rows: int) -> int:
    return max(mosaic.round_up(rows, ROW_ALIGNMENT), ROWS)


def _check(x, weights, group_sizes, dtype) -> None:
    mosaic.require_hopper()
    if x.dtype != dtype or weights.dtype != dtype:
        raise NotImplementedError(
            f"this grouped matmul kernel takes {jnp.dtype(dtype)}, not {x.dtype} rows and {weights.dtype} weights"
        )
    groups, width, depth = weights.shape
    if x.ndim != 2 or x.shape[1] != depth or group_sizes.shape != (groups,):
        raise ValueError(f"shapes do not fit: x {x.shape}, weights {weights.shape}, group_sizes {group_sizes.shape}")
    if width % COLUMNS or depth % TILE_K or not width or not depth:
        raise NotImplementedError(
            f"8-bit grouped matmul kernel needs weights [E, F, D] with F and D multiples of 128, not {weights.shape}"
        )
    if x.shape[0] == 0:
        raise NotImplementedError("grouped matmul kernel needs at least one row")


def _check_scale(name: str, scale, shape: tuple[int, ...]) -> None:
    if scale.dtype != jnp.float32 or scale.shape != shape:
        raise ValueError(f"{name} must be float32{list(shape)}, not {scale.dtype}{list(scale.shape)}")


def _product(x, x_scale, weights, w_scale, group_sizes, interpret: bool) -> BFloat16[Array, "M F"]:
    """`x_scale` is [D / 128, M] (e4m3) or [1, M] (int8)."""
    rows, depth = x.shape
    groups, width, _ = weights.shape
    steps, column_tiles = depth // TILE_K, width // COLUMNS
    blockwise = x.dtype == jnp.float8_e4m3fn
    layout = mosaic.swizzled(x.dtype)
    row_layout, column_layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    tiles, count = row_tiles(group_sizes, rows, ROWS)
    blocks = min(SM_COUNT, tiles.shape[0] * column_tiles)

    def kernel(tiles_g, count_g, x_g, xs_g, w_g, ws_g, o_g, x_s, xs_s, w_s, o_s, full, empty):
        sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
        trips = lax.div(count_g[0] * column_tiles - sm + blocks - 1, blocks)

        def locate(i):
            index = sm + i * blocks
            tile, column_tile = lax.div(index, column_tiles), lax.rem(index, column_tiles)
            return tile, column_tile, tiles_g[tile, 0], pl.multiple_of(tiles_g[tile, 1], ROW_ALIGNMENT)

        def load(i, step):
            _, column_tile, group, base = locate(i)

            def fetch(k, _):
                slot = lax.rem(step + k, STAGES)
                depth_slice = pl.ds(k * TILE_K, TILE_K)

                @pl.when(step + k >= STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(x_g.at[pl.ds(base, ROWS), depth_slice], x_s.at[slot], full.at[slot])
                scale_row = k if blockwise else 0
                plgpu.copy_gmem_to_smem(xs_g.at[scale_row, pl.ds(base, ROWS)], xs_s.at[slot], full.at[slot])
                column = pl.ds(column_tile * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(w_g.at[group, column, depth_slice], w_s.at[slot], full.at[slot])
                return ()

            taken = jnp.where(group == groups, 0, steps)
            lax.fori_loop(0, taken, fetch, ())
            return step + taken

        def store(value, tile, column_tile, skipped):
            base, first, end = (tiles_g[tile, c] for c in (1, 2, 3))
            for c in range(0, value.shape[1], STAGED_ROWS):
                size = min(STAGED_ROWS, value.shape[1] - c)
                row = base + skipped + c
                staged = o_s.at[wg, pl.ds(0, size)]
                part = plgpu.layout_cast(value[:, c : c + size], plgpu.Layout.WGMMA_TRANSPOSED)
                staged.transpose((1, 0))[...] = part
                out = o_g.at[pl.ds(row, size), pl.ds(column_tile * COLUMNS + wg * 64, 64)]
                _store_rows(staged, out, first - row, jnp.minimum(end - row, size), width, interpret)

        def multiply(i, step):
            tile, column_tile, group, base = locate(i)
            outside = group == groups
            wanted_rows = jnp.where(outside, 0, tiles_g[tile, 3] - base)

            def blockwise_sums(parts):
                def body(k, carry):
                    sums, w_factor = carry
                    next_factor = ws_g[group, column_tile, jnp.minimum(k + 1, steps - 1)]
                    slot = lax.rem(step + k, STAGES)
                    plgpu.barrier_wait(full.at[slot])

                    def scale_of(j):
                        skipped, size = parts[j]
                        return plgpu.load(xs_s.at[slot, pl.ds(skipped, size)], layout=column_layout) * w_factor

                    def product(j):
                        """Products of part j, and the scale of the next part, loaded meanwhile."""
                        skipped, size = parts[j]

                        def scoped(acc):
                            left = w_s.at[slot, pl.ds(wg * 64, 64)]
                            plgpu.wgmma(acc, left, x_s.at[slot, pl.ds(skipped, size)].transpose((1, 0)))
                            scale = scale_of(j + 1) if j + 1 < len(parts) else None
                            return acc[...], scale

                        return pl.run_scoped(scoped, plgpu.ACC((64, size), jnp.float32))

                    new, scale = [], scale_of(0)
                    for j, total in enumerate(sums):
                        value, next_scale = product(j)
                        new.append(total + value * lax.broadcast_in_dim(scale, value.shape, [1]))
                        scale = next_scale
                    plgpu.barrier_arrive(empty.at[slot])
                    return tuple(new), next_factor

                zeros = tuple(
                    plgpu.layout_cast(jnp.zeros((64, size), jnp.float32), plgpu.Layout.WGMMA) for _, size in parts
                )
                sums, _ = lax.fori_loop(0, steps, body, (zeros, ws_g[group, column_tile, 0]))
                return sums

            def channel_sums(rows_of_tile):
                def scoped(acc):
                    def body(k, _):
                        slot = lax.rem(step + k, STAGES)
                        plgpu.barrier_wait(full.at[slot])
                        left = w_s.at[slot, pl.ds(wg * 64, 64)]
                        plgpu.wgmma(acc, left, x_s.at[slot, pl.ds(0, rows_of_tile)].transpose((1, 0)))
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(step + k + STAGES - 1, STAGES)])

                        return ()

                    lax.fori_loop(0, steps, body, ())
                    return acc[...]

                total = pl.run_scoped(scoped, plgpu.ACC((64, rows_of_tile), jnp.int32)).astype(jnp.float32)
                slot = lax.rem(step + steps - 1, STAGES)
                x_factor = plgpu.load(xs_s.at[slot, pl.ds(0, rows_of_tile)], layout=column_layout)
                channels = ws_g.at[group, pl.ds(column_tile * COLUMNS + wg * 64, 64)]
                w_factor = plgpu.load(channels, layout=row_layout, optimized=False)
                plgpu.barrier_arrive(empty.at[slot])
                total = total * lax.broadcast_in_dim(x_factor, total.shape, [1])
                return [total * lax.broadcast_in_dim(w_factor, total.shape, [0])]

            for narrower, rows_of_tile in zip([0, *WIDTHS], WIDTHS, strict=False):

                @pl.when((wanted_rows > narrower) & (wanted_rows <= rows_of_tile))
                def _(rows_of_tile=rows_of_tile):
                    part = min(PART_ROWS, rows_of_tile) if blockwise else rows_of_tile
                    parts = [(at, min(part, rows_of_tile - at)) for at in range(0, rows_of_tile, part)]
                    sums = blockwise_sums(parts) if blockwise else channel_sums(rows_of_tile)
                    for (skipped, _), total in zip(parts, sums, strict=True):
                        store(total.astype(jnp.bfloat16), tile, column_tile, skipped)

            @pl.when(outside)
            def _():
                zeros = plgpu.layout_cast(jnp.zeros((64, ROWS), jnp.bfloat16), plgpu.Layout.WGMMA)
                store(zeros, tile, column_tile, 0)

            return step + jnp.where(outside, 0, steps)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            lax.fori_loop(0, trips, load, jnp.int32(0))

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            lax.fori_loop(0, trips, multiply, jnp.int32(0))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((STAGES, ROWS, TILE_K), x.dtype, transforms=layout),
            plgpu.SMEM((STAGES, ROWS), jnp.float32),
            plgpu.SMEM((STAGES, COLUMNS, TILE_K), x.dtype, transforms=layout),
            plgpu.SMEM((2, STAGED_ROWS, 64), jnp.bfloat16, transforms=mosaic.swizzled(jnp.bfloat16)),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        interpret=mosaic.interpret_params() if interpret else None,
    )(tiles, count, x, x_scale, weights, w_scale)
