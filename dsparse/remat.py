"""What the backward pass finds kept of a layer, and what it computes again."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"  # kernels/ import nothing of dsparse and spell it out

# - none: everything is kept.
# - selective: what `keep` marks. Norms, rotary embeddings, activations and the up-projections of latents are computed
#   again (DeepSeek-V3, section 3.2.3): they cost less than the memory they fill.
# - full: nothing but the layer's input.
POLICIES = {
    "none": None,
    "selective": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def keep[T](values: T) -> T:
    """Mark arrays that are dear to compute: all policies but "full" keep them for the backward pass."""
    return checkpoint_name(values, KEPT)
