"""DeepSeek-V4 against transformers: windows, compressed entries, indexer, hyper-connections, hash routers, caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from support import load_transformers, sample_text_tokens, trained_checkpoint
from v4_models import model_of, random_reference, stable_topk

import dsparse
from dsparse import ops, reference
from dsparse.banded import Entries
from dsparse.hyper import sinkhorn

VARIATIONS = {
    "defaults": {},
    "one kind of layer": {
        "layer_types": ["compressed_sparse_attention"] * 3,
        "num_hidden_layers": 3,
        "mlp_layer_types": None,
    },
    "windows only": {"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2, "mlp_layer_types": ["moe"] * 2},
    "four streams, no shared experts' clamp in reach": {"hc_mult": 4, "hc_sinkhorn_iters": 20, "swiglu_limit": 1e4},
    "other rates": {
        "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 7},
        "index_topk": 2,
    },
    "sigmoid router, always normalized": {
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 1.0,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "half a head rotated": {"partial_rotary_factor": 0.5, "qk_rope_head_dim": 16, "rope_parameters": None},
    "whole head rotated": {
        "partial_rotary_factor": None,
        "qk_rope_head_dim": None,
        "index_head_dim": 32,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 1.0}
            for kind, theta in (("main", 300.0), ("compress", 5000.0))
        },
    },
    "window of one": {"sliding_window": 1, "o_groups": 4},
    "top-k beyond the entries": {"index_topk": 64},
}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    stable_topk(monkeypatch)


@functools.cache
def default_models():
    reference_model = random_reference()
    return reference_model, model_of(reference_model)


def random_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, length)).astype(np.int32)


def reference_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


def reference_continuation(model, prompt, count):
    """Greedy tokens of transformers with its cache, running on after the end token."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(torch.tensor(prompt).long(), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[:, prompt.shape[1] :].numpy()


@pytest.mark.parametrize("variation", VARIATIONS)
def test_logits_equal_transformers(variation):
    reference_model = random_reference(seed=2, **VARIATIONS[variation])
    tokens = random_tokens(2, 75)
    ours = model_of(reference_model)(tokens)
    np.testing.assert_allclose(ours, reference_logits(reference_model, tokens), atol=1e-4)


@pytest.mark.parametrize("length", [1, 3, 4, 15, 300])
def test_logits_at_lengths_around_a_window(length):
    reference_model, model = default_models()
    tokens = random_tokens(2, length)
    np.testing.assert_allclose(model(tokens), reference_logits(reference_model, tokens), atol=1e-4)


def test_trained_checkpoint_equals_transformers():
    folder = trained_checkpoint("v4")
    reference_model = load_transformers(folder)
    model = dsparse.from_pretrained(folder, dtype="float32")
    tokens = sample_text_tokens(folder, 1, 512)  # top-k 32 of 128 entries, window 64
    np.testing.assert_allclose(model(tokens), reference_logits(reference_model, tokens), atol=1e-4)
    prompt, count = tokens[:, :100], 40
    ours = dsparse.generate(model, prompt, max_new_tokens=count, stop_tokens=())
    np.testing.assert_array_equal(ours, reference_continuation(reference_model, prompt, count))


def test_chosen_entries_equal_transformers(monkeypatch):
    """The same index sets in every indexed layer, well beyond top-k."""
    reference_model, model = default_models()
    theirs, ours = [], []
    for layer in reference_model.model.layers:
        if hasattr(layer.self_attn.compressor, "indexer"):
            layer.self_attn.compressor.indexer.register_forward_hook(
                lambda module, args, out: theirs.append(out.numpy())
            )
    choose = ops.indexer_topk

    def recorded(*args, **options):
        chosen = choose(*args, **options)
        jax.debug.callback(lambda value: ours.append(np.asarray(value)), chosen, ordered=True)
        return chosen

    monkeypatch.setattr(ops, "indexer_topk", recorded)
    jax.clear_caches()
    tokens = random_tokens(2, 130)
    reference_logits(reference_model, tokens)
    jax.block_until_ready(model(tokens))
    jax.effects_barrier()
    jax.clear_caches()
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.sort(a, axis=-1), np.sort(b, axis=-1))


@functools.partial(jax.jit, static_argnums=0)
def run_chunk(graphdef, state, cache, tokens, start):
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache, _ = model.hidden_states(tokens, positions, cache=cache)
    return model.logits(hidden), cache


def cached_logits(model, tokens, cuts, cache):
    graphdef, state = nnx.split(model)
    parts, start = [], 0
    for end in (*cuts, tokens.shape[1]):
        logits, cache = run_chunk(graphdef, state, cache, tokens[:, start:end], start)
        parts.append(logits)
        start = end
    return np.concatenate(parts, axis=1), cache


@functools.cache
def shallow_model():
    """One layer of each kind."""
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    return model_of(
        random_reference(num_hidden_layers=3, layer_types=kinds, mlp_layer_types=["hash_moe", "moe", "moe"])
    )


def test_any_split_into_chunks_gives_the_same_result():
    """Property over random splits; chunk lengths are drawn from a few, so that few shapes compile."""
    model = shallow_model()
    tokens = random_tokens(2, 110, seed=3)
    whole = np.asarray(model(tokens))
    random = np.random.default_rng(0)
    for _ in range(12):
        cuts = np.cumsum(random.choice([1, 3, 8, 17], size=40))
        *cuts, end = cuts[cuts <= tokens.shape[1]].tolist()
        logits, _ = cached_logits(model, tokens[:, :end], cuts, model.init_cache(2, 112))
        np.testing.assert_allclose(logits, whole[:, :end], atol=1e-4)


def test_long_continuation_one_by_one():
    """Ring, open windows and entries wrap around many times: window 8, rates 4 and 16, 120 tokens."""
    model = shallow_model()
    tokens = random_tokens(1, 120, seed=4)
    logits, _ = cached_logits(model, tokens, range(20, 120), model.init_cache(1, 128))
    np.testing.assert_allclose(logits, model(tokens), atol=1e-4)


def test_rejected_drafts_can_be_replaced():
    """Up to 8 newest tokens may be written again with other tokens, at any point of the windows."""
    model = shallow_model()
    graphdef, state = nnx.split(model)
    tokens = random_tokens(1, 72, seed=5)
    whole = np.asarray(model(tokens))
    _, cache = cached_logits(model, tokens[:, :21], (), model.init_cache(1, 80))
    for start in range(21, 64, 7):
        _, cache = run_chunk(graphdef, state, cache, random_tokens(1, 8, seed=start), start)
        logits, cache = run_chunk(graphdef, state, cache, tokens[:, start : start + 8], start)
        np.testing.assert_allclose(logits, whole[:, start : start + 8], atol=1e-4)


def test_generation_equals_uncached_and_ragged_rows_equal_single_ones():
    reference_model, model = default_models()
    tokens = random_tokens(3, 37, seed=6)
    lengths, count = [37, 5, 16], 40
    together = dsparse.generate(model, tokens, lengths=lengths, max_new_tokens=count, stop_tokens=())
    for row, length in enumerate(lengths):
        theirs = reference_continuation(reference_model, tokens[row : row + 1, :length], count)
        np.testing.assert_array_equal(together[row], theirs[0])
        logits = model(np.concatenate([tokens[row, :length], together[row]])[None])
        np.testing.assert_array_equal(together[row], np.argmax(logits[0, length - 1 : -1], axis=-1))


def test_packed_segments_and_left_padding_equal_single_sequences():
    _, model = default_models()
    lengths = [5, 33, 1, 40, 16]
    tokens = random_tokens(1, sum(lengths), seed=7)
    segments = np.repeat(np.arange(len(lengths)), lengths)[None]
    packed = np.asarray(model(tokens, segment_ids=segments))
    start = 0
    for length in lengths:
        alone = model(tokens[:, start : start + length])
        np.testing.assert_allclose(packed[:, start : start + length], alone, atol=1e-4)
        padded = np.pad(tokens[:, start : start + length], ((0, 0), (50 - length, 0)))
        padded = model(padded, segment_ids=(np.arange(50) >= 50 - length)[None].astype(np.int32))
        np.testing.assert_allclose(padded[:, 50 - length :], alone, atol=1e-4)
        start += length


def test_causal_by_gradients():
    """No gradient flows from a query's output to a later token's embedding, nor across segments."""
    _, model = default_models()
    graphdef, state = nnx.split(model)
    tokens, probe = random_tokens(1, 60, seed=8), 41

    def output(embeddings, segments):
        flat = dict(nnx.to_flat_state(state))
        name = ("embed_tokens", "weight")
        model = nnx.merge(graphdef, nnx.from_flat_state(list((flat | {name: flat[name].replace(embeddings)}).items())))
        hidden, _, _ = model.hidden_states(jnp.arange(60)[None], segment_ids=segments)
        return jnp.sum(hidden[0, probe] ** 2)

    gradient = jax.jit(jax.grad(output))
    embeddings = model.embed_tokens.weight[...][jnp.pad(tokens[0], (0, 196))]
    for segments, first in ((None, 0), (jnp.asarray(np.arange(60)[None] >= 23, jnp.int32), 23)):
        size = np.abs(np.asarray(gradient(embeddings, segments))[:60]).max(axis=-1)
        assert np.all(size[probe + 1 :] == 0) and np.all(size[:first] == 0)
        assert np.all(size[probe - 7 : probe + 1] > 0)  # the window of 8
        assert np.count_nonzero(size[first : probe - 7]) > 0  # through entries


@pytest.mark.parametrize("indexed", [False, True])
def test_window_attention_and_its_gradients_equal_a_dense_mask(indexed):
    random = np.random.default_rng(9)
    batch, time, heads, width, window, rate = 2, 150, 3, 16, 8, 4
    q, kv = (
        jnp.asarray(random.normal(size=s), jnp.float32) for s in ((batch, time, heads, width), (batch, time, width))
    )
    rows = jnp.asarray(random.normal(size=(batch, time // rate, width)), jnp.float32)
    sinks = jnp.asarray(random.normal(size=heads), jnp.float32)
    last = jnp.broadcast_to((jnp.arange(time) + 1) // rate, (batch, time))
    indices = None
    seen = jnp.arange(rows.shape[1]) < last[..., None]
    if indexed:
        scores = jnp.where(seen, jnp.asarray(random.normal(size=seen.shape)), -jnp.inf)
        indices = reference.topk(scores.reshape(-1, rows.shape[1]), 5).reshape(batch, time, 5)
        seen = jnp.any(jax.nn.one_hot(indices, rows.shape[1], dtype=bool), axis=2)
    offset = jnp.arange(time)[:, None] - jnp.arange(time)
    near = jnp.broadcast_to((offset >= 0) & (offset < window), (batch, time, time))

    def dense(q, kv, rows, sinks):
        keys = jnp.concatenate([kv, rows], axis=1)
        keep = jnp.concatenate([near, seen], axis=-1)
        logits = jnp.where(keep[:, :, None], jnp.einsum("BTNH,BSH->BTNS", q, keys) * 0.3, -jnp.inf)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[:, None], (*logits.shape[:3], 1))], axis=-1)
        return jnp.einsum("BTNS,BSH->BTNH", jax.nn.softmax(logits, axis=-1)[..., :-1], keys)

    def sparse(q, kv, rows, sinks):
        padded = jnp.pad(kv, ((0, 0), (window - 1, 0), (0, 0)))
        entries = Entries(rows, jnp.zeros_like(last), last, indices)
        start = jnp.full(batch, window - 1)
        return ops.window_attention(q, padded, entries, window=window, scale=0.3, sinks=sinks, start=start)

    weight = jnp.asarray(random.normal(size=q.shape), jnp.float32)
    results = [
        jax.value_and_grad(lambda *a, f=f: jnp.sum(f(*a) * weight), (0, 1, 2, 3))(q, kv, rows, sinks)
        for f in (dense, sparse)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), *results)


def test_sinkhorn_is_doubly_stochastic_and_equals_plain_iteration():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4)) * 2, jnp.float32)
    plain = jax.nn.softmax(logits, axis=-1) + 1e-6
    for iteration in range(20):
        if iteration:
            plain = plain / (plain.sum(axis=-1, keepdims=True) + 1e-6)
        plain = plain / (plain.sum(axis=-2, keepdims=True) + 1e-6)
    result = sinkhorn(logits, 20, 1e-6)
    np.testing.assert_allclose(result, plain, atol=1e-5)
    np.testing.assert_allclose(result.sum(axis=-2), 1, atol=1e-4)
    np.testing.assert_allclose(result.sum(axis=-1), 1, atol=1e-2)


def test_depth_is_not_traced():
    """Layers that alternate are one scanned pattern: as many equations at 42 layers as at 10."""

    def equations(depth):
        kinds = [("compressed_sparse_attention", "heavily_compressed_attention")[i % 2] for i in range(depth)]
        config = dsparse.ModelConfig.tiny(
            "deepseek_v4", num_hidden_layers=depth, layer_types=kinds, mlp_layer_types=["moe"] * depth
        )
        graphdef, state = nnx.split(nnx.eval_shape(lambda: dsparse.Model(config, rngs=nnx.Rngs(0))))
        tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
        return len(str(jax.make_jaxpr(lambda s, t: nnx.merge(graphdef, s)(t))(state, tokens)))

    assert equations(42) < 1.05 * equations(10)


PUBLISHED = {
    "model_type": "deepseek_v4", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "head_dim": 32, "qk_rope_head_dim": 8, "q_lora_rank": 48, "o_groups": 2, "o_lora_rank": 24, "sliding_window": 8,
    "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "compress_ratios": [0, 0, 4, 128, 0], "num_hash_layers": 1,
    "compress_rope_theta": 160000, "rope_theta": 10000, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16", "max_position_embeddings": 4096,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 256, "beta_fast": 32},
}  # fmt: skip


def test_published_spelling_of_the_config():
    config = dsparse.ModelConfig.from_huggingface(PUBLISHED)
    assert config.layer_types == (
        "sliding_attention", "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
    )  # fmt: skip
    assert config.mlp_layer_types == ("hash_moe", "sparse", "sparse", "sparse")
    assert [spec.compress_rate for spec in config.layers] == [0, 0, 4, 128]
    assert config.qk_rope_head_dim == 8 and config.rope_parameters.rope_theta == 10000
    compress = config.compress_rope_parameters
    assert (compress.rope_type, compress.rope_theta, compress.factor, compress.attention_factor) == (
        "yarn",
        160000,
        16,
        1.0,
    )
    assert config.mtp_layers[0].mixer == "sliding_attention"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_ratios": [0, 0, 5, 128]}, "compress_ratios: 5"),
        ({"o_groups": 3}, "o_groups"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"compress_rates": {"compressed_sparse_attention": 0, "heavily_compressed_attention": 8}}, "compress_rates"),
        ({"qk_rope_head_dim": 64}, "qk_rope_head_dim"),
        ({"index_topk": None}, "index_topk"),
    ],
)
def test_inconsistent_config_is_refused_by_name(change, message):
    with pytest.raises(dsparse.DsparseError, match=message):
        dsparse.ModelConfig.from_huggingface(PUBLISHED | change)
