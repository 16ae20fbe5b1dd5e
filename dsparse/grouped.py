"""Grouped matmul for XLA: rows padded to blocks that belong to one group each, then one batched product.

`jax.lax.ragged_dot` costs about one dense product per group on CPU and expands densely on GPUs without a kernel.
Here the work is that of the rows plus at most one block of padding a group.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

GATHERED_BYTES = 64 << 20  # weights copied for one batched product; more are taken in turns


@jax.custom_vjp
def permute(x: Float[Array, "M D"], source: Int[Array, " P"], destination: Int[Array, " M"]) -> Float[Array, "P D"]:
    """out[p] = x[source[p]] (0 where source is -1). `destination[m]` is the p that takes row m (-1: none).

    Knowing both directions, the gradient is a gather too; XLA's scatter would be far slower.
    """
    return _take(x, source)


def _take(x, source):
    return jnp.where((source >= 0)[:, None], x[jnp.maximum(source, 0)], 0)


def _permute_fwd(x, source, destination):
    return _take(x, source), (source, destination)


def _permute_bwd(residuals, g):
    source, destination = residuals
    no_gradient = (np.zeros(a.shape, jax.dtypes.float0) for a in (source, destination))
    return _take(g, destination), *no_gradient


permute.defvjp(_permute_fwd, _permute_bwd)


class Blocks(NamedTuple):
    """Rows laid out in blocks of one group each."""

    group: Int[Array, " blocks"]
    source: Int[Array, " padded"]  # row of each padded slot, -1: padding
    slot: Int[Array, " M"]  # padded slot of each row, -1: past the last group


def block_size(rows: int, groups: int) -> int:
    """Rows a block: half the mean group, within what keeps a CPU's and a GPU's units busy."""
    return int(min(128, max(1, 1 << max(0, (rows // (2 * groups)).bit_length() - 1))))


def layout(rows: int, group_sizes: Int[Array, " E"], size: int) -> Blocks:
    groups = group_sizes.shape[0]
    blocks = min(rows, rows // size + min(groups, rows))
    ends = jnp.cumsum(group_sizes)
    block_ends = jnp.cumsum(-(-group_sizes // size))
    row = jnp.arange(rows)
    group_of_row = jnp.searchsorted(ends, row, side="right", method="compare_all")
    clipped = jnp.minimum(group_of_row, groups - 1)
    first_slot = (block_ends - -(-group_sizes // size)) * size
    slot = first_slot[clipped] + row - (ends - group_sizes)[clipped]
    slot = jnp.where(group_of_row < groups, slot, -1)
    group = jnp.searchsorted(block_ends, jnp.arange(blocks), side="right", method="compare_all")
    group = jnp.minimum(group, groups - 1)
    slots = jnp.arange(blocks * size)
    slot_group = jnp.repeat(group, size)
    within = slots - first_slot[slot_group]
    source = jnp.where(within < group_sizes[slot_group], (ends - group_sizes)[slot_group] + within, -1)
    return Blocks(group, source, slot)


def blocked(x: Float[Array, "M D"], blocks: Blocks, fn, *weights: Float[Array, "E ..."]) -> Float[Array, "M F"]:
    """Apply `fn(rows [b, m, D], *weights[group of block])` to every block and return rows to their places."""
    count = blocks.group.shape[0]
    padded = permute(x, blocks.source, blocks.slot).reshape(count, -1, x.shape[-1])
    bytes_a_block = sum(w[0].size * w.dtype.itemsize for w in weights)
    turns = min(count, max(1, -(-count * bytes_a_block // GATHERED_BYTES)))

    def some(rows, group):
        return fn(rows, *(w[group] for w in weights))

    if turns == 1:
        out = some(padded, blocks.group)
    else:
        out = jax.lax.map(lambda args: some(args[0][None], args[1][None])[0], (padded, blocks.group), batch_size=count // turns)
    return permute(out.reshape(-1, out.shape[-1]), blocks.slot, blocks.source)


def grouped_matmul(x: Float[Array, "M D"], weights: Float[Array, "E F D"], group_sizes: Int[Array, " E"]) -> Float[Array, "M F"]:
    blocks = layout(x.shape[0], group_sizes, block_size(x.shape[0], weights.shape[0]))
    return blocked(x, blocks, lambda rows, w: jnp.einsum("bmd,bfd->bmf", rows, w.astype(rows.dtype)), weights)


def grouped_mlp(
    x: Float[Array, "M D"],
    gate_up: Float[Array, "E 2 F D"],
    down: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    gate_up_scale_inv: Float[Array, "E 2 Fb Db"] | None = None,
    down_scale_inv: Float[Array, "E Db Fb"] | None = None,
) -> Float[Array, "M D"]:
    """silu(x gate^T) * (x up^T), times down^T, each row with its group's matrices."""
    from dsparse.ops import dequantize

    def mlp(rows, gate_up, down, *scales):
        scale_up, scale_down = scales or (None, None)
        gate_up = dequantize(gate_up, scale_up, rows.dtype)
        gate_up = gate_up.reshape(gate_up.shape[0], -1, gate_up.shape[-1])  # one plain batched product: XLA's fast path on CPU
        gate, up = jnp.split(jnp.einsum("bmd,bfd->bmf", rows, gate_up), 2, axis=-1)
        hidden = jax.nn.silu(gate) * up
        return jnp.einsum("bmf,bdf->bmd", hidden, dequantize(down, scale_down, rows.dtype))

    weights = [gate_up, down] + ([gate_up_scale_inv, down_scale_inv] if gate_up_scale_inv is not None else [])
    return blocked(x, layout(x.shape[0], group_sizes, block_size(x.shape[0], gate_up.shape[0])), mlp, *weights)
