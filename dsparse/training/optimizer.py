"""AdamW, clipping and the learning rate's schedule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dsparse.training.config import TrainConfig


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of update 0, 1, ...: a linear warm-up to the peak, then the decay to the last update."""
    peak, warmup = config.learning_rate, config.warmup_steps
    falling, final = max(1, config.steps - warmup - 1), config.final_learning_rate
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, falling, alpha=final),
        "linear": lambda: optax.linear_schedule(peak, peak * final, falling),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not warmup:
        return decay
    return optax.join_schedules([lambda step: peak * (step + 1) / warmup, decay], [warmup])


def make_optimizer(
    config: TrainConfig, schedule: optax.Schedule, decayed: dict[str, bool]
) -> optax.GradientTransformation:
    """decayed: which parameters weight decay applies to."""
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, decayed)
    return optax.chain(clip, optax.chain(_adam(config), decay, optax.scale_by_learning_rate(schedule)))


def _adam(config: TrainConfig) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, which on a CPU reads the new moments from where they are stored.

    XLA would compute them once more from the old ones, and so could not overwrite those without copying them first.
    """
    b1, b2, epsilon = config.adam_beta1, config.adam_beta2, config.adam_epsilon
    adam = optax.scale_by_adam(b1, b2, epsilon)
    if jax.default_backend() != "cpu":
        return adam

    def update(gradients, state, params=None):
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        count = optax.safe_increment(state.count)
        corrected = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), *corrected)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(adam.init, update)
