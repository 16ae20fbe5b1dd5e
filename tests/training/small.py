"""A small model, its options and a batch."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsparse import Model, ModelConfig
from dsparse.sharding import make_mesh
from dsparse.training.config import TrainConfig
from dsparse.training.data import Batch, make_batch

BIAS = "stacks.0.blocks.1.mlp.gate.e_score_correction_bias"


def small_model(family="deepseek_v3", mesh=None, seed=0, **overrides) -> Model:
    """A dense layer, a mixture of experts, and a multi-token prediction layer."""
    config = ModelConfig.tiny(family, **({"num_hidden_layers": 2, "num_nextn_predict_layers": 1} | overrides))
    return Model(config, rngs=nnx.Rngs(seed), mesh=make_mesh(mesh))


def settings(**options) -> TrainConfig:
    return TrainConfig(
        **{"model": "none", "data": ("none",), "steps": 4, "learning_rate": 1e-2, "tensorboard": False} | options
    )


def random_batch(rows: int, length: int, vocab: int = 256, seed: int = 0) -> Batch:
    """Rows of two packed documents and a padded end."""
    rng = np.random.default_rng(seed)
    segments = np.repeat([1, 2, 0], [length // 2, length - length // 2 - 2, 3]).astype(np.int32)
    batch = make_batch(
        [
            (rng.integers(2, vocab, length + 1).astype(np.int32), segments, np.ones(length + 1, bool))
            for _ in range(rows)
        ]
    )
    return jax.tree.map(jnp.asarray, batch)
