"""Manifold-constrained hyper-connections (mHC, arXiv:2512.24880; DeepSeek-V4, section 2.2).

The residual is `hc_mult` parallel streams [B, T, M, D] (M here: streams). A sublayer reads one weighted sum of them;
its output is added to every stream with a weight, and the streams themselves are mixed by a doubly stochastic
matrix, so that depth neither amplifies nor loses the signal. All weights depend on the token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsparse.config import ModelConfig
from dsparse.params import Scope, normal, ones, zeros
from dsparse.reference import recomputed


class HyperConnection(nnx.Module):
    """Reads the input of one sublayer from the streams and writes its output back."""

    def __init__(self, scope: Scope, config: ModelConfig):
        m, width = config.hc_mult, config.hc_mult * config.hidden_size
        outputs = (2 + m) * m
        self.fn = scope.param(
            "fn", (outputs, width), (None, "embed"), normal(config.initializer_range), minimum=jnp.float32
        )
        self.base = scope.param("base", (outputs,), (None,), zeros, minimum=jnp.float32)
        self.scale = scope.param("scale", (3,), (None,), ones, minimum=jnp.float32)
        self.config = config

    def read(self, streams: Float[Array, "B T M D"]) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """The sublayer's input, and the weights that `write` needs."""
        c, m = self.config, self.config.hc_mult

        @recomputed
        def read(streams, fn, scale, base):
            raw = stream_weights(streams, fn, c.rms_norm_eps)
            pre, post, mix = (
                raw[..., start:stop] * scale[i] + base[start:stop]
                for i, (start, stop) in enumerate(((0, m), (m, 2 * m), (2 * m, None)))
            )
            pre, post = jax.nn.sigmoid(pre) + c.hc_eps, 2 * jax.nn.sigmoid(post)
            mix = sinkhorn(mix.reshape(*mix.shape[:-1], m, m), c.hc_sinkhorn_iters, c.hc_eps)
            return collapse(streams, pre), (post, mix)

        return read(streams, self.fn[...], *(p[...].astype(jnp.float32) for p in (self.scale, self.base)))

    def write(
        self, streams: Float[Array, "B T M D"], out: Float[Array, "B T D"], weights: tuple[Array, Array]
    ) -> Float[Array, "B T M D"]:
        """Stream j becomes post[j] * out + sum_i mix[i, j] * stream i."""
        post, mix = (w.astype(streams.dtype) for w in weights)
        m = self.config.hc_mult

        # Sums over so few streams are written out: as elementwise work they fuse, as batched 4x4 products they do not.
        @recomputed
        def write(streams, out, post, mix):
            parts = jnp.unstack(streams, axis=-2)
            mixed = [
                post[..., j, None] * out + sum(mix[..., i, j, None] * part for i, part in enumerate(parts))
                for j in range(m)
            ]
            return jnp.stack(mixed, axis=-2)

        return write(streams, out, post, mix)


class HyperHead(nnx.Module):
    """Collapses the streams into the hidden state that the final norm and the head read."""

    def __init__(self, scope: Scope, config: ModelConfig):
        m, width = config.hc_mult, config.hc_mult * config.hidden_size
        self.hc_fn = scope.param(
            "hc_fn", (m, width), (None, "embed"), normal(config.initializer_range), minimum=jnp.float32
        )
        self.hc_base = scope.param("hc_base", (m,), (None,), zeros, minimum=jnp.float32)
        self.hc_scale = scope.param("hc_scale", (1,), (None,), ones, minimum=jnp.float32)
        self.config = config

    def __call__(self, streams: Float[Array, "B T M D"]) -> Float[Array, "B T D"]:
        c = self.config
        raw = stream_weights(streams, self.hc_fn[...], c.rms_norm_eps)
        scale, base = self.hc_scale[...].astype(jnp.float32), self.hc_base[...].astype(jnp.float32)
        return collapse(streams, jax.nn.sigmoid(raw * scale + base) + c.hc_eps)


def stream_weights(streams: Float[Array, "B T M D"], fn: Float[Array, "F MD"], eps: float) -> Float[Array, "B T F"]:
    """fn times the RMS-normed streams, float32; the norm, one factor a token, is applied to the few products."""
    wide = streams.reshape(*streams.shape[:2], -1).astype(jnp.float32)
    norm = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return jnp.einsum("BTD,FD->BTF", wide, fn.astype(jnp.float32)) * norm


def collapse(streams: Float[Array, "B T M D"], weights: Float[Array, "B T M"]) -> Float[Array, "B T D"]:
    """Weighted sum of the streams, in their dtype."""
    parts = jnp.unstack(streams, axis=-2)  # whose gradient is one concatenation; a slice's is a padded array each
    return sum(weights[..., i, None] * part for i, part in enumerate(parts)).astype(streams.dtype)


def sinkhorn(logits: Float[Array, "*batch M M"], iterations: int, eps: float) -> Float[Array, "*batch M M"]:
    """Sinkhorn-Knopp: the softmax of the rows, scaled in turn until columns and rows sum to 1 (columns last).

    Only the scaling factors of rows and columns are iterated, each an elementwise expression over the batch (on a CPU
    12 times as fast as sums over axes of M). The backward pass computes them again.
    """
    m = logits.shape[-1]
    start = jax.nn.softmax(logits, axis=-1) + eps

    @jax.checkpoint
    def factors(start: Array) -> tuple[list[Array], list[Array]]:
        entry = [[start[..., i, j] for j in range(m)] for i in range(m)]

        def balance_columns(rows, cols):
            return [c / (c * sum(rows[i] * entry[i][j] for i in range(m)) + eps) for j, c in enumerate(cols)]

        def balance_rows(rows, cols):
            return [r / (r * sum(entry[i][j] * cols[j] for j in range(m)) + eps) for i, r in enumerate(rows)]

        rows = [jnp.ones_like(entry[0][0])] * m
        cols = balance_columns(rows, [jnp.ones_like(entry[0][0])] * m)

        def step(carry, _):
            rows, cols = carry
            rows = balance_rows(rows, cols)
            return (rows, balance_columns(rows, cols)), None

        (rows, cols), _ = jax.lax.scan(step, (rows, cols), length=iterations - 1)
        return rows, cols

    rows, cols = factors(start)
    return start * jnp.stack(rows, axis=-1)[..., :, None] * jnp.stack(cols, axis=-1)[..., None, :]
