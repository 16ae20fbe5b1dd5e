"""`dsparse inspect`: counts against the checkpoints themselves, and selections."""

import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from support import DEMO, ROOT, trained_checkpoint

import dsparse
from dsparse.config import ModelConfig
from dsparse.inspect import attended, describe, inspect_checkpoint, layer_selections
from dsparse.tokenizer import Tokenizer


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


def test_costs_of_shared_entries_and_packed_experts():
    """A layer that shares its entries scores none; two FP4 weights stand in a byte; a token reads one row of a table."""
    kinds = {"layer_types": ["compressed_sparse_attention"] * 2, "indexer_types": ["full", "shared"]}
    options = {"num_hidden_layers": 2, "mlp_layer_types": ["hash_moe", "moe"], **kinds}
    config = ModelConfig.tiny("deepseek_v4", **options)
    packed = {f"mlp.experts.{name}": np.dtype(np.int8) for name in ("gate_up_proj", "down_proj")}
    plain, stored = (
        describe(nnx.eval_shape(lambda s=s: dsparse.Model(config, rngs=nnx.Rngs(0), storage=s)), (100,))
        for s in (None, [packed, packed, {}])
    )
    assert (stored.parameters, stored.active_parameters) == (plain.parameters, plain.active_parameters)
    experts, table = 2 * 8 * 3 * 64 * 32, 256 * 2
    assert plain.parameters - plain.active_parameters == experts * 6 // 8 + table + 256 * 64
    full, shared = (kind.attention_flops[0] for kind in plain.kinds)
    assert full - shared == 2 * config.index_n_heads * (config.index_head_dim + 1) * 25


def test_selections_and_heat_map(tmp_path):
    folder = trained_checkpoint("v32")
    text = (ROOT / "examples" / "demo" / "text.txt").read_text(encoding="utf-8")[:500]
    file = tmp_path / "selected.png"
    report = inspect_checkpoint(folder, text, heat_map=file)
    assert [selection.layer for selection in report.selections] == list(range(6))
    ids = np.asarray([Tokenizer(folder).encode(text)])
    exact = dsparse.from_pretrained(folder, dtype="float32").selections(ids)
    for selection, chosen in zip(report.selections, exact, strict=True):
        assert selection.indices == [sorted(i for i in row if i >= 0) for row in chosen[0].tolist()]
        for query, row in enumerate(selection.indices):
            assert len(row) == len(set(row)) == min(query + 1, 64) and row[-1] <= query
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "layer 5:" in str(report)


def test_windows_and_entries_of_v4(tmp_path):
    """Every query sees its window; entries end before it, all of them or top-k; the picture shows both."""
    folder, file = trained_checkpoint("v4"), tmp_path / "selected.png"
    text = (ROOT / "examples" / "demo" / "text.txt").read_text(encoding="utf-8")[:700]
    report = inspect_checkpoint(folder, text, heat_map=file)
    config, length = ModelConfig.from_huggingface(folder), len(report.tokens)
    assert length > 4 * config.index_topk and [s.layer for s in report.selections] == list(range(6))
    for spec, selection in zip(config.layers, report.selections, strict=True):
        shades = attended(selection)
        for query, row in enumerate(selection.indices):
            visible = (query + 1) // spec.compress_rate
            assert len(set(row)) == min(visible, spec.index_topk or visible) and set(row) <= set(range(visible))
            near = slice(max(0, query - 63), query + 1)
            covered = {t for e in row for t in range(e * spec.compress_rate, (e + 1) * spec.compress_rate)}
            assert (shades[query, near] == 1).all() and (shades[query, query + 1 :] == 0).all()
            assert set(np.flatnonzero(shades[query])) == covered | set(range(length)[near])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "layer 0 (window of 64, entries of 32): all" in str(report)
    assert "layer 3 (window of 64, entries of 4): " in str(report)


def test_shared_layers_show_what_they_share():
    config = ModelConfig.tiny("deepseek_v32", indexer_types=["full", "shared", "full"])
    rows = [np.array([[0, -1], [1, 0]]), None, np.array([[0, -1], [0, 1]])]
    found = list(layer_selections(config, rows, 2))
    assert [(s.layer, s.shared_from, s.indices) for s in found] == [
        (0, None, [[0], [0, 1]]), (1, 0, [[0], [0, 1]]), (2, None, [[0], [0, 1]]),
    ]  # fmt: skip


def test_no_selection_is_said():
    with pytest.raises(dsparse.DsparseError, match="nothing to draw"):
        inspect_checkpoint(DEMO, "A short text.", heat_map="unused.png")
