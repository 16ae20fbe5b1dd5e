"""Sparse attention, backward, on Hopper: gradients of the queries and of the shared key and value rows.

One block is one query and 64 of its heads. A warpgroup gathers 64 rows at a time; one computing warpgroup scores them,
the other multiplies the output's gradient with them, and with P and dS in shared memory each takes part of the columns
of dQ (kept in registers over all rows) and of dKV, which goes to global memory in atomic row additions. The rows are
free for the next gather as soon as dQ is done with them. Memory is O(T * K): no score leaves the block.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import accumulators, mosaic, rows, tilings
from .sparse_attention_forward import HALF, HEADS, LOG2_E, V_DIM

STEP = rows.ROWS  # keys of a loop step


def backward(q, kv, indices, steps, dout, lse, delta, unit, *, scale: float, deterministic: bool):
    """Gradients of sparse attention of queries R = B * T.

    Args:
      q: 16 bits (bf16 or fp16) [R, N, H], N a multiple of 64, H 512 or 576.
      kv: as q [B, S, H].
      indices: int32[R, K], K a multiple of 64; outside [0, S) stands for nothing.
      steps: int32[R], how many blocks of 64 indices to look at.
      dout: as q [R, N, 512].
      lse: float32[R, N], finite.
      delta: float32[R, N]: sum(dout * out) minus the gradient of the log-sum-exp.
      unit: float32[1], the fixed point unit of `deterministic`: gradients of kv are multiples of 1 / unit.
      scale: of the logits.
      deterministic: sum dkv in 64-bit fixed point, whose result does not depend on the order of the blocks.

    Returns:
      dq, as q, and dkv: float32[B, S, H], or int32[B, S, 2 * H] that holds 64-bit integers.
    """
    num_rows, num_heads, head_dim = q.shape
    batch, num_keys, _ = kv.shape
    queries, head_blocks = num_rows // batch, num_heads // HEADS
    blocks = num_rows * head_blocks
    has_tail = head_dim > V_DIM
    tail = tuple(range(8, head_dim // rows.CHUNK))
    parts = (rows.Part(0, tuple(range(4))), rows.Part(0, tuple(range(4, 8)) + tail))
    layout = plgpu.Layout.WGMMA
    left_columns, right_columns = tilings.SPARSE_BACKWARD_COLUMNS[head_dim]

    def spread(vector, like, dim):
        return lax.broadcast_in_dim(vector, like.shape, [dim])

    def kernel(q_g, kv_g, indices_g, steps_g, dout_g, lse_g, delta_g, unit_g, dkv_g, dq_g, *scratch):
        (q_s, q_tail_s, dout_s, tile_s, tail_s, p_s, ds_s, bias_s, barriers) = scratch[:9]
        q_ready, dout_ready, start, tile_done, p_ready, p_free, ds_ready, ds_free = scratch[9:]
        # One grid axis: a second one could not exceed 65535. The head blocks of a query share its rows in the cache.
        block = lax.axis_index("block")
        row, heads = lax.div(block, head_blocks), pl.ds(lax.rem(block, head_blocks) * HEADS, HEADS)
        wg = lax.axis_index("wg")
        num_steps = steps_g[row]
        entry = lax.div(row, queries)
        unit = unit_g[0] if deterministic else None

        pl.when(wg == 0)(lambda: rows.init_barriers(barriers, parts))
        plgpu.barrier_arrive(start)
        plgpu.barrier_wait(start)

        def half_of(ref, half):
            return ref.at[rows.opaque_zero(), :, pl.ds(half * HALF, HALF)]

        def product(a_b_pairs, shape, before=()):
            """The sum of a @ b, each after what it waits for."""

            def products(sum):
                for i, (a, b) in enumerate(a_b_pairs):
                    if i < len(before):
                        before[i]()
                    plgpu.wgmma(sum, a(), b())
                return sum[...]

            return pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))

        def heads_vector(ref):
            return plgpu.load(ref.at[row, heads], layout=layout.reduce(1), optimized=False)

        def add_to_dkv(i, first, count, width):
            """dKV of a step's rows, `count` columns from `first`, `width` at a time: P^T dO + dS^T Q."""
            targets = indices_g.at[row, pl.ds(i * STEP, STEP)]
            for column in range(first, first + count, width):
                zero = rows.opaque_zero()
                if column < V_DIM:
                    half, within = column // HALF, pl.ds(column % HALF, width)
                    pairs = [
                        (lambda z=zero: p_s.at[z].T, lambda z=zero, h=half, w=within: dout_s.at[z + h, :, w]),
                        (lambda z=zero: ds_s.at[z].T, lambda z=zero, h=half, w=within: q_s.at[z + h, :, w]),
                    ]
                else:
                    pairs = [(lambda z=zero: ds_s.at[z].T, lambda z=zero: q_tail_s.at[z])]
                values = product(pairs, (STEP, width))
                accumulators.scatter_add(values, dkv_g.at[entry], targets, column, unit)

        def add_to_dq(dq, half):
            zero = rows.opaque_zero()
            plgpu.wgmma(dq, ds_s.at[zero], tile_s.at[zero, :, pl.ds(half * HALF, HALF)])

        def store(dq, stage, first, count):
            stage[...] = dq.astype(dq_g.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stage, dq_g.at[row, heads, pl.ds(first, count)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 0)
        def score():
            plgpu.set_max_registers(232, action="increase")
            for half in (0, 1):
                plgpu.copy_gmem_to_smem(q_g.at[row, heads, pl.ds(half * HALF, HALF)], q_s.at[half], q_ready)
            if has_tail:
                plgpu.copy_gmem_to_smem(q_g.at[row, heads, pl.ds(V_DIM, rows.CHUNK)], q_tail_s.at[0], q_ready)
            for half in (0, 1):
                plgpu.copy_gmem_to_smem(dout_g.at[row, heads, pl.ds(half * HALF, HALF)], dout_s.at[half], dout_ready)
            plgpu.barrier_wait(q_ready)
            plgpu.barrier_wait(dout_ready)
            lse = heads_vector(lse_g) * LOG2_E

            def run(dq):
                def step(i, _):
                    zero = rows.opaque_zero()
                    pairs = [(lambda h=h: q_s.at[zero + h], lambda h=h: half_of(tile_s, h).T) for h in (0, 1)]
                    if has_tail:
                        pairs.append((lambda: q_tail_s.at[zero], lambda: tail_s.at[zero].T))
                    waits = [lambda number=number: rows.wait_full(barriers, number, i) for number in (0, 1)]
                    s = product(pairs, (HEADS, STEP), waits)
                    bias = plgpu.load(bias_s.at[0], layout=layout.reduce(0))
                    p = jnp.exp2(s * (scale * LOG2_E) + spread(bias, s, 1) - spread(lse, s, 0))
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(p_free))
                    p_s[0] = p.astype(q.dtype)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(p_ready)
                    plgpu.barrier_wait(ds_ready)
                    add_to_dq(dq, 0)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(tile_done)
                    add_to_dkv(i, 0, HALF, left_columns)
                    plgpu.barrier_arrive(ds_free)
                    return ()

                lax.fori_loop(0, num_steps, step, ())
                return dq[...]

            dq = pl.run_scoped(run, plgpu.ACC((HEADS, HALF), jnp.float32))
            store(dq, q_s.at[0], 0, HALF)

        @pl.when(wg == 1)
        def differentiate():
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(dout_ready)
            plgpu.barrier_wait(q_ready)
            delta = heads_vector(delta_g)

            def run(dq, dq_tail):
                def step(i, _):
                    zero = rows.opaque_zero()
                    pairs = [(lambda h=h: dout_s.at[zero + h], lambda h=h: half_of(tile_s, h).T) for h in (0, 1)]
                    waits = [lambda number=number: rows.wait_full(barriers, number, i) for number in (0, 1)]
                    dp = product(pairs, (HEADS, STEP), waits)
                    plgpu.barrier_wait(p_ready)
                    p = plgpu.load(p_s.at[0], layout=layout).astype(jnp.float32)
                    ds = p * (dp - spread(delta, dp, 0)) * scale
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(ds_free))
                    ds_s[0] = ds.astype(q.dtype)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_ready)
                    add_to_dq(dq, 1)
                    if has_tail:
                        plgpu.wgmma(dq_tail, ds_s.at[zero], tail_s.at[zero])
                    plgpu.wgmma_wait(0)
                    # dQ's left columns are the tile's only other reader, and the gather waits for one arrival.
                    plgpu.barrier_wait(tile_done)
                    rows.free(barriers, parts, 0)
                    rows.free(barriers, parts, 1)
                    add_to_dkv(i, HALF, head_dim - HALF, right_columns)
                    plgpu.barrier_arrive(p_free)
                    return ()

                lax.fori_loop(0, num_steps, step, ())
                return dq[...], dq_tail[...] if has_tail else None

            accumulators = [plgpu.ACC((HEADS, HALF), jnp.float32)]
            if has_tail:
                accumulators.append(plgpu.ACC((HEADS, rows.CHUNK), jnp.float32))
            dq, dq_tail = pl.run_scoped(run if has_tail else lambda dq: run(dq, None), *accumulators)
            store(dq, q_s.at[1], HALF, HALF)
            if has_tail:
                store(dq_tail, q_tail_s.at[0], V_DIM, rows.CHUNK)

        @pl.when(wg == 2)
        def gather():
            plgpu.set_max_registers(40, action="decrease")
            rows.gather(
                kv_g,
                indices_g,
                steps_g,
                tile_s,
                tail_s or p_s,
                bias_s,
                barriers,
                parts,
                slots=1,
                items=(block, blocks, blocks),
                per_row=head_blocks,
            )

    def tiles(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=mosaic.swizzled(q.dtype))

    one = tiles(1, HEADS, rows.CHUNK)
    words, sum_type = (2 * head_dim, jnp.int32) if deterministic else (head_dim, jnp.float32)
    dkv = jax.new_ref(jnp.zeros((batch, num_keys, words), sum_type))
    dq = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            tiles(2, HEADS, HALF),
            one if has_tail else None,
            tiles(2, HEADS, HALF),
            tiles(1, STEP, V_DIM),
            one if has_tail else None,
            one,
            one,
            plgpu.SMEM((1, STEP), jnp.float32),
            rows.barrier_scratch(parts),
            plgpu.Barrier(num_arrivals=3 if has_tail else 2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=3),
            *[plgpu.Barrier()] * 5,
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
    )(q, kv, indices, steps, dout, lse, delta, unit, dkv)
    return dq, dkv[...]
