"""Fills the device memory that results will be written to with NaN, so that what a kernel leaves unwritten shows."""

import jax
import jax.numpy as jnp

CHUNK_BYTES = 1 << 26


def poison_free_memory() -> None:
    """Leaves NaN in the memory that is free now, as much of it as the allocator hands out in whole chunks."""
    stats = jax.devices()[0].memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    chunks = []
    try:
        for _ in range(max(free // CHUNK_BYTES, 1)):
            chunks.append(jax.block_until_ready(jnp.full(CHUNK_BYTES // 4, jnp.nan, jnp.float32)))
    except jax.errors.JaxRuntimeError as error:
        if not chunks or "RESOURCE_EXHAUSTED" not in str(error):
            raise
    for chunk in chunks:
        chunk.delete()
