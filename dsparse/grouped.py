"""Mixture-of-experts products for XLA: rows padded to blocks that belong to one expert each, then batched products.

`jax.lax.ragged_dot` costs about one dense product per group on CPU and expands densely on GPUs without a kernel.
Here the work is that of the rows plus at most one block of padding a group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dsparse.reference import dequantize, gradient_once, swiglu

GATHERED_BYTES = 64 << 20  # weights copied for one batched product; more are taken in turns
FEW_ROWS = 32  # up to here (decode) every row gets a copy of its own expert's weights and nothing is sorted


class Experts(NamedTuple):
    """Weights of the SwiGLU experts, [out, in] each; block scales where they are stored in 8 or 4 bits."""

    gate_up: Shaped[Array, "E 2 F D"]
    down: Shaped[Array, "E D F"]
    gate_up_scale_inv: Shaped[Array, "E 2 Fb Db"] | None = None
    down_scale_inv: Shaped[Array, "E Db Fb"] | None = None


class Blocks(NamedTuple):
    """Rows laid out in blocks of one group each."""

    group: Int[Array, " blocks"]
    source: Int[Array, " slots"]  # the row that fills each slot, -1: padding
    slot: Int[Array, " M"]  # where each row went, -1: nowhere


def take_rows(x: Float[Array, "M D"], index: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of x; 0 where the index is -1."""
    return jnp.where((index >= 0)[..., None], x[jnp.maximum(index, 0)], 0)


@jax.custom_vjp
def spread(x: Float[Array, "T D"], source: Int[Array, " slots"], slot: Int[Array, "T K"]) -> Float[Array, "slots D"]:
    """Copy each token to its K slots: out[s] = x[source[s] // K]. Knowing `slot`, the gradient is `collect`."""
    return take_rows(x, jnp.where(source >= 0, source // slot.shape[1], -1))


@jax.custom_vjp
def collect(y: Float[Array, "slots D"], source: Int[Array, " slots"], slot: Int[Array, "T K"]) -> Float[Array, "T D"]:
    """Sum each token's K results: the transpose of `spread`, which is its gradient."""
    parts = (take_rows(y, slot[:, k]).astype(jnp.float32) for k in range(slot.shape[1]))  # never [T, K, D] at once
    return functools.reduce(jnp.add, parts).astype(y.dtype)


def _no_gradient(*indices: Array):
    return (np.zeros(index.shape, jax.dtypes.float0) for index in indices)


def _spread_bwd(indices, g):
    return collect(g, *indices), *_no_gradient(*indices)


def _collect_bwd(indices, g):
    return spread(g, *indices), *_no_gradient(*indices)


spread.defvjp(lambda x, source, slot: (spread(x, source, slot), (source, slot)), _spread_bwd)
collect.defvjp(lambda y, source, slot: (collect(y, source, slot), (source, slot)), _collect_bwd)


def block_size(rows: int, groups: int) -> int:
    """Rows a block: up to half the mean group, so that padding stays well below the work, and what keeps a core busy."""
    return 1 << max(0, min(7, (rows // (2 * groups)).bit_length() - 1))


def sorted_blocks(group: Int[Array, " M"], groups: int) -> Blocks:
    """Lay out rows by group (group number `groups`: the row belongs to nobody)."""
    rows = group.shape[0]
    size = block_size(rows, groups)
    blocks = min(rows, rows // size + groups)
    counts = jnp.bincount(group, length=groups + 1)[:groups]
    ends, blocks_end = jnp.cumsum(counts), jnp.cumsum(-(-counts // size))
    first_slot = (blocks_end - -(-counts // size)) * size
    order = jnp.argsort(group, stable=True)
    block_group = jnp.minimum(jnp.searchsorted(blocks_end, jnp.arange(blocks), side="right"), groups - 1)
    slot_group = jnp.repeat(block_group, size)
    within = jnp.arange(blocks * size) - first_slot[slot_group]
    filled = within < counts[slot_group]
    source = jnp.where(filled, order[jnp.minimum((ends - counts)[slot_group] + within, rows - 1)], -1)
    inverse = jnp.zeros(rows, order.dtype).at[order].set(jnp.arange(rows), unique_indices=True)
    clipped = jnp.minimum(group, groups - 1)
    slot = jnp.where(group < groups, first_slot[clipped] + inverse - (ends - counts)[clipped], -1)
    return Blocks(block_group, source, slot)


def in_turns(fn: Callable, rows, group: Int[Array, " b"], weights) -> Float[Array, "b m F"]:
    """fn(rows, weights of each block's group), so many blocks at a time that the copied weights stay small.

    rows: any tree of [b, m, ...].
    """
    count, held = group.shape[0], jax.tree.leaves(weights)
    bytes_a_block = sum(w[0].size * w.dtype.itemsize for w in held)
    turns = min(count, max(1, -(-count * bytes_a_block // GATHERED_BYTES)))

    def some(rows, group):
        return fn(rows, jax.tree.map(lambda w: w[group], weights))

    if turns == 1:
        return some(rows, group)
    one = functools.partial(jax.tree.map, lambda a: a[None])

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(args):  # the backward pass copies weights again, turn by turn
        return some(*one(args))[0]

    return jax.lax.map(block, (rows, group), batch_size=count // turns)


def swiglu_experts(
    rows: tuple[Float[Array, "b m D"], Float[Array, "b m"]], experts: Experts, limit: float | None
) -> Float[Array, "b m D"]:
    """Block b of rows and their weights through its own expert b."""
    rows, weights = rows
    gate_up = dequantize(experts.gate_up, experts.gate_up_scale_inv, rows.dtype)
    gate_up = gate_up.reshape(
        gate_up.shape[0], -1, gate_up.shape[-1]
    )  # one plain batched product: XLA's fast path on CPU
    gate, up = jnp.split(gradient_once(jnp.einsum("bmd,bfd->bmf", rows, gate_up)), 2, axis=-1)
    down = dequantize(experts.down, experts.down_scale_inv, rows.dtype)
    hidden = swiglu(gate, up, limit) * weights[..., None].astype(rows.dtype)  # narrower than the output
    return gradient_once(jnp.einsum("bmf,bdf->bmd", hidden, down))


def expert_mlp(
    x: Float[Array, "T D"],
    choice: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    experts: Experts,
    limit: float | None = None,
) -> Float[Array, "T D"]:
    """Sum over each token's chosen experts, weighted; choice E (one past the last) adds nothing. Exact, no capacity."""
    groups, (tokens, chosen) = experts.gate_up.shape[0], choice.shape
    mlp = functools.partial(swiglu_experts, limit=limit)
    group = choice.reshape(-1)
    if group.size > FEW_ROWS:
        return _padded_experts(mlp, x, weights, sorted_blocks(group, groups), experts)
    weights = jnp.where(choice < groups, weights, 0).reshape(-1, 1)
    rows = jnp.repeat(x, chosen, axis=0)[:, None]
    out = in_turns(mlp, (rows, weights), jnp.minimum(group, groups - 1), experts)
    return jnp.sum(out.reshape(tokens, chosen, -1), axis=1)


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, static_argnums=0)
def _padded_experts(mlp, x, weights, blocks: Blocks, experts: Experts) -> Float[Array, "T D"]:
    """Each token's weighted results. The backward pass copies rows and weights into blocks again, nothing keeps them."""
    slot, count = blocks.slot.reshape(weights.shape), blocks.group.shape[0]
    rows = spread(x, blocks.source, slot).reshape(count, -1, x.shape[-1])
    weights = spread(weights.reshape(-1, 1), blocks.source, blocks.slot[:, None]).reshape(count, -1)
    out = in_turns(mlp, (rows, weights), blocks.group, experts)
    return collect(out.reshape(-1, x.shape[-1]), blocks.source, slot)


def sorted_expert_mlp(
    x: Float[Array, "T D"],
    choice: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    experts: Experts,
    swiglu_rows: Callable,
    down_rows: Callable,
) -> Float[Array, "T D"]:
    """`expert_mlp` by products of rows sorted by expert, without padding: what grouped matmul kernels take.

    swiglu_rows(rows, experts, sizes) and down_rows(rows, experts, sizes) give 0 for rows past the last group.
    """
    groups, group = experts.gate_up.shape[0], choice.reshape(-1)
    order = jnp.argsort(group, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(group.size), unique_indices=True).reshape(choice.shape)
    sizes = jnp.bincount(group, length=groups + 1)[:groups].astype(jnp.int32)
    hidden = swiglu_rows(spread(x, order, place), experts, sizes)
    hidden *= spread(weights.reshape(-1, 1), order, place.reshape(-1, 1)).astype(hidden.dtype)
    return collect(down_rows(hidden, experts, sizes), order, place)


def grouped_matmul(
    x: Float[Array, "M D"], weights: Float[Array, "E F D"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Rows sorted by group times their group's matrix transposed; rows past the last group give 0."""
    rows, groups = x.shape[0], weights.shape[0]
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")
    blocks = sorted_blocks(group, groups)
    slot = blocks.slot[:, None]
    padded = spread(x, blocks.source, slot).reshape(blocks.group.shape[0], -1, x.shape[-1])
    out = in_turns(lambda a, w: jnp.einsum("bmd,bfd->bmf", a, w.astype(a.dtype)), padded, blocks.group, weights)
    return collect(out.reshape(blocks.source.shape[0], -1), blocks.source, slot)
