"""Architectures nobody published: any mixer in any layer, any top-k per layer, shared indexers in any family."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsparse
from dsparse import ops
from dsparse.training import TrainConfig, make_train_step
from dsparse.training.data import Batch

MLA, DSA, WINDOW = "full_attention", "indexed_attention", "sliding_attention"
CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
FULL, SHARED = "full", "shared"
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 48}
WINDOWED = {
    "head_dim": 32, "sliding_window": 8, "o_groups": 2, "o_lora_rank": 24, "index_n_heads": 2, "index_head_dim": 16,
    "compress_rates": {CSA: 4, HCA: 16},
}  # fmt: skip
VARIATIONS = {
    "v4: every mixer, dense and hashed experts, a top-k for each layer": ("deepseek_v4", LATENT | {
        "num_hidden_layers": 5, "layer_types": [MLA, CSA, DSA, HCA, WINDOW], "index_topk": [1, 5, 7, 1, 1],
        "mlp_layer_types": ["dense", "moe", "hash_moe", "dense", "moe"]}),
    "v4: entries shared beside tokens shared": ("deepseek_v4", LATENT | {
        "num_hidden_layers": 5, "layer_types": [CSA, DSA, CSA, DSA, CSA], "index_topk": [3, 6, 3, 3, 5],
        "indexer_types": [FULL, FULL, SHARED, SHARED, FULL], "mlp_layer_types": ["moe"] * 5}),
    "v4: sharing in a scanned pattern": ("deepseek_v4", {
        "num_hidden_layers": 6, "layer_types": [CSA, CSA, HCA] * 2, "indexer_types": [FULL, SHARED, FULL] * 2,
        "mlp_layer_types": ["moe"] * 6}),
    "v3: windows and entries, plain residual": ("deepseek_v3", WINDOWED | {
        "num_hidden_layers": 4, "layer_types": [MLA, CSA, HCA, WINDOW], "index_topk": 3}),
    "v3: indexers added, shared, a top-k for each": ("deepseek_v3", {
        "num_hidden_layers": 6, "index_topk": [6, 6, 6, 12, 12, 12], "index_n_heads": 2, "index_head_dim": 16,
        "layer_types": [DSA, MLA, DSA] * 2, "indexer_types": [FULL, FULL, SHARED] * 2, "q_lora_rank": None}),
    "v2: indexers added": ("deepseek_v2", {
        "num_hidden_layers": 3, "layer_types": [DSA, DSA, MLA], "index_topk": 5, "index_n_heads": 2,
        "index_head_dim": 8, "indexer_types": [FULL, SHARED, FULL]}),
    "glm-5: a top-k for each layer": ("glm_moe_dsa", {"num_hidden_layers": 3, "index_topk": [4, 9, 17]}),
}  # fmt: skip


@functools.cache
def model_of(name: str) -> dsparse.Model:
    family, options = VARIATIONS[name]
    config = dsparse.ModelConfig.tiny(family, initializer_range=0.1, **options)
    return dsparse.Model(config, rngs=nnx.Rngs(0))


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 256, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("name", VARIATIONS)
def test_pieces_equal_one_pass_and_segments_single_sequences(name):
    model, tokens = model_of(name), random_tokens(2, 60)
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state, tokens, start, cache):
        merged = nnx.merge(graphdef, state)
        positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, cache, _ = merged.hidden_states(tokens, positions, cache=cache)
        return merged.logits(hidden), cache

    whole, cache = np.asarray(model(tokens)), model.init_cache(2, 64)
    for start, stop in itertools.pairwise((0, 25, 30, 35, 60)):
        logits, cache = step(state, tokens[:, start:stop], start, cache)
        np.testing.assert_allclose(logits, whole[:, start:stop], atol=1e-4)
    packed = np.concatenate([tokens[:1, :23], tokens[1:, :37]], axis=1)
    logits = model(packed, segment_ids=np.repeat([[1, 2]], [23, 37], axis=1).astype(np.int32))
    np.testing.assert_allclose(logits, np.concatenate([whole[:1, :23], whole[1:, :37]], axis=1), atol=1e-4)


@pytest.mark.parametrize("name", VARIATIONS)
def test_generates_what_the_uncached_model_chooses(name):
    model, prompt = model_of(name), random_tokens(2, 30, seed=1)
    new = dsparse.generate(model, prompt, max_new_tokens=30, stop_tokens=())
    logits = model(np.concatenate([prompt, new], axis=1))
    np.testing.assert_array_equal(new, np.argmax(logits[:, 29:-1], axis=-1))


@pytest.mark.parametrize("name", VARIATIONS)
def test_trains_and_is_read_back(name, tmp_path):
    """Every parameter but the indexers' gets a gradient; what is saved loads as the same model."""
    model, tokens = model_of(name), random_tokens(2, 61, seed=2)
    dsparse.save_pretrained(model, tmp_path / "saved")
    loaded = dsparse.from_pretrained(tmp_path / "saved", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
    options = {"model": "-", "data": ("-",), "batch_size": 2, "sequence_length": 60, "steps": 2, "learning_rate": 1e-3}
    state, step = make_train_step(loaded, TrainConfig(**options))
    before = {name: np.asarray(value) for name, value in state.params.items()}
    state, metrics = step(state, Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, 60)), np.ones((2, 60), np.int32)))
    assert metrics["finite"] and not any("indexer" in name for name in state.params)
    assert [name for name, value in state.params.items() if np.array_equal(value, before[name])] == []


def test_shared_layers_attend_to_the_entries_of_the_last_full_one(monkeypatch):
    seen, attend = [], ops.window_attention

    def recorded(q, kv, entries, **options):
        if entries is not None and entries.indices is not None:
            jax.debug.callback(lambda value: seen.append(np.asarray(value)), entries.indices, ordered=True)
        return attend(q, kv, entries, **options)

    monkeypatch.setattr(ops, "window_attention", recorded)
    jax.clear_caches()
    model, tokens = model_of("v4: sharing in a scanned pattern"), random_tokens(1, 60)
    selections = model.selections(tokens)
    jax.effects_barrier()
    jax.clear_caches()
    assert [s is not None for s in selections] == [True, False, False] * 2
    assert not np.array_equal(selections[0], selections[3])
    for found, layer in zip(seen, (0, 0, 3, 3), strict=True):
        np.testing.assert_array_equal(found, selections[layer])


def test_depth_is_not_traced():
    """Shared and full layers that alternate are one scanned pattern, whatever the depth."""

    def equations(depth):
        config = dsparse.ModelConfig.tiny(
            "deepseek_v4", num_hidden_layers=depth, layer_types=[CSA] * depth, mlp_layer_types=["moe"] * depth,
            indexer_types=[FULL, SHARED] * (depth // 2),
        )  # fmt: skip
        graphdef, state = nnx.split(nnx.eval_shape(lambda: dsparse.Model(config, rngs=nnx.Rngs(0))))
        traced = jax.make_jaxpr(lambda s, t: nnx.merge(graphdef, s)(t))(state, jax.ShapeDtypeStruct((1, 64), jnp.int32))
        return len(str(traced))

    assert equations(40) < 1.05 * equations(10)
