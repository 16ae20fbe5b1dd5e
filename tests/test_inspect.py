"""`dsparse inspect`: counts against the checkpoints themselves, and selections."""

import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from support import DEMO, ROOT, trained_checkpoint

import dsparse
from dsparse.config import ModelConfig
from dsparse.inspect import describe, inspect_checkpoint


def test_counts_of_the_demo():
    with safe_open(DEMO / "model.safetensors", "np") as file:
        sizes = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    report = inspect_checkpoint(DEMO)
    assert report.parameters == sum(sizes.values())
    assert report.stored_bytes == 2 * report.parameters
    config = ModelConfig.from_huggingface(DEMO)
    idle = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    idle *= 1 - config.num_experts_per_tok / config.n_routed_experts
    assert report.active_parameters == sum(sizes.values()) - sizes["model.embed_tokens.weight"] - round(idle)
    assert report.cache_bytes_per_token == 4 * (64 + 32) * 2
    assert [kind.layers for kind in report.kinds] == [(0,), (1, 2, 3)]
    assert "4 layers" in str(report) and "full_attention + MoE" in str(report)


def test_costs_of_sparse_layers():
    """Attention grows with length only by the indexer's scores beyond top-k; shared layers keep no index keys."""
    config = ModelConfig.tiny("glm_moe_dsa", num_hidden_layers=4, index_topk_freq=2, num_nextn_predict_layers=1)
    model = nnx.eval_shape(lambda: dsparse.Model(config, rngs=nnx.Rngs(0)))
    kinds = {kind.kind: kind for kind in describe(model, (8, 1000, 2000)).kinds}
    full = next(k for name, k in kinds.items() if "full indexer" in name)
    shared = next(k for name, k in kinds.items() if "shared indexer" in name)
    latent, attended = (
        config.kv_lora_rank + config.qk_rope_head_dim,
        2 * 4 * (2 * config.kv_lora_rank + config.qk_rope_head_dim) * 8,
    )
    assert shared.attention_flops == (attended,) * 3
    score = 2 * config.index_n_heads * (config.index_head_dim + 1)
    assert full.attention_flops == (attended, attended + 1000 * score, attended + 2000 * score)
    assert (full.cache_bytes, shared.cache_bytes) == (4 * (latent + config.index_head_dim), 4 * latent)


def test_selections_and_heat_map(tmp_path):
    folder = trained_checkpoint("v32")
    text = (ROOT / "examples" / "demo" / "text.txt").read_text(encoding="utf-8")[:500]
    file = tmp_path / "selected.png"
    report = inspect_checkpoint(folder, text, heat_map=file)
    assert [selection.layer for selection in report.selections] == list(range(6))
    for selection in report.selections:
        for query, row in enumerate(selection.indices):
            assert len(row) == len(set(row)) == min(query + 1, 64) and row[-1] <= query
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "layer 5:" in str(report)


def test_no_selection_is_said():
    with pytest.raises(dsparse.DsparseError, match="nothing to draw"):
        inspect_checkpoint(DEMO, "A short text.", heat_map="unused.png")
