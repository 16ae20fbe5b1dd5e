"""What every layer of one forward pass may look at besides the hidden state."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

AnyArray = Array | np.ndarray  # what users hand in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Inputs shared by all layers.

    tokens: ids, for routers that hash them.
    positions: of each token in its own sequence, from 0; what rotary embedding sees.
    slots: where a cached pass stores each token: its position, or -1 for padding, which is not stored.
    segment_ids: tokens attend only within their segment (packing, left padding); None: one segment a row.
    rope: cos and sin of the positions.
    compress_rope: the same for layers that compress, where the config gives them a rotary embedding of their own.
    empty_cache: the cache holds nothing yet, so tokens attend among themselves only.
    selected: what the last layer of each mixer that selects for itself selected, for layers of that mixer that share it.
    report_selected: keep every layer's selection, for inspection.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    slots: Int[Array, "B T"] | None
    segment_ids: Int[Array, "B T"] | None
    rope: Float[Array, "2 B T half"]
    compress_rope: Float[Array, "2 B T half"] | None = None
    empty_cache: bool = dataclasses.field(default=False, metadata={"static": True})
    selected: dict[str, Int[Array, "B T K"]] = dataclasses.field(default_factory=dict)
    report_selected: bool = dataclasses.field(default=False, metadata={"static": True})


def segment_starts(segment_ids: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
    """The column at which each token's segment starts; a segment's tokens stand together."""
    column = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    changed = jnp.concatenate(
        [jnp.zeros_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return jax.lax.cummax(jnp.where(changed, column, 0), axis=1)
