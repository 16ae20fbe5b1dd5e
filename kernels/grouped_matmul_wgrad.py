"""Weight gradient of a grouped matmul on Hopper: out[e] = dy[rows of e].T @ x[rows of e], zeros if there are none."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dsparse.kernels import mosaic, simt
from dsparse.kernels.simt import U32

SM_COUNT = 132
TILE_ROWS = 64  # rows of a group multiplied at once
ROW_ALIGNMENT = 8  # TMA addresses a tile by whole swizzle atoms of 8 rows
TILE_F = 128
WG_F = TILE_F // 2  # of a multiplying warpgroup
STAGES = 4
STAGED = 2  # boxes of 64 columns that a warpgroup stores at once


def _clear_rows(tile, low, high, width: int, interpret: bool) -> None:
    """tile[r] = 0 for r < low and r >= high, of a swizzled tile [rows, columns] that is `width` wide in memory."""
    rows, columns = tile.shape
    if interpret:
        value = tile[...]
        row = lax.broadcasted_iota(jnp.int32, tile.shape, 0)
        tile[...] = jnp.where((row >= low) & (row < high), value, jnp.zeros_like(value))
        return
    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(mosaic.swizzled(tile.dtype)), splat, splat))
    def clear(ctx, tile, low, high):
        del ctx
        low, high = U32(low.registers.item()), U32(high.registers.item())
        target = simt.pointer(tile)
        thread = simt.thread() % 128
        chunks = columns // 8  # of 16 bytes a row; swizzling moves them within the 128 bytes that are cleared anyway
        at, first = thread % chunks, thread // chunks
        for skipped in range(0, rows, 128 // chunks):
            row = first + skipped
            atom = (row // 8) * (width // 64) + at // 8
            with simt.when((row < low) | (row >= high)):
                simt.clear16(target, atom * 1024 + (row % 8) * 128 + (at % 8) * 16)

    clear(tile, low, high)


def grouped_wgrad(
    dy: Float[Array, "M F"], x: Float[Array, "M D"], group_sizes: Int[Array, " E"], *, interpret: bool = False
) -> Float[Array, "E F D"]:
    """M is a multiple of 8 and at least 64, F and D multiples of 64 and at least 128.

    `x` may hold anything past the last group's rows; `dy` must be finite there.
    """
    rows, width_f = dy.shape
    width_d = x.shape[1]
    groups = group_sizes.shape[0]
    tile_d = 256 if width_d >= 256 else 128
    wg_d = tile_d // 2
    tiles_f, tiles_d = mosaic.cdiv(width_f, TILE_F), mosaic.cdiv(width_d, tile_d)
    total = groups * tiles_f * tiles_d
    blocks = min(SM_COUNT, total)
    layout = mosaic.swizzled(x.dtype)
    stores = [range(box, min(box + STAGED, tile_d // 64)) for box in range(0, tile_d // 64, STAGED)]

    def kernel(ends_g, dy_g, x_g, o_g, dy_s, x_s, o_s, full, cleared, empty):
        sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
        trips = lax.div(total - sm + blocks - 1, blocks)

        def locate(i):
            index = sm + i * blocks
            group, tile = lax.div(index, tiles_f * tiles_d), lax.rem(index, tiles_f * tiles_d)
            wanted = lax.div(tile, tiles_d) * TILE_F, lax.rem(tile, tiles_d) * tile_d
            at_f = pl.multiple_of(jnp.minimum(wanted[0], width_f - TILE_F), 64)
            at_d = pl.multiple_of(jnp.minimum(wanted[1], width_d - tile_d), 64)
            start = jnp.where(group == 0, 0, ends_g[jnp.maximum(group - 1, 0)])
            end = ends_g[group]
            first = lax.div(start, ROW_ALIGNMENT) * ROW_ALIGNMENT
            steps = jnp.where(end > start, lax.div(end - first + TILE_ROWS - 1, TILE_ROWS), 0)
            return group, wanted, (at_f, at_d), (start, first, end), steps

        def chunk(k, first):
            return pl.multiple_of(jnp.minimum(first + k * TILE_ROWS, rows - TILE_ROWS), ROW_ALIGNMENT)

        def load(i, step):
            _, _, (at_f, at_d), (_, first, _), steps = locate(i)

            def fetch(k, _):
                slot = lax.rem(step + k, STAGES)
                row = pl.ds(chunk(k, first), TILE_ROWS)

                @pl.when(step + k >= STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(dy_g.at[row, pl.ds(at_f, TILE_F)], dy_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(x_g.at[row, pl.ds(at_d, tile_d)], x_s.at[slot], full.at[slot])
                return ()

            lax.fori_loop(0, steps, fetch, ())
            return step + steps

        def free(step):
            plgpu.barrier_arrive(empty.at[lax.rem(step, STAGES)])

        def store(i, value, boxes):
            """Of tile i, some of its boxes of 64 columns."""
            group, wanted, (at_f, at_d), _, _ = locate(i)
            row = pl.multiple_of(at_f + wg * WG_F, WG_F)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for stage, box in enumerate(boxes):
                o_s[wg, stage] = value[:, 64 * box : 64 * (box + 1)]
            plgpu.commit_smem()
            for stage, box in enumerate(boxes):
                column = pl.multiple_of(at_d + 64 * box, 64)

                @pl.when((column >= wanted[1]) & (row >= wanted[0]))
                def _(stage=stage, column=column):
                    plgpu.copy_smem_to_gmem(o_s.at[wg, stage], o_g.at[group, pl.ds(row, WG_F), pl.ds(column, 64)])

        def multiply(i, step):
            _, _, _, (start, first, end), steps = locate(i)

            def product(acc):
                def body(k, _):
                    slot = lax.rem(step + k, STAGES)
                    base = chunk(k, first)
                    low, high = jnp.maximum(start, first + k * TILE_ROWS) - base, end - base
                    plgpu.barrier_wait(full.at[slot])

                    @pl.when((low > 0) | (high < TILE_ROWS))
                    def _():
                        _clear_rows(x_s.at[slot, :, pl.ds(wg * wg_d, wg_d)], low, high, tile_d, interpret)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(cleared)
                        plgpu.barrier_wait(cleared)

                    left = dy_s.at[slot, :, pl.ds(wg * WG_F, WG_F)].transpose((1, 0))
                    plgpu.wgmma(acc, left, x_s.at[slot])
                    plgpu.wgmma_wait(1)
                    pl.when(k > 0)(lambda: free(step + k - 1))
                    return ()

                lax.fori_loop(0, steps, body, ())
                return acc[...].astype(x.dtype)

            value = pl.run_scoped(product, plgpu.ACC((WG_F, tile_d), jnp.float32))
            pl.when(steps > 0)(lambda: free(step + steps - 1))
            for boxes in stores:
                store(i, value, boxes)
            return step + steps

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            lax.fori_loop(0, trips, load, jnp.int32(0))

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            lax.fori_loop(0, trips, multiply, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((groups, width_f, width_d), x.dtype),
        scratch_types=[
            plgpu.SMEM((STAGES, TILE_ROWS, TILE_F), x.dtype, transforms=layout),
            plgpu.SMEM((STAGES, TILE_ROWS, tile_d), x.dtype, transforms=layout),
            plgpu.SMEM((2, STAGED, WG_F, 64), x.dtype, transforms=layout),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        interpret=mosaic.interpret_params() if interpret else None,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(jnp.cumsum(group_sizes, dtype=jnp.int32), dy, x)
