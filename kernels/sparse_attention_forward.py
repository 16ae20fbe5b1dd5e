"""Sparse attention, forward, on Hopper: every query attends to rows it names, with one shared key and value head.

One block is one query and 64 of its heads. A gathering warpgroup fills two tiles of 64 rows; two computing warpgroups
take turns at them, as FlashMLA does: each scores its own tile, then both multiply both tiles' probabilities with the
values, one the left 256 columns of the output, the other the right 256. So the exponentials of one run while the tensor
cores work for the other: the left one's next scores queue behind its products, and the right one scores once these are
there. Scores are in units of log2, with a running maximum that passes from one to the other. Sums are rescaled only
where scores exceed it by far, which after a query's first tiles is rare; it cancels in the end.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import accumulators, mosaic, rows, tilings

HEADS = 64  # of a block
STEP = 2 * rows.ROWS  # keys of a loop step
V_DIM = 512
HALF = V_DIM // 2
LOG2_E = math.log2(math.e)
_MINUS_INF = -1e30  # a maximum over nothing: finite, so that differences stay numbers

_LEFT0, _RIGHT0, _LEFT1, _RIGHT1 = range(4)  # the parts, in the order in which they are freed
SLACK = 8.0  # how far scores may exceed the maximum in use before sums are rescaled to a new one
TOLD = 2  # vectors that the computing warpgroups tell each other: how the maximum moved, and the maximum


def gather_parts(head_dim: int) -> tuple[rows.Part, ...]:
    """The tail (columns from 512 on) shares its memory with the probabilities, so it is freed with the part that the
    other warpgroup multiplies with them."""
    tail = tuple(range(8, head_dim // rows.CHUNK))
    left, right = tuple(range(4)), tuple(range(4, 8))
    return rows.Part(0, left), rows.Part(0, right + tail), rows.Part(1, left + tail), rows.Part(1, right)


def forward(q, kv, indices, steps, sinks, *, scale: float, num_blocks: int, interpret=None):
    """Sparse attention of queries R = B * T, each over the rows of its batch entry.

    Args:
      q: 16 bits (bf16 or fp16) [R, N, H], N a multiple of 64, H 512 or 576.
      kv: as q [B, S, H]; or uint8[B, S, 656], the fp8 cache of `sparse_attention_decode`, with q in bf16 and H 576.
      indices: int32[R, K], K a multiple of 128; outside [0, S) stands for nothing.
      steps: int32[R], how many blocks of 128 indices to look at; at least 1.
      sinks: float32[N], -inf for none.
      scale: of the logits.
      num_blocks: of the device, one a multiprocessor: each takes queries until none is left, and loads the next
        one's rows while it finishes one.
      interpret: None, or `mosaic.interpret_params()`.

    Returns:
      out, as q [R, N, 512], and the log-sum-exp float32[R, N].
    """
    num_rows, num_heads, head_dim = q.shape
    batch, num_keys, _ = kv.shape
    queries, head_blocks = num_rows // batch, num_heads // HEADS
    items = num_rows * head_blocks
    # Two blocks of a cluster take neighbouring heads of a query and convert half of its rows each: 363 instead of 445 us
    # for 128 sequences of 2 queries. (Sent 16 bytes a thread as they are converted: 447 us.)
    paired = kv.dtype == jnp.uint8 and head_blocks % 2 == 0
    cluster = 2 if paired else 1
    blocks = min(items, num_blocks // cluster * cluster)
    has_tail = head_dim > V_DIM
    parts = gather_parts(head_dim)
    registers = tilings.SPARSE_FORWARD_REGISTERS["fp8" if kv.dtype == jnp.uint8 else "16 bits"]
    layout = plgpu.Layout.WGMMA

    def spread(vector, like, dim):
        return lax.broadcast_in_dim(vector, like.shape, [dim])

    def vector(ref, reduced_dim, optimized=True):
        return ref[...] if interpret else plgpu.load(ref, layout=layout.reduce(reduced_dim), optimized=optimized)

    def filled(value):
        constant = jnp.full((HEADS,), value, jnp.float32)
        return constant if interpret else plgpu.layout_cast(constant, layout.reduce(1))

    def kernel(q_g, kv_g, indices_g, steps_g, sinks_g, out_g, lse_g, *scratch):
        (
            q_s,
            q_tail_s,
            tile_s,
            tail_s,
            bias_s,
            told_s,
            sums_s,
            barriers,
            q_ready,
            start,
            scored,
            p_ready,
            sums_ready,
            full,
            freed,
            *sums,
        ) = scratch
        wg = lax.axis_index("wg")
        first = lax.axis_index("cluster") * cluster + lax.axis_index("block")

        if not interpret:
            pl.when(wg == 0)(lambda: rows.init_barriers(barriers, parts, paired))
            plgpu.barrier_arrive(start)
            plgpu.barrier_wait(start)
        if paired:
            rows.meet()

        def where(item):
            # The head blocks of a query follow each other, and so share its rows in the cache.
            return lax.div(item, head_blocks), pl.ds(lax.rem(item, head_blocks) * HEADS, HEADS)

        def for_items(body, state=None):
            """state = body(item, its steps, steps before it, state) for each of this block's items."""

            def one(n, carry):
                done, num_steps, state = carry
                item = first + n * blocks
                # Read ahead: the next item's first step must not wait for memory.
                following = steps_g[lax.div(jnp.minimum(item + blocks, items - 1), head_blocks)]
                return done + num_steps, following, body(item, num_steps, done, state)

            count = lax.div(items - first + blocks - 1, blocks)
            lax.fori_loop(0, count, one, (jnp.int32(0), steps_g[lax.div(first, head_blocks)], state))

        def load_q(item):
            """Called by one warpgroup, when both are done with the queries there."""
            row, heads = where(item)
            plgpu.commit_smem()
            for half in (0, 1):
                plgpu.copy_gmem_to_smem(q_g.at[row, heads, pl.ds(half * HALF, HALF)], q_s.at[half], q_ready)
            if has_tail:
                plgpu.copy_gmem_to_smem(q_g.at[row, heads, pl.ds(V_DIM, rows.CHUNK)], q_tail_s.at[0], q_ready)

        def prefetch_q(item):
            row, heads = where(item)
            for start in range(0, head_dim, HALF):  # no TMA transfer is wider than 256
                plgpu.async_prefetch(q_g.at[row, heads, pl.ds(start, min(HALF, head_dim - start))])

        def wait_full(part, step):
            plgpu.barrier_wait(full.at[part]) if interpret else rows.wait_full(barriers, part, step)

        def free(part):
            plgpu.barrier_arrive(freed.at[part]) if interpret else rows.free(barriers, parts, part, paired)

        def scores(slot, step, products_before=None):
            """Of a slot's tile. Frees part `products_before` once the products issued earlier have read it."""

            def products(s):
                wait_full(2 * slot, step)
                zero = 0 if interpret else rows.opaque_zero()
                plgpu.wgmma(s, q_s.at[zero], tile_s.at[zero + slot, :, pl.ds(0, HALF)].T)
                if products_before is not None:
                    plgpu.wgmma_wait(1)
                    free(products_before)
                wait_full(2 * slot + 1, step)
                plgpu.wgmma(s, q_s.at[zero + 1], tile_s.at[zero + slot, :, pl.ds(HALF, HALF)].T)
                if has_tail:
                    plgpu.wgmma(s, q_tail_s.at[zero], tail_s.at[zero + slot].T)
                return s[...]

            s = pl.run_scoped(products, plgpu.ACC((HEADS, rows.ROWS), jnp.float32))
            return s * (scale * LOG2_E) + spread(vector(bias_s.at[slot], 0), s, 1)

        def soften(s, m):
            """Probabilities of a tile's scores in units of 2 ** maximum, how that unit changed, and the maximum."""
            top = s.max(axis=1)
            top = jnp.where(top > m + SLACK, top, m)
            return jnp.exp2(s - spread(top, s, 0)), jnp.exp2(m - top), top

        def tell(probabilities, slot, *vectors):
            """Hands a tile's probabilities, and vectors over heads, to the other warpgroup."""
            tail_s[slot] = probabilities
            for number, value in enumerate(vectors):
                told_s[TOLD * slot + number] = value
            plgpu.commit_smem() if interpret else rows.publish()
            plgpu.barrier_arrive(p_ready.at[slot])

        def listen(slot):
            plgpu.barrier_wait(p_ready.at[slot])
            return [vector(told_s.at[TOLD * slot + number], 1) for number in range(TOLD)]

        def tell_total(total, slot):
            sums_s[slot] = total
            plgpu.barrier_arrive(sums_ready.at[slot])

        def total_of(slot):
            plgpu.barrier_wait(sums_ready.at[slot])
            return vector(sums_s.at[slot], 1)

        def rescale(out, alpha):
            value = out[...]
            out[...] = value * spread(alpha, value, 0) if interpret else accumulators.scale_unless_one(value, alpha)

        def add_product(out, a, b):
            if interpret:
                out[...] += pl.run_scoped(lambda sum: (plgpu.wgmma(sum, a, b), sum[...])[1], plgpu.ACC(out.shape))
            else:
                plgpu.wgmma(out, a, b)

        def accumulate(attend, half):
            if not interpret:
                return pl.run_scoped(attend, plgpu.ACC((HEADS, HALF), jnp.float32))
            sums[half][...] = jnp.zeros((HEADS, HALF), jnp.float32)
            return attend(sums[half])

        def values(slot, half):
            return tile_s.at[slot, :, pl.ds(half * HALF, HALF)]

        def sinks_of(item):
            return vector(sinks_g.at[where(item)[1]], 1, optimized=False) * LOG2_E

        def store(item, out, m, total, sink, half):
            row, heads = where(item)
            top = jnp.maximum(m, sink)
            alpha = jnp.exp2(m - top)
            total = total * alpha + jnp.exp2(sink - top)
            out = out * spread(jnp.where(total > 0, alpha / total, 0.0), out, 0)
            lse = (top + jnp.log2(total)) / LOG2_E
            target = out_g.at[row, heads, pl.ds(half * HALF, HALF)]
            if interpret:
                target[...] = out.astype(out_g.dtype)
                if half == 0:
                    lse_g[row, heads] = lse
                return
            accumulators.store(out, target)
            if half == 0:
                accumulators.store_vector(lse, lse_g.at[row, heads])

        @pl.when(wg == 0)
        def left():
            plgpu.set_max_registers(registers[0], action="increase")
            plgpu.barrier_wait(q_ready)

            def attend(item, num_steps, done, s):
                sink = sinks_of(item)
                more = item + blocks < items

                def run(out):
                    def step(i, carry):
                        s, m, total = carry
                        last = i == num_steps - 1
                        p, alpha, top = soften(s, m)
                        p16 = p.astype(q.dtype)
                        tell(p16, 0, alpha, top)
                        rescale(out, alpha)
                        add_product(out, tail_s.at[0] if interpret else p16, values(0, 0))
                        total = total * alpha + p.sum(axis=1)
                        plgpu.wgmma_wait(0)
                        free(_LEFT0)
                        alpha, m = listen(1)
                        total = total * alpha
                        pl.when(last)(lambda: tell_total(total, 0))
                        rescale(out, alpha)
                        add_product(out, tail_s.at[1], values(1, 0))
                        pl.when(last & more)(lambda: plgpu.barrier_wait(q_ready))
                        # Behind the block's last step are no more tiles: what is there is scored again, for nothing.
                        s = scores(0, done + i + jnp.where(last & ~more, 0, 1), _LEFT1)
                        plgpu.barrier_arrive(scored)
                        return s, m, total

                    s_, m, total = lax.fori_loop(0, num_steps, step, (s, filled(_MINUS_INF), filled(0.0)))
                    return s_, out[...], m, total + total_of(1)

                s, *sums_of_item = accumulate(run, 0)
                store(item, *sums_of_item, sink, 0)
                return s

            s = scores(0, jnp.int32(0))
            plgpu.barrier_arrive(scored)
            for_items(attend, s)

        @pl.when(wg == 1)
        def right():
            plgpu.set_max_registers(registers[1], action="increase")
            load_q(first)

            def attend(item, num_steps, done, _):
                sink = sinks_of(item)
                more = item + blocks < items
                if not interpret:
                    pl.when(more)(lambda: prefetch_q(item + blocks))
                plgpu.barrier_wait(q_ready)

                def run(out):
                    def step(i, carry):
                        _, total = carry
                        last = i == num_steps - 1
                        # The left warpgroup's scores come first: while these are computed, it takes exponentials.
                        plgpu.barrier_wait(scored)
                        s = scores(1, done + i)
                        alpha0, m = listen(0)
                        # Both have scored the item's last tiles: its queries make room for the next item's.
                        pl.when(last & more)(lambda: load_q(item + blocks))
                        rescale(out, alpha0)
                        add_product(out, tail_s.at[0], values(0, 1))
                        p, alpha, top = soften(s, m)
                        p16 = p.astype(q.dtype)
                        tell(p16, 1, alpha, top)
                        total = total * (alpha0 * alpha) + p.sum(axis=1)
                        pl.when(last)(lambda: tell_total(total, 1))
                        plgpu.wgmma_wait(0)
                        free(_RIGHT0)
                        rescale(out, alpha)
                        add_product(out, tail_s.at[1] if interpret else p16, values(1, 1))
                        plgpu.wgmma_wait(0)
                        free(_RIGHT1)
                        return top, total

                    m, total = lax.fori_loop(0, num_steps, step, (filled(_MINUS_INF), filled(0.0)))
                    return out[...], m, total + total_of(0)

                store(item, *accumulate(run, 1), sink, 1)

            for_items(attend)

        @pl.when(wg == 2)
        def gather():
            plgpu.set_max_registers(registers[2], action="decrease")
            if not interpret:
                rows.gather(
                    kv_g,
                    indices_g,
                    steps_g,
                    tile_s,
                    tail_s,
                    bias_s,
                    barriers,
                    parts,
                    slots=2,
                    items=(first, blocks, items),
                    per_row=head_blocks,
                    paired=paired,
                )
                return

            def attend(item, num_steps, done, _):
                row, _ = where(item)
                gather_interpreted(kv_g.at[lax.div(row, queries)], indices_g.at[row], num_steps, done)

            def gather_interpreted(kv_rows, list_g, num_steps, done):
                def step(i, _):
                    for number, part in enumerate(parts):
                        pl.when(done + i > 0)(lambda number=number: plgpu.barrier_wait(freed.at[number]))

                        def one(r, _, part=part):
                            index = list_g[i * STEP + part.slot * rows.ROWS + r]
                            valid = (index >= 0) & (index < num_keys)
                            source = kv_rows[jnp.where(valid, index, 0)]
                            source = jnp.where(valid, source, jnp.zeros_like(source))
                            if part.first:
                                bias_s[part.slot, r] = jnp.where(valid, 0.0, -jnp.inf)
                            low = part.chunks[0] * rows.CHUNK
                            in_tile = [c for c in part.chunks if c < 8]
                            high = (in_tile[-1] + 1) * rows.CHUNK
                            tile_s[part.slot, r, pl.ds(low, high - low)] = source[low:high]
                            if part.chunks[-1] >= 8:
                                tail_s[part.slot, r] = source[V_DIM:]
                            return ()

                        lax.fori_loop(0, rows.ROWS, one, ())
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(full.at[number])
                    return ()

                lax.fori_loop(0, num_steps, step, ())

            for_items(attend)
            for number in (_LEFT0, _RIGHT0):  # Scored once more, see `left`.
                plgpu.barrier_wait(freed.at[number])
                plgpu.barrier_arrive(full.at[number])

        if paired:
            rows.meet()

    def tiles(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=mosaic.swizzled(q.dtype))

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((num_rows, num_heads, V_DIM), q.dtype),
            jax.ShapeDtypeStruct((num_rows, num_heads), jnp.float32),
        ),
        scratch_types=(
            tiles(2, HEADS, HALF),
            tiles(1, HEADS, rows.CHUNK) if has_tail else None,
            tiles(2, rows.ROWS, V_DIM),
            tiles(2, rows.ROWS, rows.CHUNK),
            plgpu.SMEM((2, rows.ROWS), jnp.float32),
            plgpu.SMEM((2 * TOLD, HEADS), jnp.float32),
            plgpu.SMEM((2, HEADS), jnp.float32),
            rows.barrier_scratch(parts),
            plgpu.Barrier(num_arrivals=3 if has_tail else 2),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=4),
            plgpu.Barrier(num_barriers=4),
            # An accumulator cannot be stored to in interpret mode: shared memory stands in for it.
            *([plgpu.SMEM((HEADS, HALF), jnp.float32)] * 2 if interpret else ()),
        ),
        grid=(blocks // cluster,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("block",),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=1024
        ),
    )(q, kv, indices, steps, sinks)
