"""Weight gradient of a grouped matmul on Hopper: out[e] = dy[rows of e].T @ x[rows of e], zeros if there are none."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dsparse.kernels import mosaic, simt, tilings
from dsparse.kernels.simt import U32
from dsparse.kernels.tilings import WeightTiling

SM_COUNT = 132
ROW_ALIGNMENT = 8  # TMA addresses a tile by whole swizzle atoms of 8 rows


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

    Past the last group's rows `x` may hold anything; `dy` must be finite there, and both in every other row.
    """
    return _wgrad(dy, x, group_sizes, tiling=tilings.weight_gradient(x.shape[1]), interpret=interpret)


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))  # lowered once a program
def _wgrad(dy, x, group_sizes, *, tiling: WeightTiling, interpret: bool) -> Float[Array, "E F D"]:
    rows, width_f = dy.shape
    width_d = x.shape[1]
    groups = group_sizes.shape[0]
    tile_f, tile_d, tile_rows = tiling.columns_f, tiling.columns_d, tiling.rows
    wg_f, wg_d = tile_f // 2, tile_d // 2
    tiles_f, tiles_d = mosaic.cdiv(width_f, tile_f), mosaic.cdiv(width_d, tile_d)
    total = groups * tiles_f * tiles_d
    blocks = min(SM_COUNT, total)
    layout = mosaic.swizzled(x.dtype)
    stores = [range(box, min(box + tiling.staged, tile_d // 64)) for box in range(0, tile_d // 64, tiling.staged)]

    def kernel(ends_g, dy_g, x_g, o_g, dy_s, x_s, o_s, full, cleared, empty):
        sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
        trips = lax.div(total - sm + blocks - 1, blocks)

        def locate(i):
            index = sm + i * blocks
            group, tile = lax.div(index, tiles_f * tiles_d), lax.rem(index, tiles_f * tiles_d)
            wanted = lax.div(tile, tiles_d) * tile_f, lax.rem(tile, tiles_d) * tile_d
            at_f = pl.multiple_of(jnp.minimum(wanted[0], width_f - tile_f), 64)
            at_d = pl.multiple_of(jnp.minimum(wanted[1], width_d - tile_d), 64)
            start = jnp.where(group == 0, 0, ends_g[jnp.maximum(group - 1, 0)])
            end = ends_g[group]
            first = lax.div(start, ROW_ALIGNMENT) * ROW_ALIGNMENT
            steps = jnp.where(end > start, lax.div(end - first + tile_rows - 1, tile_rows), 0)
            return group, wanted, (at_f, at_d), (start, first, end), steps

        def chunk(k, first):
            return pl.multiple_of(jnp.minimum(first + k * tile_rows, rows - tile_rows), ROW_ALIGNMENT)

        def load(i, step):
            _, _, (at_f, at_d), (_, first, _), steps = locate(i)

            def fetch(k, _):
                slot = lax.rem(step + k, tiling.stages)
                row = pl.ds(chunk(k, first), tile_rows)

                @pl.when(step + k >= tiling.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(dy_g.at[row, pl.ds(at_f, tile_f)], dy_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(x_g.at[row, pl.ds(at_d, tile_d)], x_s.at[slot], full.at[slot])
                return ()

            lax.fori_loop(0, steps, fetch, ())
            return step + steps

        def free(step):
            plgpu.barrier_arrive(empty.at[lax.rem(step, tiling.stages)])

        def store(i, value, boxes):
            """Of tile i, some of its boxes of 64 columns."""
            group, wanted, (at_f, at_d), _, _ = locate(i)
            row = pl.multiple_of(at_f + wg * wg_f, wg_f)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for stage, box in enumerate(boxes):
                o_s[wg, stage] = value[:, 64 * box : 64 * (box + 1)]
            plgpu.commit_smem()
            for stage, box in enumerate(boxes):
                column = pl.multiple_of(at_d + 64 * box, 64)

                @pl.when((column >= wanted[1]) & (row >= wanted[0]))
                def _(stage=stage, column=column):
                    plgpu.copy_smem_to_gmem(o_s.at[wg, stage], o_g.at[group, pl.ds(row, wg_f), pl.ds(column, 64)])

        def multiply(i, step):
            _, _, _, (start, first, end), steps = locate(i)

            def product(acc):
                def body(k, _):
                    slot = lax.rem(step + k, tiling.stages)
                    base = chunk(k, first)
                    low, high = jnp.maximum(start, first + k * tile_rows) - base, end - base
                    left = dy_s.at[slot, :, pl.ds(wg * wg_f, wg_f)]
                    plgpu.barrier_wait(full.at[slot])

                    @pl.when((low > 0) | (high < tile_rows))
                    def _():
                        # Each warpgroup its own factor: neither waits for the other.
                        _clear_rows(left, low, high, tile_f, interpret)
                        plgpu.commit_smem()

                        @pl.when(base + tile_rows > ends_g[groups - 1])
                        def _():
                            _clear_rows(x_s.at[slot, :, pl.ds(wg * wg_d, wg_d)], low, high, tile_d, interpret)
                            plgpu.commit_smem()
                            plgpu.barrier_arrive(cleared)
                            plgpu.barrier_wait(cleared)

                    plgpu.wgmma(acc, left.transpose((1, 0)), x_s.at[slot])
                    plgpu.wgmma_wait(1)
                    pl.when(k > 0)(lambda: free(step + k - 1))
                    return ()

                lax.fori_loop(0, steps, body, ())
                return acc[...].astype(x.dtype)

            value = pl.run_scoped(product, plgpu.ACC((wg_f, tile_d), jnp.float32))
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
            plgpu.SMEM((tiling.stages, tile_rows, tile_f), x.dtype, transforms=layout),
            plgpu.SMEM((tiling.stages, tile_rows, tile_d), x.dtype, transforms=layout),
            plgpu.SMEM((2, tiling.staged, wg_f, 64), x.dtype, transforms=layout),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
        ],
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        interpret=mosaic.interpret_params() if interpret else None,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(jnp.cumsum(group_sizes, dtype=jnp.int32), dy, x)
