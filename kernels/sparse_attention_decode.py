"""Sparse attention of a few queries over a cache, 16 bits or fp8, without gradients.

A paged cache is a pool of rows: pass it as one batch entry, [1, pages * page, H], with the sequences along T and
indices into the pool. The fp8 format is DeepSeek's: 656 bytes a token, of which 512 e4m3 values (the first columns), 4
float32 scales (each of 128 values) and 64 bf16 values (the rotary columns, unscaled).
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import BFloat16, Float, Int, UInt8

from . import rows
from .sparse_attention import attend, check, sink_logits, widened

E4M3_MAX = 448.0
BLOCK = 128  # values of a scale


def pack_cache(kv: Float[Array, "*lead 576"]) -> UInt8[Array, "*lead 656"]:
    """Rows in the fp8 cache format."""
    values = kv[..., :512].astype(jnp.float32).reshape(*kv.shape[:-1], 4, BLOCK)
    scales = jnp.maximum(jnp.max(jnp.abs(values), -1), 1e-12) / E4M3_MAX
    quantized = (values / scales[..., None]).astype(jnp.float8_e4m3fn).reshape(*kv.shape[:-1], 512)
    parts = (quantized, scales, kv[..., 512:].astype(jnp.bfloat16))
    as_bytes = [lax.bitcast_convert_type(part, jnp.uint8).reshape(*kv.shape[:-1], -1) for part in parts]
    return jnp.concatenate(as_bytes, axis=-1)


def unpack_cache(cache: UInt8[Array, "*lead 656"]) -> BFloat16[Array, "*lead 576"]:
    """The rows that a cache holds, as the kernel reads them."""
    lead = cache.shape[:-1]
    values = lax.bitcast_convert_type(cache[..., :512], jnp.float8_e4m3fn).astype(jnp.float32)
    scales = lax.bitcast_convert_type(cache[..., 512:528].reshape(*lead, 4, 4), jnp.float32)
    scaled = (values.reshape(*lead, 4, BLOCK) * scales[..., None]).reshape(*lead, 512).astype(jnp.bfloat16)
    tail = lax.bitcast_convert_type(cache[..., 528:].reshape(*lead, 64, 2), jnp.bfloat16)
    return jnp.concatenate([scaled, tail], axis=-1)


def sparse_attention_decode(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S H"] | UInt8[Array, "B S 656"],
    indices: Int[Array, "B T K"],
    *,
    v_head_dim: int,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """As `sparse_attention`, without gradients; `kv` may be an fp8 cache.

    Raises:
      NotImplementedError: for what this kernel does not do, before anything runs.
    """
    quantized = kv.dtype == jnp.uint8
    if quantized and (kv.shape[-1] != rows.FP8_ROW or q.shape[-1] != 576 or q.dtype != jnp.bfloat16):
        raise NotImplementedError(
            f"an fp8 cache has {rows.FP8_ROW} bytes a row for queries bfloat16[576], and got {kv.shape[-1]} bytes for "
            f"{q.dtype}[{q.shape[-1]}]"
        )
    stand_in = jax.ShapeDtypeStruct((*kv.shape[:2], q.shape[-1]), q.dtype) if quantized else kv
    check(q, stand_in, indices, v_head_dim, sinks)
    kv = kv if quantized else widened(kv)
    out, lse = attend(widened(q), kv, indices, sink_logits(sinks, q.shape[2]), float(scale))
    return out[..., :v_head_dim], lse
