"""The kernels' signatures, computed by the plain references: for testing on the CPU what stands between them and models."""

import dataclasses

import jax
import jax.numpy as jnp

from dsparse import gathered, reference
from dsparse.kernels import tilings
from dsparse.kernels.grouped_matmul_quantized import quantize_rows


def sparse_attention(q, kv, indices, *, v_head_dim, scale, sinks=None):
    return gathered.sparse_attention(q, kv, indices, sinks, v_head_dim, scale)


def topk(scores, k, lengths=None):
    """As the kernel: -inf is a score like any other."""
    lengths = jnp.full(len(scores), scores.shape[1]) if lengths is None else lengths
    finite = jnp.where(scores == -jnp.inf, -1e30, scores)
    return reference.topk(finite, k, lengths)


def indexer_topk(q, k, weights, lengths, topk_count, k_scale=None, starts=None):
    assert k_scale is None
    scores = reference.indexer_logits(q, k, weights)
    key = jnp.arange(k.shape[1])
    seen = key < lengths[..., None]
    if starts is not None:
        seen = seen & (key >= starts[..., None])
    scores = jnp.where(seen, scores, -jnp.inf).reshape(-1, k.shape[1])
    return reference.topk(scores, topk_count).reshape(*lengths.shape, topk_count)


def grouped_swiglu(x, weights, sizes, limit=None):
    gate, up = (reference.grouped_matmul(x, weights[:, half], sizes) for half in range(2))
    return reference.swiglu(gate, up, limit)


def grouped_matmul_fp8(x, x_scale, weights, w_scale, sizes):
    rows = x.astype(jnp.float32) * jnp.repeat(x_scale, 128, axis=-1)[:, : x.shape[1]]
    wide = reference.dequantize(weights, w_scale, jnp.float32)
    out = reference.grouped_matmul(rows, wide.reshape(len(wide), -1, wide.shape[-1]), sizes)
    return out.reshape(len(x), *weights.shape[1:-1]).astype(jnp.bfloat16)


def cudnn_attention(q, k, v, *, scale, causal, keep=None, lengths=None):
    query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    seen = (key <= query) if causal else jnp.ones((q.shape[1], k.shape[1]), bool)
    seen = seen[None] if keep is None else seen & keep
    if lengths is not None:
        seen = seen & (key < lengths[:, None, None])
    return reference.causal_attention(q, k, v, seen, scale)


STAND_INS = {
    ("sparse_attention", "sparse_attention"): sparse_attention,
    ("topk", "topk"): topk,
    ("indexer", "indexer_topk"): indexer_topk,
    ("grouped_matmul", "grouped_swiglu"): grouped_swiglu,
    ("grouped_matmul", "grouped_matmul"): reference.grouped_matmul,
    ("grouped_matmul_quantized", "quantize_rows"): quantize_rows,
    ("grouped_matmul_quantized", "grouped_matmul_fp8"): grouped_matmul_fp8,
    ("cudnn", "attention"): cudnn_attention,
}


def on_one_device(run):
    """Refuses what XLA has split over devices, as a kernel would be wrong there."""

    def checked(*args, **kwargs):
        from dsparse import sharding

        assert sharding.current_mesh() is None, "a kernel was called on arrays that are spread over a mesh"
        return run(*args, **kwargs)

    return checked


def kernel(module: str, name: str):
    """In the place of `dispatch.kernel`."""
    return on_one_device(STAND_INS[module, name])


def forward(q, kv, indices, steps, sinks, *, scale, num_blocks, interpret=None):
    """In the place of `sparse_attention_forward.forward`."""
    del steps, num_blocks, interpret
    batch = len(kv)
    split = (batch, -1, *q.shape[1:]), (batch, -1, indices.shape[1])
    out, lse = reference.sparse_attention(
        q.reshape(split[0]), kv, indices.reshape(split[1]), v_head_dim=512, scale=scale, sinks=sinks
    )
    return out.reshape(len(q), *out.shape[2:]).astype(q.dtype), lse.reshape(len(q), -1)


def backward(q, kv, indices, steps, dout, lse, delta, unit, *, scale, deterministic):
    """In the place of `sparse_attention_backward.backward`."""
    del steps, unit, deterministic
    batch = len(kv)
    q, indices, dout, lse, delta = (x.reshape(batch, -1, *x.shape[1:]) for x in (q, indices, dout, lse, delta))
    rows = jax.vmap(lambda table, index: table[index])(kv, jnp.maximum(indices, 0)).astype(jnp.float32)
    logits = jnp.einsum("btnh,btkh->btnk", q.astype(jnp.float32), rows) * scale
    p = jnp.where((indices >= 0)[:, :, None], jnp.exp(logits - lse[..., None]), 0)
    ds = p * (jnp.einsum("btnv,btkv->btnk", dout.astype(jnp.float32), rows[..., :512]) - delta[..., None]) * scale
    dq = jnp.einsum("btnk,btkh->btnh", ds, rows)
    drows = jnp.einsum("btnk,btnh->btkh", ds, q.astype(jnp.float32))
    drows = drows.at[..., :512].add(jnp.einsum("btnk,btnv->btkv", p, dout.astype(jnp.float32)))
    target = jnp.where(indices < 0, kv.shape[1], indices)
    zeros = jnp.zeros(kv.shape, jnp.float32)
    dkv = jax.vmap(lambda t, i, r: t.at[i].add(r, mode="drop"))(zeros, target, drows)
    return dq.astype(q.dtype).reshape(-1, *q.shape[2:]), dkv


def small_tilings() -> dict[str, tilings.RowTiling]:
    """In the place of `tilings.GROUPED`: tiles small enough to interpret, in heights that all kernels take."""
    widths = {"int8": (48, 96), "float8_e4m3fn": (32, 64)}
    small = {}
    for name, tiling in tilings.GROUPED.items():
        heights = widths.get(name, (32,))
        scales = ((0, heights[-1]),) if tiling.scale_boxes else ()
        sizes = {"widths": heights, "boxes": heights, "scale_boxes": scales}
        small[name] = dataclasses.replace(tiling, **sizes, stages=2)
    return small
