"""Caches of past tokens for generation.

A cache entry's slot is its token's position, so rows of a batch may have different lengths: a query at position p
sees exactly the slots <= p, and slots written by padding are overwritten before they become visible.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Arrays = dict[str, Array]  # one block's cache: name -> [layers, B, slots, ...]


class CacheLayer(NamedTuple):
    """One layer's view of a stacked cache: the arrays of all its scanned siblings, and which layer this is.

    Writing straight into the stack lets XLA update in place; slicing a layer out and back would copy the cache once
    a token.
    """

    arrays: Arrays
    layer: int | Int[Array, ""]

    def read(self, name: str) -> Float[Array, "B slots ..."]:
        return jax.lax.dynamic_index_in_dim(self.arrays[name], self.layer, keepdims=False)

    def write(self, name: str, values: Float[Array, "B T ..."], slots: Int[Array, "B T"]) -> CacheLayer:
        """Store `values` in each row's `slots`; slots outside the cache (such as negative ones) are dropped."""
        stack = self.arrays[name]
        slots = jnp.where(slots < 0, stack.shape[2], slots)  # negative would wrap around
        rows = jnp.arange(stack.shape[1])[:, None]
        updated = stack.at[self.layer, rows, slots].set(values.astype(stack.dtype), mode="drop", unique_indices=True)
        return self._replace(arrays=self.arrays | {name: updated})
