"""Lightning-indexer logits on Hopper: logits[t, s] = sum over heads n of weights[t, n] * relu(q[t, n] . k[s]).

A block holds the heads of a few queries (256 in all) in shared memory as wgmma's right operand and streams keys past
them: each of two warpgroups multiplies 64 keys with all of them, then applies relu, weights and the sum over heads in
registers while the other one multiplies. Tiles that no query of the block may see are filled, not computed.

Logits of a long sequence do not fit in memory (17 GB at 64K), so `indexer_topk` goes through queries in chunks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dsparse.kernels import mosaic, tilings
from dsparse.kernels.topk import topk

SM_COUNT = 132
TILE_COLUMNS, TILE_KEYS, STAGES = tilings.INDEXER
WG_KEYS = TILE_KEYS // 2
FEWEST_HEADS = 16  # with fewer, the logits of the many queries of a block would not fit into shared memory
WIDEST = 128
LOGITS_BYTES = 1 << 30  # memory for the logits of one chunk of queries
GRADIENT_BYTES = 1 << 30  # memory for the scores of all heads of one chunk of queries in the backward


def _logits(q, k, weights, lengths, k_scale, *, interpret: bool) -> Float[Array, "B T S"]:
    """The kernel. T is at least 256 / N, S a multiple of 128; `lengths` int32[B, T] keys each query may see."""
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    per_block = TILE_COLUMNS // heads
    query_tiles, key_tiles = mosaic.cdiv(queries, per_block), keys // TILE_KEYS
    splits = max(1, min(key_tiles // 8, mosaic.cdiv(4 * SM_COUNT, batch * query_tiles)))
    split_tiles = mosaic.cdiv(key_tiles, splits)
    scaled = k_scale is not None
    row_layout, column_layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def kernel(q_g, k_g, w_g, lengths_g, *refs):
        scale_g = refs[0] if scaled else None
        o_g, q_s, w_s, k_s, scale_s, o_s, ready, full, empty = refs[scaled:]
        b, split, wg = lax.axis_index("b"), lax.axis_index("split"), lax.axis_index("wg")
        # Later queries see more keys: they go first.
        query = jnp.minimum((query_tiles - 1 - lax.axis_index("t")) * per_block, queries - per_block)
        limits = [lengths_g[b, query + i] for i in range(per_block)]
        most = functools.reduce(jnp.maximum, limits)
        first = split * split_tiles
        past = jnp.minimum(first + split_tiles, key_tiles)
        seen = jnp.clip(lax.div(most + TILE_KEYS - 1, TILE_KEYS), first, past)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def fetch(tile, _):
                step = tile - first
                slot = lax.rem(step, STAGES)

                @pl.when(step >= STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                key = pl.ds(tile * TILE_KEYS, TILE_KEYS)
                plgpu.copy_gmem_to_smem(k_g.at[b, key], k_s.at[slot], full.at[slot])
                if scaled:
                    plgpu.copy_gmem_to_smem(scale_g.at[b, key], scale_s.at[slot], full.at[slot])
                return ()

            @pl.when(seen > first)
            def _():
                heads_slice = pl.ds(pl.multiple_of(query * heads, 8), TILE_COLUMNS)
                plgpu.copy_gmem_to_smem(q_g.at[b, heads_slice], q_s, ready)
                plgpu.copy_gmem_to_smem(w_g.at[b, heads_slice], w_s, ready)

            lax.fori_loop(first, seen, fetch, ())

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")

            def write(tile, turn, values):
                """values[i]: the logits of query i for this warpgroup's keys of the tile."""
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                for i, value in enumerate(values):
                    o_s[wg, turn, i] = value
                plgpu.commit_smem()
                key = pl.ds(tile * TILE_KEYS + wg * WG_KEYS, WG_KEYS)
                plgpu.copy_smem_to_gmem(o_s.at[wg, turn], o_g.at[b, pl.ds(query, per_block), key])

            def compute(tile, _):
                step = tile - first
                slot = lax.rem(step, STAGES)
                plgpu.barrier_wait(full.at[slot])

                def product(acc):
                    plgpu.wgmma(acc, k_s.at[slot, pl.ds(wg * WG_KEYS, WG_KEYS)], q_s.transpose((1, 0)))
                    return acc[...]

                scores = pl.run_scoped(product, plgpu.ACC((WG_KEYS, TILE_COLUMNS), jnp.float32))
                if scaled:
                    scale = plgpu.load(scale_s.at[slot, pl.ds(wg * WG_KEYS, WG_KEYS)], layout=row_layout)
                plgpu.barrier_arrive(empty.at[slot])
                key = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (WG_KEYS,), 0), row_layout)
                key += tile * TILE_KEYS + wg * WG_KEYS
                values = []
                for i, limit in enumerate(limits):
                    part = jnp.maximum(scores[:, i * heads : (i + 1) * heads], 0)
                    head_weights = plgpu.load(w_s.at[pl.ds(i * heads, heads)], layout=column_layout)
                    value = (part * lax.broadcast_in_dim(head_weights, part.shape, [1])).sum(axis=1)
                    value = value * scale if scaled else value
                    values.append(jnp.where(key < limit, value, -jnp.inf))
                write(tile, lax.rem(step, 2), values)
                return ()

            @pl.when(seen > first)
            def _():
                plgpu.barrier_wait(ready)

            lax.fori_loop(first, seen, compute, ())
            hidden = plgpu.layout_cast(jnp.full((WG_KEYS,), -jnp.inf, jnp.float32), row_layout)

            def fill(tile, _):
                write(tile, lax.rem(tile - first, 2), [hidden] * per_block)
                return ()

            lax.fori_loop(seen, past, fill, ())
            plgpu.wait_smem_to_gmem(0)

    layout = mosaic.swizzled(q.dtype)
    stage_scale = plgpu.SMEM((STAGES, TILE_KEYS), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, queries, keys), jnp.float32),
        scratch_types=[
            plgpu.SMEM((TILE_COLUMNS, width), q.dtype, transforms=layout),
            plgpu.SMEM((TILE_COLUMNS,), jnp.float32),
            plgpu.SMEM((STAGES, TILE_KEYS, width), q.dtype, transforms=layout),
            stage_scale,
            plgpu.SMEM((2, 2, per_block, WG_KEYS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2 if scaled else 1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(batch, splits, query_tiles),
        grid_names=("b", "split", "t"),
        num_threads=3,
        thread_name="wg",
        interpret=mosaic.interpret_params() if interpret else None,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(
        q.reshape(batch, queries * heads, width),
        k,
        weights.reshape(batch, queries * heads),
        lengths,
        *([k_scale] if scaled else []),
    )


def _check(q, k, weights, lengths, k_scale) -> None:
    batch, queries, heads, width = q.shape
    if q.dtype != k.dtype or q.dtype not in (*mosaic.SIXTEEN_BITS, jnp.float8_e4m3fn):
        raise NotImplementedError(
            f"indexer kernel takes bfloat16, float16 or float8_e4m3fn q and k, not {q.dtype} and {k.dtype}"
        )
    if heads > TILE_COLUMNS or width > WIDEST:
        raise NotImplementedError(
            f"indexer kernel takes up to {TILE_COLUMNS} heads of up to {WIDEST}, not {heads} of {width}"
        )
    if 0 in (batch, queries, k.shape[1]):
        raise NotImplementedError("indexer kernel needs at least one query and one key")
    if (
        k.shape != (batch, k.shape[1], width)
        or weights.shape != (batch, queries, heads)
        or lengths.shape != (batch, queries)
        or (k_scale is not None and k_scale.shape != k.shape[:2])
    ):
        raise ValueError(
            f"shapes do not fit: q {q.shape}, k {k.shape}, weights {weights.shape}, lengths {lengths.shape}, "
            f"k_scale {None if k_scale is None else k_scale.shape}"
        )


def _supported(q, k, weights):
    """With heads of weight 0 and columns of zeros up to what the kernel is compiled for: they change no logit.

    That is 16, 32, 64, 128 or 256 heads, and rows of 128 bytes, or of 256 in 16 bits.
    """
    heads, width = q.shape[2:]
    swizzled = mosaic.SWIZZLE_BYTES // q.dtype.itemsize
    missing = max(FEWEST_HEADS, 1 << (heads - 1).bit_length()) - heads
    columns = -width % swizzled
    if missing:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0)))
        weights = jnp.pad(weights, ((0, 0), (0, 0), (0, missing)))
    if columns:
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, columns),))
        k = jnp.pad(k, ((0, 0), (0, 0), (0, columns)))
    return q, k, weights


def _padded_logits(q, k, weights, lengths, k_scale, interpret: bool) -> Float[Array, "B T P"]:
    """Logits over keys padded to whole tiles (P >= S); those of padding are -inf."""
    mosaic.require_hopper()
    _check(q, k, weights, lengths, k_scale)
    q, k, weights = _supported(q, k, weights)
    queries, keys = q.shape[1], k.shape[1]
    lengths = jnp.minimum(lengths, keys).astype(jnp.int32)
    if keys % TILE_KEYS:
        k = jnp.pad(k, ((0, 0), (0, -keys % TILE_KEYS), (0, 0)))
        k_scale = None if k_scale is None else jnp.pad(k_scale, ((0, 0), (0, -keys % TILE_KEYS)))
    missing = max(0, TILE_COLUMNS // q.shape[2] - queries)
    if missing:
        q, weights = (jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in (q, weights))
        lengths = jnp.pad(lengths, ((0, 0), (0, missing)))
    logits = _logits(q, k, weights.astype(jnp.float32), lengths, k_scale, interpret=interpret)
    return logits[:, :queries] if missing else logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def indexer_logits(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S H"],
    weights: Float[Array, "B T N"],
    lengths: Int[Array, "B T"],
    k_scale: Float[Array, "B S"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T S"]:
    """float32 logits[t, s] = k_scale[s] * sum_n weights[t, n] * relu(q[t, n] . k[s]); -inf for s >= lengths[t].

    `lengths[b, t]` keys are visible to a query (causal: its position + 1). q and k are both bfloat16, float16 or
    float8_e4m3fn (`k_scale` then holds a key's scale; a query's scale and the softmax scale go into `weights`).
    Differentiable in q, k and weights for 16 bits without `k_scale`. Raises NotImplementedError where unsupported.
    """
    return _padded_logits(q, k, weights, lengths, k_scale, interpret)[..., : k.shape[1]]


def _logits_fwd(q, k, weights, lengths, k_scale, interpret):
    if q.dtype not in mosaic.SIXTEEN_BITS or k_scale is not None:
        raise NotImplementedError("indexer kernel has a gradient for bfloat16 and float16 without k_scale only")
    return indexer_logits(q, k, weights, lengths, k_scale, interpret), (q, k, weights, lengths)


def _logits_bwd(interpret, residuals, d_logits):
    """Goes through queries in chunks, so that the scores of all heads stay within GRADIENT_BYTES."""
    del interpret
    q, k, weights, lengths = residuals
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    rows = max(1, min(queries, GRADIENT_BYTES // (batch * heads * keys * 4)))
    key = jnp.arange(keys)

    def chunk(d_k, part):
        q, weights, lengths, d_logits = part
        d_logits = jnp.where(key < lengths[..., None], d_logits, 0)
        scores = jnp.einsum("btnh,bsh->btns", q, k, preferred_element_type=jnp.float32)
        d_weights = jnp.einsum("btns,bts->btn", jax.nn.relu(scores), d_logits)
        d_scores = jnp.where(scores > 0, d_logits[:, :, None] * weights[..., None], 0).astype(q.dtype)
        d_q = jnp.einsum("btns,bsh->btnh", d_scores, k, preferred_element_type=jnp.float32).astype(q.dtype)
        d_k += jnp.einsum("btns,btnh->bsh", d_scores, q, preferred_element_type=jnp.float32)
        return d_k, (d_q, d_weights)

    parts = [_chunks(x, rows) for x in (q, weights.astype(jnp.float32), lengths, d_logits)]
    d_k, (d_q, d_weights) = lax.scan(chunk, jnp.zeros(k.shape, jnp.float32), parts)
    d_q, d_weights = (_joined(x, queries) for x in (d_q, d_weights))
    return d_q, d_k.astype(k.dtype), d_weights.astype(weights.dtype), np.zeros(lengths.shape, jax.dtypes.float0), None


indexer_logits.defvjp(_logits_fwd, _logits_bwd)


def _chunks(x: jax.Array, rows: int) -> jax.Array:
    """[B, T, ...] -> [T / rows, B, rows, ...], T padded with zeros."""
    padding = -x.shape[1] % rows
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)


def _joined(chunks: jax.Array, queries: int) -> jax.Array:
    x = jnp.moveaxis(chunks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]


def indexer_topk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S H"],
    weights: Float[Array, "B T N"],
    lengths: Int[Array, "B T"],
    topk_count: int,
    k_scale: Float[Array, "B S"] | None = None,
    starts: Int[Array, "B T"] | None = None,
    *,
    logits_bytes: int = LOGITS_BYTES,
) -> Int[Array, "B T K"]:
    """Positions of each query's `topk_count` largest logits among its first `lengths` keys; -1 where there are fewer.

    starts: each query sees the keys from there on only. Rising, ties broken by the lowest position. Queries go through in chunks whose logits take at most `logits_bytes`
    (but at least one query). Not differentiable. Limits as in `indexer_logits` and `topk`.
    """
    batch, queries = lengths.shape
    keys = mosaic.round_up(k.shape[1], TILE_KEYS)
    rows = max(1, min(queries, logits_bytes // (batch * keys * 4)))
    if rows > 8:
        rows = rows // 8 * 8 if rows < queries else rows

    def chunk(part):
        q, weights, lengths, starts = part
        logits = _padded_logits(q, k, weights, lengths, k_scale, False)
        if starts is not None:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < starts[..., None], -jnp.inf, logits)
        indices = topk(logits.reshape(-1, logits.shape[-1]), min(topk_count, keys), lengths.reshape(-1))
        indices = indices.reshape(*lengths.shape, -1)
        return indices if starts is None else jnp.where(indices < starts[..., None], -1, indices)

    q, k, weights = map(lax.stop_gradient, (q, k, weights))
    parts = (q, weights, lengths, starts)
    if rows >= queries:
        indices = chunk(parts)
    else:
        indices = _joined(lax.map(chunk, jax.tree.map(lambda x: _chunks(x, rows), parts)), queries)
    missing = topk_count - indices.shape[-1]
    return jnp.pad(indices, ((0, 0), (0, 0), (0, missing)), constant_values=-1) if missing else indices
