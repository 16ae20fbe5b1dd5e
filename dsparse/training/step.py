"""One training step: loss, gradients, AdamW, router bias update; sharded as the model's mesh says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float

from dsparse import mtp
from dsparse.errors import DsparseError
from dsparse.model import Model
from dsparse.moe import MixtureOfExperts
from dsparse.sharding import batch_ways, named_sharding, use_mesh
from dsparse.training.config import TrainConfig
from dsparse.training.data import Batch
from dsparse.training.loss import cross_entropy
from dsparse.training.optimizer import learning_rate_schedule, make_optimizer

Arrays = dict[str, Array]  # by dotted path in the model, such as "stacks.0.blocks.0.mlp.gate_up_proj"
Metrics = dict[str, Any]
Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]

UNTRAINED = ("mtp", "indexer")  # parts of the model that the next-token loss gives no gradient (mtp has its own loss)


class TrainState(NamedTuple):
    """Everything a run changes. step: updates so far. params: trained, float32. frozen: the rest of the model."""

    step: Array
    params: Arrays
    frozen: Arrays
    optimizer: optax.OptState


def make_train_step(model: Model, config: TrainConfig) -> tuple[TrainState, Step]:
    """The first state and the compiled update `(state, batch) -> (state, metrics)`.

    model: with float32 parameters. Its arrays become the state's, and each update consumes the arrays of the state it
    is given: get a usable model back with `write_back`.

    Metrics, scalars unless said: loss (mean over the learned tokens), mtp_loss (where it is trained), balance_loss,
    grad_norm, learning_rate, tokens (learned), expert_load (for each MoE layer, tokens of the busiest expert over the mean), finite. An update whose
    loss or gradient is not finite changes nothing.

    Raises:
        DsparseError: the mesh does not divide the batch, or a loss is asked for that the model has no layers for.
    """
    _check(model, config)
    model.dtype, model.remat = jnp.dtype(config.dtype), config.remat
    graphdef, _ = nnx.split(model)
    variables = named_variables(model)
    trained = [name for name, variable in variables.items() if is_trained(name, variable, bool(config.mtp_loss_weight))]
    params = {name: variables[name][...] for name in trained}
    frozen = {name: variable[...] for name, variable in variables.items() if name not in params}
    schedule = learning_rate_schedule(config)
    optimizer = make_optimizer(config, schedule, {name: is_decayed(name, variables[name]) for name in trained})
    start = jax.eval_shape(lambda p, f: TrainState(jnp.zeros((), jnp.int32), p, f, optimizer.init(p)), params, frozen)
    shardings = state_shardings(start, variables, optimizer, model.mesh)
    params, frozen = jax.device_put((params, frozen), (shardings.params, shardings.frozen))
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params)
    state = TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, frozen, moments)
    update = _Update(graphdef, optimizer, schedule, tuple(router_biases(model)), config)
    # XLA takes half of a CPU's widest vectors unless it is told to take all (narrower CPUs split these again)
    options = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
    return state, jax.jit(update, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def _check(model: Model, config: TrainConfig) -> None:
    rows, ways = config.batch_size // config.gradient_accumulation, batch_ways(model.mesh)
    if rows % ways:
        raise DsparseError(
            f"mesh {config.mesh}: its {ways} parts of the batch do not divide the {rows} rows computed at once "
            f"(batch_size {config.batch_size} / gradient_accumulation {config.gradient_accumulation})"
        )
    if config.mtp_loss_weight:
        mtp.check(model)


def named_variables(model: Model) -> dict[str, nnx.Variable]:
    """The model's own variables by dotted path."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}


def merge(graphdef: nnx.GraphDef, arrays: Arrays) -> Model:
    """The model with these arrays."""
    paths = [(tuple(int(p) if p.isdigit() else p for p in name.split(".")), a) for name, a in arrays.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(paths))


def write_back(model: Model, state: TrainState) -> None:
    """Give the model the state's arrays (until the next update consumes them)."""
    nnx.update(model, nnx.state(merge(nnx.split(model)[0], state.params | state.frozen)))


def is_trained(name: str, variable: nnx.Variable, train_mtp: bool = False) -> bool:
    """Buffers and parts that get no gradient are neither trained nor decayed."""
    untrained = set(UNTRAINED) - ({"mtp"} if train_mtp else set())
    return type(variable) is nnx.Param and not set(name.split(".")) & untrained


def is_decayed(name: str, variable: nnx.Variable) -> bool:
    """Matrices are; norms' weights and biases are not."""
    rank = sum(axis != "layers" for axis in variable.get_metadata("axes"))
    return rank >= 2 and not name.endswith("bias")


def state_shardings(
    shapes: TrainState, variables: dict[str, nnx.Variable], optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """Where every array of a state lives: a parameter's moments beside it, scalars everywhere."""
    everywhere = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())

    def of(arrays: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Sharding]:
        if mesh is None:
            return dict.fromkeys(arrays, everywhere)
        return {name: named_sharding(variables[name].get_metadata("axes"), a.shape, mesh) for name, a in arrays.items()}

    params = of(shapes.params)
    moments = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, shapes.optimizer, params, transform_non_params=lambda _: everywhere
    )
    return TrainState(everywhere, params, of(shapes.frozen), moments)


def router_biases(model: Model) -> list[str | None]:
    """The selection bias of each entry of the routings that `Model.hidden_states` returns (None: it has none)."""
    gates = [
        (f"stacks.{s}.blocks.{b}.mlp.gate.e_score_correction_bias", block.mlp.gate)
        for s, stack in enumerate(model.stacks)
        for b, block in enumerate(stack.blocks)
        if isinstance(block.mlp, MixtureOfExperts)
    ]
    return [name if hasattr(gate, "e_score_correction_bias") else None for name, gate in gates]


@dataclasses.dataclass(frozen=True, eq=False)
class _Update:
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    router_biases: tuple[str | None, ...]
    config: TrainConfig

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, losses, loads = self.gradients(state, batch)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(gradient)) for gradient in gradients.values()))
        finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(norm)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        if jax.default_backend() == "cpu":  # else XLA computes moments twice there, and copies the old ones for it
            updates, optimizer = jax.lax.optimization_barrier((updates, optimizer))
        params = optax.apply_updates(state.params, updates)
        frozen = state.frozen | self.balanced_biases(state.frozen, loads)
        new = TrainState(state.step + 1, params, frozen, optimizer)
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        layers = [load.max(axis=-1) / load.mean(axis=-1) for load in loads]
        metrics = losses | {
            "grad_norm": norm,
            "learning_rate": self.schedule(state.step),
            "tokens": jnp.sum(batch.weights).astype(jnp.int32),
            "expert_load": jnp.concatenate(layers) if layers else jnp.zeros(0),
            "finite": finite,
        }
        return new, metrics

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Arrays, Arrays, list[Float[Array, "_ E"]]]:
        """Gradients, the losses by name and each MoE run's expert loads of the whole batch."""
        parts, total = self.config.gradient_accumulation, jnp.maximum(jnp.sum(batch.weights), 1.0)
        grad = jax.value_and_grad(self.loss, has_aux=True)

        def part(rows):
            (_, (losses, loads)), gradients = grad(state.params, state.frozen, rows, total, parts)
            return gradients, losses, loads

        if parts == 1:
            return part(batch)
        # part i takes rows i, i + parts, ...: each device keeps the rows it holds
        rows = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1), batch)
        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(part, jax.tree.map(lambda a: a[0], rows))
        )
        return jax.lax.scan(lambda sums, rows: (jax.tree.map(jnp.add, sums, part(rows)), None), zeros, rows)[0]

    def loss(self, params: Arrays, frozen: Arrays, batch: Batch, total: Array, parts: int):
        """What this one of `parts` parts of the batch adds to the loss; `total` is the whole batch's weight."""
        model = merge(self.graphdef, params | frozen)
        residual, _, routings = model.residual(model.context(batch.tokens, None, batch.segment_ids))
        with use_mesh(model.mesh):
            summed = functools.partial(cross_entropy, batch_ways=batch_ways(model.mesh))
            weights = batch.weights / total
            losses = {
                "loss": summed(model.norm(model.collapse(residual)), model.head_weight(), batch.targets, weights),
                "balance_loss": sum((jnp.sum(r.balance_loss) for r in routings), start=jnp.zeros(())) / parts,
            }
            if self.config.mtp_loss_weight:
                losses["mtp_loss"] = mtp.loss(model, residual, batch.targets, weights, batch.segment_ids, summed)
        objective = losses["loss"] + self.config.balance_loss_weight * losses["balance_loss"]
        objective += self.config.mtp_loss_weight * losses.get("mtp_loss", 0.0)
        return objective, (losses, [routing.load for routing in routings])

    def balanced_biases(self, frozen: Arrays, loads: list[Float[Array, "_ E"]]) -> Arrays:
        """Selection biases moved towards underused experts, by a fixed step (arXiv:2408.15664, algorithm 1)."""
        rate = self.config.router_bias_update_rate
        return {
            name: frozen[name] + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load).astype(frozen[name].dtype)
            for name, load in zip(self.router_biases, loads, strict=True)
            if name is not None
        }
