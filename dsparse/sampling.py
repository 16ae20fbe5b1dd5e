"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsparse.errors import DsparseError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample; the filters apply in this order, as in transformers. `greedy` and `filtered` are compiled in.

    temperature: divides the logits. top_k: keep the k most likely (0: all). top_p: keep the most likely tokens until
    their probability reaches p (1: all). min_p: drop tokens less likely than min_p times the most likely (0: none).
    """

    temperature: float | Array
    top_k: int | Array
    top_p: float | Array
    min_p: float | Array
    greedy: bool = dataclasses.field(metadata={"static": True})
    filtered: bool = dataclasses.field(metadata={"static": True})


def make_sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> Sampling:
    """Checked sampling parameters; temperature 0 is greedy.

    Raises:
        DsparseError: a parameter is out of its range.
    """
    top_k, top_p, min_p = top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0
    checks = {"temperature": temperature >= 0, "top_k": top_k >= 0, "top_p": 0 < top_p <= 1, "min_p": 0 <= min_p <= 1}
    if bad := [name for name, fine in checks.items() if not fine]:
        values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        raise DsparseError(
            f"{bad[0]} {values[bad[0]]!r} is out of range (temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1)"
        )
    filtered = top_k > 0 or top_p < 1 or min_p > 0
    return Sampling(temperature, top_k, top_p, min_p, greedy=temperature == 0, filtered=filtered)


def sample(logits: Float[Array, "B V"], sampling: Sampling, keys: Array) -> Int[Array, " B"]:
    """One token a row; `keys` holds a random key for each row, so a row's draw does not depend on its neighbours."""
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.filtered:
        logits = jnp.where(logits >= _threshold(logits, sampling), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _threshold(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B 1"]:
    """The smallest logit of each row that all filters keep; the most likely token is always kept."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    keep = (rank < sampling.top_k) | (sampling.top_k == 0)
    probability = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep &= (before < sampling.top_p) & (probability >= sampling.min_p * probability[:, :1])
    return jnp.min(jnp.where(keep | (rank == 0), ordered, jnp.inf), axis=-1, keepdims=True)
