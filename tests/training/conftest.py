"""Small models and data for training tests."""

import json

import numpy as np
import pytest
from flax import nnx

from dsparse import Model, ModelConfig
from dsparse.sharding import make_mesh
from dsparse.training.config import TrainConfig
from dsparse.training.data import Batch, make_batch


def small_model(family="deepseek_v3", mesh=None, seed=0, **overrides) -> Model:
    config = ModelConfig.tiny(family, num_hidden_layers=2, **overrides)
    return Model(config, rngs=nnx.Rngs(seed), mesh=make_mesh(mesh))


def settings(**options) -> TrainConfig:
    return TrainConfig(**{"model": "none", "data": ("none",), "steps": 4, "learning_rate": 1e-2, "tensorboard": False} | options)


def random_batch(rows: int, length: int, vocab: int = 256, seed: int = 0) -> Batch:
    """Rows of two packed documents and a padded end."""
    rng = np.random.default_rng(seed)
    segments = np.repeat([1, 2, 0], [length // 2, length - length // 2 - 2, 3]).astype(np.int32)
    return make_batch(
        [(rng.integers(2, vocab, length + 1).astype(np.int32), segments, np.ones(length + 1, bool)) for _ in range(rows)]
    )


@pytest.fixture
def tokens_file(tmp_path):
    """A token array of documents of 50 tokens in a vocabulary of 256 with end-of-sequence 1; learnable."""
    rng = np.random.default_rng(0)
    tokens = (rng.integers(0, 4, 4000) + np.arange(4000) % 40 * 5 + 2).astype(np.uint16)
    tokens[49::50] = 1
    np.save(tmp_path / "tokens.npy", tokens)
    return tmp_path / "tokens.npy"


@pytest.fixture
def byte_tokenizer(tmp_path):
    """A folder with a tokenizer of single characters (letters, space, digits, punctuation); <eos> is 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {"<bos>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}))
    return folder
