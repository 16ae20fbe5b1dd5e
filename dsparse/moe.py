"""Dropless mixture of experts: routers, sorted-token dispatch, shared experts (DeepSeekMoE, arXiv:2401.06066)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dsparse import grouped, ops, sharding
from dsparse.config import ModelConfig
from dsparse.layers import GatedMLP
from dsparse.params import Buffer, Scope, normal, zeros
from dsparse.remat import keep


class Routing(NamedTuple):
    """Which experts each token goes to.

    weights: of the chosen experts. experts: their numbers. load: tokens each expert received, summed over the batch.
    balance_loss: sequence-wise balance loss (DeepSeek-V3, equations 17-20), not yet scaled by its coefficient.
    """

    weights: Float[Array, "B T K"]
    experts: Int[Array, "B T K"]
    load: Float[Array, " E"]
    balance_loss: Float[Array, ""]


class Router(nnx.Module):
    """Scores every expert and picks num_experts_per_tok of them. Computed in float32 whatever the model's dtype.

    - softmax, "greedy" and "group_limited_greedy" (V2): a group's score is its maximum.
    - sigmoid, "noaux_tc" (V3): experts are *chosen* by score + e_score_correction_bias, the group's score being the sum
      of its two best, but *weighed* by the score alone (auxiliary-loss-free balancing, arXiv:2408.15664).
    - sqrt(softplus), "noaux_tc" (V4).
    - hashed (V4's first layers): a frozen table names each token id's experts; the scores only weigh them.
    """

    def __init__(self, scope: Scope, config: ModelConfig, hashed: bool = False):
        experts = config.n_routed_experts
        self.weight = scope.param(
            "weight", (experts, config.hidden_size), (None, "embed"), normal(config.initializer_range)
        )
        self.hashed = hashed
        if hashed:
            table = functools.partial(_spread_experts, experts=experts)
            shape = (config.vocab_size, config.num_experts_per_tok)
            self.tid2eid = scope.param("tid2eid", shape, ("vocab", None), table, dtype=jnp.int32, kind=Buffer)
        elif config.topk_method == "noaux_tc":
            self.e_score_correction_bias = scope.param(
                "e_score_correction_bias", (experts,), (None,), zeros, minimum=jnp.float32, kind=Buffer
            )
        self.config = config

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
    ) -> Routing:
        c = self.config
        logits = keep(ops.linear(x.astype(jnp.float32), self.weight[...].astype(jnp.float32)))
        scores = SCORES[c.scoring_func](logits)
        if self.hashed:
            experts = self.tid2eid[...][tokens]
        else:
            choice = jax.lax.stop_gradient(self._eligible(scores))
            experts = keep(jax.lax.top_k(choice, c.num_experts_per_tok)[1])
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if (
            c.norm_topk_prob and c.scoring_func != "softmax"
        ):  # the published V2 models leave it off, transformers ignores it
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        real = (
            jnp.ones_like(scores[..., :1]) if segment_ids is None else (segment_ids > 0)[..., None].astype(jnp.float32)
        )
        chosen = jax.nn.one_hot(experts, c.n_routed_experts).sum(axis=2) * real
        balance = self._balance(scores, chosen, real)
        return Routing(weights * c.routed_scaling_factor, experts, chosen.sum(axis=(0, 1)), balance)

    def _eligible(self, scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Scores to choose by: bias added, experts outside the best topk_group groups ruled out."""
        c = self.config
        if c.topk_method == "noaux_tc":
            scores = scores + self.e_score_correction_bias[...].astype(jnp.float32)
        if c.topk_method == "greedy" or c.n_group == 1:
            return scores
        groups = scores.reshape(*scores.shape[:-1], c.n_group, -1)
        best = 2 if c.topk_method == "noaux_tc" else 1
        group_scores = jax.lax.top_k(groups, best)[0].sum(axis=-1)
        _, kept = jax.lax.top_k(group_scores, c.topk_group)
        keep = jax.nn.one_hot(kept, c.n_group, dtype=bool).any(axis=-2)
        return jnp.where(keep[..., None], groups, -jnp.inf).reshape(scores.shape)

    def _balance(
        self, scores: Float[Array, "B T E"], chosen: Float[Array, "B T E"], real: Float[Array, "B T 1"]
    ) -> Float[Array, ""]:
        """chosen: 1 for each token's experts, 0 elsewhere and for padding. real: 0 for padding, else 1."""
        c, tokens = self.config, jnp.maximum(real.sum(axis=1), 1.0)
        share = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20) * real
        frequency = chosen.sum(axis=1) / tokens * c.n_routed_experts / c.num_experts_per_tok
        return jnp.mean(jnp.sum(jax.lax.stop_gradient(frequency) * share.sum(axis=1) / tokens, axis=-1))


SCORES = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
}


def _spread_experts(key, shape: tuple[int, ...], dtype, experts: int) -> Array:
    """A table that gives each token id different experts and every expert equally many ids."""
    *_, tokens, chosen = shape
    table = (jnp.arange(tokens)[:, None] + jnp.arange(chosen) * (experts // chosen)) % experts
    return jnp.broadcast_to(table.astype(dtype), shape)


class Experts(nnx.Module):
    """The routed experts' weights, stacked: gate and up [E, 2, F, D], down [E, D, F]."""

    def __init__(self, scope: Scope, config: ModelConfig):
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        init = normal(config.initializer_range)
        gate_up, down = ((e, 2, f, d), ("experts", None, "mlp", "embed")), ((e, d, f), ("experts", "embed", "mlp"))
        self.gate_up_proj = scope.param("gate_up_proj", *gate_up, init)
        self.gate_up_proj_scale_inv = scope.scale_inv("gate_up_proj", *gate_up)
        self.down_proj = scope.param("down_proj", *down, init)
        self.down_proj_scale_inv = scope.scale_inv("down_proj", *down)
        self.limit = config.swiglu_limit

    def __call__(
        self, x: Float[Array, "B T D"], weights: Float[Array, "B T K"], experts: Int[Array, "B T K"]
    ) -> Float[Array, "B T D"]:
        scales = (self.gate_up_proj_scale_inv, self.down_proj_scale_inv)
        stacked = grouped.Experts(
            self.gate_up_proj[...], self.down_proj[...], *(None if scale is None else scale[...] for scale in scales)
        )
        mesh = sharding.current_mesh()
        if mesh is None:
            return local_experts(x, weights, experts, stacked, self.limit)
        return _sharded_experts(mesh, x, weights, experts, stacked, self.limit)


def local_experts(
    x: Array, weights: Array, choice: Array, experts: grouped.Experts, limit: float | None
) -> Float[Array, "B T D"]:
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, choice, weights))
    out = keep(ops.expert_mlp(*flat, experts, limit=limit))  # which hyper-connections' gradients read
    return out.reshape(x.shape)


def _sharded_experts(
    mesh: Mesh, x: Array, weights: Array, choice: Array, experts: grouped.Experts, limit: float | None
) -> Float[Array, "B T D"]:
    """Expert parallelism: every device computes its own experts on the tokens of its expert group.

    Tokens are gathered over the mesh axis "expert" where the batch is split over it, and the partial sums scattered
    back; the intermediate dimension may be split over "tensor". No token is dropped.
    """
    specs = _expert_specs(mesh, experts)
    batch = sharding.partition_spec(("batch", None, None), x.shape, mesh)
    expert_axis, tensor_axis = specs.gate_up[0], specs.gate_up[2]
    gather = expert_axis is not None and expert_axis in (batch[0] if isinstance(batch[0], tuple) else (batch[0],))
    summed = tuple(axis for axis in (None if gather else expert_axis, tensor_axis) if axis)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(batch, batch, batch, specs), out_specs=batch, check_vma=False
    )
    def run(x, weights, choice, experts):
        here = experts.gate_up.shape[0]
        if gather:
            x, weights, choice = (jax.lax.all_gather(a, expert_axis, axis=0, tiled=True) for a in (x, weights, choice))
        local = choice - (jax.lax.axis_index(expert_axis) * here if expert_axis else 0)
        local = jnp.where((local >= 0) & (local < here), local, here)  # experts elsewhere add nothing here
        with sharding.use_mesh(None):  # each device on its own
            out = local_experts(x, weights, local, experts, limit)
        if summed:
            out = jax.lax.psum(out, summed)
        return jax.lax.psum_scatter(out, expert_axis, scatter_dimension=0, tiled=True) if gather else out

    return run(x, weights, choice, experts)


def _expert_specs(mesh: Mesh, experts: grouped.Experts) -> grouped.Experts:
    """How the experts are split inside `_sharded_experts`: over "expert", and over "tensor" unless scale blocks forbid."""
    axes = grouped.Experts(*(("experts", None, "mlp", None), ("experts", None, "mlp")) * 2)
    scaled = experts.gate_up_scale_inv is not None
    if scaled:
        axes = grouped.Experts(*(("experts", *(None,) * (len(a) - 1)) for a in axes))
    specs = [
        None if w is None else sharding.partition_spec(a, w.shape, mesh) for a, w in zip(axes, experts, strict=True)
    ]
    return grouped.Experts(*specs)


class MixtureOfExperts(nnx.Module):
    """Routed experts plus the shared experts every token passes through."""

    def __init__(self, scope: Scope, config: ModelConfig, hashed: bool = False):
        self.gate = Router(scope["gate"], config, hashed)
        self.experts = Experts(scope["experts"], config)
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = GatedMLP(scope["shared_experts"], config, width) if width else None

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Segment 0 is padding: its tokens count in neither load nor balance loss."""
        routing = self.gate(x, tokens, segment_ids)
        out = self.experts(x, routing.weights.astype(jnp.float32), routing.experts)
        return out if self.shared_experts is None else out + self.shared_experts(x), routing
