"""Dense attention by cuDNN's fused kernels, through jax.

`jax.nn.dot_product_attention` wants values as wide as keys, which MLA's are not (128 and 192). The function beneath it
takes them, and is not public: what depends on it stands here.
"""

import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jaxtyping import Bool, Float, Int

WIDEST = 256
UNEQUAL_WIDTHS = ((192, 128),)  # of keys and values; other values are filled up to the keys' width
MASK_BYTES = 1 << 30  # a mask becomes a 16-bit bias [B, 1, T, S]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    *,
    scale: float,
    causal: bool,
    keep: Bool[Array, "B T S"] | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N V"]:
    """Softmax attention; differentiable.

    causal: query t sees keys 0..t. keep: a mask besides. lengths: keys a row has; those after them are not read.

    Raises:
      NotImplementedError: for what it does not do, before anything runs.
    """
    _check(q, k, v, causal, keep, lengths)
    queries, width, value_width = q.shape[1], k.shape[-1], v.shape[-1]
    if queries % 2 or k.shape[1] % 2:  # the backward pass takes even lengths only; no query sees the added key
        q, k, v = (_even(x) for x in (q, k, v))
        keep = None if keep is None else jnp.pad(keep, ((0, 0), (0, queries % 2), (0, keep.shape[2] % 2)))
    if value_width < width and (width, value_width) not in UNEQUAL_WIDTHS:
        v = jnp.pad(v, ((0, 0),) * 3 + ((0, width - value_width),))
    mask_type = cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK
    seqlens = {}
    if lengths is not None:
        mask_type = cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING
        seqlens = {"q_seqlen": jnp.full(q.shape[0], q.shape[1], jnp.int32), "kv_seqlen": lengths.astype(jnp.int32)}
    mask = None if keep is None else keep[:, None]
    out = cudnn.dot_product_attention(q, k, v, mask=mask, scale=float(scale), mask_type=mask_type, **seqlens)
    return out[:, :queries, :, :value_width]


def _even(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def _check(q, k, v, causal, keep, lengths) -> None:
    try:
        cudnn.check_cudnn_version()
    except RuntimeError as error:
        raise NotImplementedError(str(error)) from error
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cuDNN's attention takes bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[-1] > WIDEST or q.shape[-1] % 8 or v.shape[-1] > q.shape[-1]:
        raise NotImplementedError(
            f"cuDNN's attention takes keys of multiples of 8 up to {WIDEST} and values as wide at most, not "
            f"{q.shape[-1]} and {v.shape[-1]}"
        )
    if not causal and keep is None and lengths is None and k.shape[1] % 2:
        raise NotImplementedError(f"cuDNN's attention takes an even number of keys, not {k.shape[1]}")
    if keep is not None and 2 * keep.size > MASK_BYTES:
        raise NotImplementedError(f"a mask of {keep.shape} would take {2 * keep.size >> 20} MiB")
