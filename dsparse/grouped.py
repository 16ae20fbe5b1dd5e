"""Mixture-of-experts products for XLA: rows padded to blocks that belong to one expert each, some blocks a turn.

`jax.lax.ragged_dot` costs about one dense product per group on CPU and expands densely on GPUs without a kernel.
Here the work is that of the rows plus at most one block of padding a group, and memory that of one turn: nothing of
the size of all padded rows is ever written, which on a CPU would cost more in page faults than the products.
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
from dsparse.remat import keep

COPIED_BYTES = 5 << 19  # weights copied for one turn's batched product on a CPU: they stay in its cache
ON_ACCELERATORS = 24  # times as many, so that products are large
FEW_ROWS = 32  # up to here (decode) every row gets a copy of its own expert's weights and nothing is sorted


class Experts(NamedTuple):
    """Weights of the SwiGLU experts, [out, in] each; block scales where they are stored in 8 or 4 bits."""

    gate_up: Shaped[Array, "E 2 F D"]
    down: Shaped[Array, "E D F"]
    gate_up_scale_inv: Shaped[Array, "E 2 Fb Db"] | None = None
    down_scale_inv: Shaped[Array, "E Db Fb"] | None = None

    def of(self, group: Int[Array, " b"], dtype) -> tuple[Float[Array, "b _ D"], Float[Array, "b D F"]]:
        """Gate with up, and down, of these experts, in floating point."""
        gate_up, down, *scales = jax.tree.map(lambda a: a[group], tuple(self))
        gate_up, down = (dequantize(w, s, dtype) for w, s in zip((gate_up, down), scales, strict=True))
        return gate_up.reshape(len(group), -1, gate_up.shape[-1]), down  # merged: one plain batched product


class Turns(NamedTuple):
    """Rows in blocks of one group each, some blocks a turn; only the first `count` turns hold any row."""

    group: Int[Array, "turns b"]
    source: Int[Array, "turns b m"]  # the row that fills each place of a block, -1: none
    count: Int[Array, ""]


def block_size(rows: int, groups: int) -> int:
    """Rows a block: up to half the mean group, so that padding stays well below the work, and what keeps a core busy."""
    return 1 << max(0, min(7, (rows // (2 * groups)).bit_length() - 1))


def in_turns(group: Int[Array, " M"], weights) -> Turns:
    """Rows laid out by group; a row of a group past the last belongs to nobody.

    weights: any tree of arrays [groups, ...] of which a turn copies one for each of its blocks.
    """
    rows, held = group.shape[0], jax.tree.leaves(weights)
    groups = held[0].shape[0]
    size = block_size(rows, groups)
    blocks = min(rows, rows // size + groups)
    budget = COPIED_BYTES * (1 if jax.default_backend() == "cpu" else ON_ACCELERATORS)
    at_once = max(1, min(blocks, budget // _bytes_of_one(weights)))
    turns = -(-blocks // at_once)
    counts = jnp.bincount(group, length=groups + 1)[:groups]
    needed = -(-counts // size)
    first_row, block_end = jnp.cumsum(counts) - counts, jnp.cumsum(needed)
    block = jnp.arange(turns * at_once)
    block_group = jnp.minimum(jnp.searchsorted(block_end, block, side="right"), groups - 1)
    within = (block - (block_end - needed)[block_group])[:, None] * size + jnp.arange(size)
    order = jnp.argsort(group, stable=True)
    row = order[jnp.minimum(first_row[block_group][:, None] + within, rows - 1)]
    source = jnp.where(within < counts[block_group][:, None], row, -1)
    return Turns(
        block_group.reshape(turns, at_once), source.reshape(turns, at_once, size), -(-block_end[-1] // at_once)
    )


def _bytes_of_one(weights) -> int:
    return sum(w[0].size * w.dtype.itemsize for w in jax.tree.leaves(weights))


def _at(table: Shaped[Array, "M *row"], index: Int[Array, "*batch"]) -> Shaped[Array, "*batch *row"]:
    """Rows of the table; the first one where the index is -1."""
    return table.at[jnp.maximum(index, 0)].get(mode="promise_in_bounds")


def expert_mlp(
    x: Float[Array, "T D"],
    choice: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    experts: Experts,
    limit: float | None = None,
) -> Float[Array, "T D"]:
    """Sum over each token's chosen experts, weighted; choice E (one past the last) adds nothing. Exact, no capacity."""
    groups, group = experts.gate_up.shape[0], choice.reshape(-1)
    if group.size > FEW_ROWS or group.size * _bytes_of_one(experts) > COPIED_BYTES * ON_ACCELERATORS:
        return _experts_in_turns(limit, x, weights, keep(in_turns(group, experts)), experts)
    gate_up, down = experts.of(jnp.minimum(group, groups - 1), x.dtype)
    weights = jnp.where(choice < groups, weights, 0).reshape(-1, 1, 1)
    hidden = jnp.einsum("bmd,bfd->bmf", jnp.repeat(x, choice.shape[1], axis=0)[:, None], gate_up)
    hidden = _activate(gradient_once(hidden), limit) * weights.astype(x.dtype)  # narrower than the output
    return jnp.sum(jnp.einsum("bmf,bdf->bmd", hidden, down).reshape(*choice.shape, -1), axis=1)


def _activate(gate_up: Float[Array, "b m _"], limit: float | None) -> Float[Array, "b m F"]:
    return swiglu(*jnp.split(gate_up, 2, axis=-1), limit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts_in_turns(limit, x, weights, turns: Turns, experts: Experts) -> Float[Array, "T D"]:
    """Each token's weighted results, summed in float32. The backward pass starts again from x and keeps nothing else."""

    def turn(i, total):
        rows, weight, token, (gate_up, down) = _turn(i, x, weights, turns, experts)
        hidden = _activate(jnp.einsum("bmd,bfd->bmf", rows, gate_up), limit) * weight
        return add_rows(total, token, jnp.einsum("bmf,bdf->bmd", hidden, down))

    return jax.lax.fori_loop(0, turns.count, turn, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def _turn(i, x, weights, turns: Turns, experts: Experts):
    """Rows of turn i and their weights (0 where a block has none), whose tokens they are, and their experts."""
    source = turns.source[i]
    token = jnp.maximum(source, 0) // weights.shape[1]
    weight = jnp.where(source < 0, 0, _at(weights.reshape(-1), source))[..., None].astype(x.dtype)
    return _at(x, token), weight, token, experts.of(turns.group[i], x.dtype)


def add_rows(
    table: Float[Array, "T D"],
    index: Int[Array, "*batch"],
    rows: Float[Array, "*batch D"],
    mode: jax.lax.GatherScatterMode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
) -> Float[Array, "T D"]:
    """table[index] += rows, in the shapes that XLA scatters on a CPU: of others it makes a copy first.

    mode: what becomes of an index outside the table; by default there must be none.
    """
    updates = rows.astype(table.dtype).reshape(-1, 1, rows.shape[-1])
    whole_rows = jax.lax.ScatterDimensionNumbers((1, 2), (), (0,))
    return jax.lax.scatter_add(table, index.reshape(-1, 1), updates, whole_rows, mode=mode)


class GroupSums(NamedTuple):
    """Sums of blocks' products by group, over turns. Of 16-bit weights the totals have 16 bits too, half the memory of
    all gradients: a group's blocks follow each other, so that only the newest group's sum need be kept in float32."""

    totals: tuple[Float[Array, "E _ _"], ...]
    newest: tuple[Int[Array, ""], tuple[Float[Array, "_ _"], ...]] | None

    @staticmethod
    def zeros(shapes: tuple[tuple[int, ...], ...], dtype) -> GroupSums:
        totals = tuple(jnp.zeros(shape, dtype) for shape in shapes)
        if jnp.dtype(dtype).itemsize > 2:
            return GroupSums(totals, None)
        return GroupSums(totals, (jnp.int32(-1), tuple(jnp.zeros(shape[1:], jnp.float32) for shape in shapes)))

    def add(self, group: Int[Array, " b"], products: tuple[Float[Array, "b _ _"], ...]) -> GroupSums:
        if self.newest is None:
            return GroupSums(tuple(t.at[group].add(p) for t, p in zip(self.totals, products, strict=True)), None)

        def add_block(block, state: GroupSums) -> GroupSums:
            newest, sums = state.newest
            this = group[block].astype(jnp.int32)
            sums = tuple(jnp.where(this == newest, s, 0) + p[block] for s, p in zip(sums, products, strict=True))
            totals = tuple(t.at[this].set(s.astype(t.dtype)) for t, s in zip(state.totals, sums, strict=True))
            return GroupSums(totals, (this, sums))

        return jax.lax.fori_loop(0, group.shape[0], add_block, self)


def _experts_backward(limit, residuals, d_out):
    x, weights, turns, experts = residuals
    trained = experts.gate_up_scale_inv is None  # weights in 8 or 4 bits have no gradient

    def turn(i, sums):
        d_x, d_weights, d_experts = sums
        rows, weight, token, (gate_up, down) = _turn(i, x, weights, turns, experts)
        hidden, back = jax.vjp(functools.partial(_activate, limit=limit), jnp.einsum("bmd,bfd->bmf", rows, gate_up))
        d_rows = _at(d_out, token)
        d_hidden = jnp.einsum("bmd,bdf->bmf", d_rows, down)
        d_weight = jnp.sum((d_hidden * hidden).astype(jnp.float32), axis=-1)
        place = jnp.where(turns.source[i] < 0, d_weights.size, turns.source[i])
        d_weights = d_weights.at[place].set(d_weight, mode="drop")
        (d_gate_up,) = back(d_hidden * weight)
        d_gate_up = jax.lax.optimization_barrier(d_gate_up)  # read twice, once transposed
        if trained:
            pairs = (d_gate_up, rows), (hidden * weight, d_rows)  # down's transposed: faster with its wide side last
            products = (jnp.einsum("bmf,bmd->bfd", *pair, preferred_element_type=jnp.float32) for pair in pairs)
            d_experts = d_experts.add(turns.group[i], tuple(products))
        return add_rows(d_x, token, jnp.einsum("bmf,bfd->bmd", d_gate_up, gate_up)), d_weights, d_experts

    groups, width, inner = experts.down.shape
    shapes = (groups, 2 * inner, width), (groups, inner, width)
    widest = jnp.promote_types(experts.gate_up.dtype, experts.down.dtype)
    d_experts = GroupSums.zeros(shapes, widest) if trained else ()
    start = jnp.zeros(x.shape, jnp.float32), jnp.zeros(weights.size, jnp.float32), d_experts
    d_x, d_weights, d_experts = jax.lax.fori_loop(0, turns.count, turn, start)
    if trained:
        d_gate_up, d_down = d_experts.totals[0].reshape(experts.gate_up.shape), jnp.swapaxes(d_experts.totals[1], 1, 2)
        d_experts = Experts(d_gate_up.astype(experts.gate_up.dtype), d_down.astype(experts.down.dtype))
    return d_x.astype(x.dtype), d_weights.reshape(weights.shape).astype(weights.dtype), None, d_experts or None


_experts_in_turns.defvjp(lambda limit, *args: (_experts_in_turns(limit, *args), args), _experts_backward)


def grouped_matmul(
    x: Float[Array, "M D"], weights: Float[Array, "E F D"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Rows sorted by group times their group's matrix transposed; rows past the last group give 0."""
    rows = x.shape[0]
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")
    turns = in_turns(group, weights)

    @jax.checkpoint  # the backward pass copies weights again, turn by turn
    def turn(args):
        source, group = args
        return jnp.einsum("bmd,bfd->bmf", _at(x, source), weights[group].astype(x.dtype))

    out = jax.lax.map(turn, (turns.source, turns.group)).reshape(-1, weights.shape[1])
    place = jnp.where(turns.source < 0, rows, turns.source).reshape(-1)
    return jnp.zeros((rows, out.shape[-1]), out.dtype).at[place].set(out, mode="drop")


# ---- rows without padding, for kernels ------------------------------------------------------------------------------


def take_rows(x: Float[Array, "M D"], index: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of x; 0 where the index is -1."""
    return jnp.where((index >= 0)[..., None], _at(x, index), 0)


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
    order, place, sizes = keep((order, place, sizes))
    hidden = keep(swiglu_rows(spread(x, order, place), experts, sizes))
    hidden *= spread(weights.reshape(-1, 1), order, place.reshape(-1, 1)).astype(hidden.dtype)
    return collect(down_rows(hidden, experts, sizes), order, place)
