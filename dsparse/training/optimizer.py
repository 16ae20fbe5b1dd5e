"""AdamW, clipping and the learning rate's schedule."""

from __future__ import annotations

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
    adamw = optax.adamw(
        schedule,
        config.adam_beta1,
        config.adam_beta2,
        config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(clip, adamw)
