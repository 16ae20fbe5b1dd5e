"""The small parts every family shares: linear maps, norms, SwiGLU, rotary embedding.

Weights keep Hugging Face's [out, in] layout: no transposes on the way in or out, and the contraction runs along the
contiguous axis, as the 8-bit tensor cores need it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsparse import ops, reference
from dsparse.config import ModelConfig, RopeParameters
from dsparse.params import Scope, normal, ones, zeros
from dsparse.remat import keep
from dsparse.sharding import current_mesh


class Linear(nnx.Module):
    """y = x W^T (+ b), with W [out, in]; an 8-bit W is scaled inside the product."""

    def __init__(
        self,
        scope: Scope,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None],
        init,
        bias: bool = False,
        minimum=None,
    ):
        """minimum: precision below which the weight is not kept when the model's dtype decides."""
        self.weight = scope.param("weight", (d_out, d_in), axes, init, minimum=minimum)
        self.weight_scale_inv = scope.scale_inv("weight", (d_out, d_in), axes)
        self.bias = scope.param("bias", (d_out,), axes[:1], zeros) if bias else None
        self.expands = axes[1] == "latent"  # its output is many times what it is made of

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        y = ops.linear(x, self.weight[...], None if self.weight_scale_inv is None else self.weight_scale_inv[...])
        y = y if self.expands else keep(y)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def dense_weight(self, dtype) -> Float[Array, "d_out d_in"]:
        """W in floating point, for algebra on the weight itself (MLA's absorbed path)."""
        return reference.dequantize(
            self.weight[...], None if self.weight_scale_inv is None else self.weight_scale_inv[...], dtype
        )


class GroupedLinear(nnx.Module):
    """Each of `groups` equal parts of the input through its own matrix: [.., N H] -> [.., groups * d_out]."""

    def __init__(self, scope: Scope, d_in: int, groups: int, d_out: int, axes: tuple[str | None, str | None], init):
        self.weight = scope.param("weight", (groups * d_out, d_in // groups), axes, init)
        self.weight_scale_inv = scope.scale_inv("weight", (groups * d_out, d_in // groups), axes)
        self.groups = groups

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T F"]:
        weight = reference.dequantize(
            self.weight[...], None if self.weight_scale_inv is None else self.weight_scale_inv[...], x.dtype
        )
        x = x.reshape(*x.shape[:2], self.groups, -1)
        y = jnp.einsum("BTGD,GFD->BTGF", x, weight.reshape(self.groups, -1, weight.shape[-1]))
        return keep(y).reshape(*y.shape[:2], -1)


def rms_normalize(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """x over its root mean square, computed in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, scope: Scope, dim: int, eps: float):
        self.weight = scope.param("weight", (dim,), (None,), ones)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        wide = rms_normalize(x.astype(jnp.float32), self.eps) * self.weight[...].astype(jnp.float32)
        return wide.astype(x.dtype)  # rounded once


class LayerNorm(nnx.Module):
    """Layer norm with a bias, computed in float32 (Ba et al. 2016)."""

    def __init__(self, scope: Scope, dim: int, eps: float = 1e-6):
        self.weight = scope.param("weight", (dim,), (None,), ones)
        self.bias = scope.param("bias", (dim,), (None,), zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x), clamped where the config says so. Gate and up are one parameter [2, F, D]."""

    def __init__(self, scope: Scope, config: ModelConfig, intermediate_size: int):
        d, f, init = config.hidden_size, intermediate_size, normal(config.initializer_range)
        gate_up, down = ((2, f, d), (None, "mlp", "embed")), ((d, f), ("embed", "mlp"))
        self.gate_up_proj = scope.param("gate_up_proj", *gate_up, init)
        self.gate_up_proj_scale_inv = scope.scale_inv("gate_up_proj", *gate_up)
        self.down_proj = Linear(scope["down_proj"], f, d, down[1], init, bias=config.mlp_bias)
        self.gate_up_bias = scope.param("gate_up_bias", (2, f), (None, "mlp"), zeros) if config.mlp_bias else None
        self.limit = config.swiglu_limit

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        gate, up = keep(self._gate_up(x))
        if self.gate_up_bias is not None:
            bias = self.gate_up_bias[...].astype(x.dtype)
            gate, up = gate + bias[0], up + bias[1]
        return self.down_proj(reference.swiglu(gate, up, self.limit))

    def _gate_up(self, x: Float[Array, "*batch D"]) -> tuple[Float[Array, "*batch F"], Float[Array, "*batch F"]]:
        weight, scale = self.gate_up_proj[...], self.gate_up_proj_scale_inv
        if scale is None and current_mesh() is None:
            return tuple(jnp.split(ops.linear(x, weight.reshape(-1, weight.shape[-1])), 2, axis=-1))
        # merging [2, F] would break the sharding of F, and 128-row scale blocks need not end where gate does
        scales = (None, None) if scale is None else scale[...]
        return tuple(ops.linear(x, half, s) for half, s in zip(weight, scales, strict=True))


def rope_frequencies(rope: RopeParameters, dim: int) -> tuple[Float[Array, " half"], float]:
    """Inverse frequencies [dim/2] in radians a position, and the factor on cos and sin.

    YaRN (arXiv:2309.00071, section 3.2) interpolates the slow frequencies and keeps the fast ones.
    """
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    fast = 1.0 / rope.rope_theta**exponent
    if rope.rope_type == "default":
        return fast, 1.0
    slow = fast / rope.factor
    if rope.rope_type == "linear":
        return slow, 1.0
    return _yarn_blend(rope, dim, fast, slow), _yarn_attention_factor(rope)


def _yarn_blend(rope: RopeParameters, dim: int, fast: Array, slow: Array) -> Array:
    def dimension_of(rotations: float) -> float:
        length = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
    return slow * ramp + fast * (1.0 - ramp)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_factor(rope: RopeParameters) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


def softmax_scale(rope: RopeParameters, head_dim: int) -> float:
    """1/sqrt(head_dim), times mscale_all_dim^2 where YaRN states it (DeepSeek-V2, section 3.1.4)."""
    if rope.rope_type != "default" and rope.mscale_all_dim:
        return head_dim**-0.5 * yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return head_dim**-0.5


def rope_cos_sin(rope: RopeParameters, dim: int, positions: Int[Array, "B T"]) -> Float[Array, "2 B T half"]:
    """cos and sin of every position's angles, float32, stacked."""
    frequencies, factor = rope_frequencies(rope, dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * factor


def apply_rope(
    x: Float[Array, "B T *heads dim"], cos_sin: Float[Array, "2 B T half"], interleave: bool
) -> Float[Array, "B T *heads dim"]:
    """Rotate pairs of `x`: neighbours (2i, 2i+1) if `interleave`, else (i, i + dim/2)."""
    cos, sin = cos_sin.reshape(*cos_sin.shape[:3], *(1,) * (x.ndim - 3), cos_sin.shape[-1])
    wide = x.astype(jnp.float32)
    if interleave:
        pairs = wide.reshape(*x.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(wide, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x.dtype)


def apply_rope_to_tail(
    x: Float[Array, "B T *heads dim"], cos_sin: Float[Array, "2 B T half"]
) -> Float[Array, "B T *heads dim"]:
    """Rotate the trailing 2 * half channels in neighbouring pairs; the channels before them pass."""
    size = 2 * cos_sin.shape[-1]
    return jnp.concatenate([x[..., :-size], apply_rope(x[..., -size:], cos_sin, interleave=True)], axis=-1)
