"""A checkpoint loaded as stored and written back has the same tensors, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from published import make, raw_tensors

import dsparse

CASES = {
    "bfloat16": {},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "sharded": {"shards": 3},
    "fp8": {"fp8": True},
    "mtp": {"mtp": 1},
    "mtp with its own embedding and head": {"mtp": 2, "tied_mtp": False},
    "fp8 mtp": {"fp8": True, "mtp": 1},
    "v2": {"family": "deepseek_v2"},
    "tied embeddings": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", CASES)
def test_written_back_bit_for_bit(tmp_path: Path, case: str):
    source = make(tmp_path / "source", **CASES[case])
    model = dsparse.from_pretrained(source)
    dsparse.save_pretrained(model, tmp_path / "back", max_shard_size="200KB" if case == "sharded" else "5GB")
    assert raw_tensors(tmp_path / "back") == raw_tensors(source)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    if case == "sharded":
        assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
