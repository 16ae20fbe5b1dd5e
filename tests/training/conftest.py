"""Data and a tokenizer for training tests."""

import json

import numpy as np
import pytest


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
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"})
    )
    return folder
