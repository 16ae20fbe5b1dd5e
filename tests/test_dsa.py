"""DeepSeek-V3.2 and GLM-5 against transformers, with sequences well beyond top-k."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from reference_models import random_pair, reference_continuation, reference_logits, stable_topk
from support import load_transformers, sample_text_tokens, trained_checkpoint

import dsparse

TOLERANCE = 1e-4
SCORE_NOISE = 1e-6  # scores are of order 0.05 to 1: closer ones are ties in float32
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0,
    "mscale_all_dim": 1.0,
}  # fmt: skip
VARIANTS = {
    "v32-yarn": ("deepseek_v32", {"rope_parameters": YARN}),
    "v32-biases": (
        "deepseek_v32",
        {"attention_bias": True, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "v32-tied": (
        "deepseek_v32",
        {"tie_word_embeddings": True, "index_topk": 17, "index_n_heads": 3, "index_head_dim": 8},
    ),
    "v32-dense-mlp": ("deepseek_v32", {"mlp_layer_types": ["sparse", "dense", "dense"]}),
    "glm-full": ("glm_moe_dsa", {}),
    "glm-every-third": ("glm_moe_dsa", {"num_hidden_layers": 6, "index_topk_freq": 3}),
    "glm-offset": ("glm_moe_dsa", {"num_hidden_layers": 6, "index_topk_freq": 2, "index_skip_topk_offset": 3}),
    "glm-pattern": ("glm_moe_dsa", {"num_hidden_layers": 5, "index_topk_pattern": "FSFSS", "attention_bias": True}),
    "glm-listed": ("glm_moe_dsa", {"indexer_types": ["full", "shared", "shared"]}),
}


@pytest.fixture(autouse=True)
def ties_to_the_lowest():
    with stable_topk():
        yield


@pytest.fixture(scope="module", params=VARIANTS)
def random(request, tmp_path_factory):
    model_type, overrides = VARIANTS[request.param]
    return random_pair(tmp_path_factory.mktemp(request.param), model_type, **overrides)


@pytest.fixture(scope="module")
def trained():
    folder = trained_checkpoint("v32")
    return dsparse.from_pretrained(folder, dtype="float32"), load_transformers(folder), folder


def assert_pieces_equal_one_pass(model, tokens, cuts) -> None:
    """Through the cache in pieces, each checked against the uncached model."""

    @jax.jit
    def step(state, tokens, start, cache):
        merged = nnx.merge(graphdef, state)
        positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, cache, _ = merged.hidden_states(tokens, positions, cache=cache)
        return merged.logits(hidden), cache

    graphdef, state = nnx.split(model)
    whole, cache = np.asarray(model(tokens)), model.init_cache(len(tokens), tokens.shape[1] + 3)
    for start, stop in itertools.pairwise(cuts):
        logits, cache = step(state, tokens[:, start:stop], start, cache)
        np.testing.assert_allclose(logits, whole[:, start:stop], atol=TOLERANCE, rtol=0)


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 256, (rows, length)).astype(np.int32)


def indexers(reference) -> list[tuple[int, torch.nn.Module]]:
    layers = [(i, layer.self_attn.indexer) for i, layer in enumerate(reference.model.layers)]
    return [(i, indexer) for i, indexer in layers if indexer is not None]


def reference_selections(reference, tokens) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """transformers' indices and scores, by layer."""
    indices, scores, hooks = {}, {}, []
    stable = torch.Tensor.topk

    def topk(x, k, dim=-1, **options):
        if x.ndim == 3 and k == reference.config.index_topk:
            scores[len(indices)] = x.numpy().copy()
        return stable(x, k, dim, **options)

    for _, indexer in indexers(reference):
        hooks.append(indexer.register_forward_hook(lambda m, a, out: indices.__setitem__(len(indices), out.numpy())))
    torch.Tensor.topk = topk
    reference_logits(reference, tokens)
    torch.Tensor.topk = stable
    for hook in hooks:
        hook.remove()
    layer = [i for i, _ in indexers(reference)]
    return {layer[n]: a for n, a in indices.items()}, {layer[n]: a for n, a in scores.items()}


def differing_rows(model, reference, tokens) -> list[tuple[int, int, int, float]]:
    """(layer, row, query, distance) where the sets differ; distance between the scores of the exchanged tokens."""
    expected, scores = reference_selections(reference, tokens)
    found = []
    for layer, ours in enumerate(model.selections(tokens)):
        if layer not in expected:
            assert ours is None
            continue
        for row, query in np.ndindex(*tokens.shape):
            theirs = {int(i) for i in expected[layer][row, query] if i <= query}
            mine = {int(i) for i in ours[row, query] if i >= 0}
            assert len(mine) == len(theirs) == min(query + 1, ours.shape[-1])
            if mine != theirs:
                exchanged = scores[layer][row, query, sorted(mine ^ theirs)]
                found.append((layer, row, query, float(exchanged.max() - exchanged.min())))
    return found


def test_logits_of_random_models(random):
    model, reference = random
    tokens = random_tokens(2, 70)
    np.testing.assert_allclose(model(tokens), reference_logits(reference, tokens), atol=TOLERANCE, rtol=0)


def test_index_sets_of_random_models(random):
    model, reference = random
    assert differing_rows(model, reference, random_tokens(2, 70)) == []


@pytest.mark.parametrize("random", ["v32-yarn", "glm-every-third"], indirect=True)
def test_greedy_continuation_of_random_models(random):
    """Cached, through prefill and decode, beyond top-k; the reference is cached too."""
    model, reference = random
    tokens = random_tokens(2, 30)
    ours = dsparse.generate(model, tokens, max_new_tokens=40, stop_tokens=())
    np.testing.assert_array_equal(ours, reference_continuation(reference, tokens, 40))


def test_logits_of_trained_weights(trained):
    """A top-k boundary may lie between scores that float32 cannot tell apart; the tokens after one are not compared."""
    model, reference, folder = trained
    tokens = sample_text_tokens(folder, 3, 300)
    flips = differing_rows(model, reference, tokens)
    assert len(flips) <= 4 and all(distance < SCORE_NOISE for *_, distance in flips), flips
    end = [min([q for _, r, q, _ in flips if r == row], default=300) for row in range(3)]
    assert sum(end) > 600, "hardly anything left to compare: choose another text"
    ours, theirs = np.asarray(model(tokens)), reference_logits(reference, tokens)
    for row, stop in enumerate(end):
        np.testing.assert_allclose(ours[row, :stop], theirs[row, :stop], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prompt", [20, 200])
def test_greedy_continuation_of_trained_weights(trained, prompt):
    """Cached equals transformers' cached, and the uncached model's choice at every step."""
    model, reference, folder = trained
    tokens = sample_text_tokens(folder, 2, prompt)
    ours = dsparse.generate(model, tokens, max_new_tokens=90, stop_tokens=())
    np.testing.assert_array_equal(ours, reference_continuation(reference, tokens, 90))
    whole = np.asarray(model(np.concatenate([tokens, ours], axis=1)))
    np.testing.assert_array_equal(ours, whole[:, prompt - 1 : -1].argmax(-1))


def test_left_padding_equals_single_sequences(trained):
    model, _, folder = trained
    tokens = sample_text_tokens(folder, 1, 200)
    padded = np.concatenate([np.full((1, 37), 2, np.int32), tokens], axis=1)
    segments = (np.arange(237) >= 37).astype(np.int32)[None]
    np.testing.assert_allclose(model(padded, segment_ids=segments)[:, 37:], model(tokens), atol=TOLERANCE, rtol=0)


def test_packed_segments_equal_single_sequences(trained):
    model, _, folder = trained
    tokens = sample_text_tokens(folder, 1, 300)
    segments = np.repeat([1, 2, 3], [90, 150, 60])[None].astype(np.int32)
    logits = np.asarray(model(tokens, segment_ids=segments))
    for start, stop in ((0, 90), (90, 240), (240, 300)):
        np.testing.assert_allclose(logits[:, start:stop], model(tokens[:, start:stop]), atol=TOLERANCE, rtol=0)


def test_ragged_prompts_continue_like_single_ones(trained):
    model, _, folder = trained
    tokens = sample_text_tokens(folder, 3, 150)
    lengths = [150, 70, 9]
    together = dsparse.generate(model, tokens, lengths=lengths, max_new_tokens=12, stop_tokens=())
    for row, length in enumerate(lengths):
        alone = dsparse.generate(model, tokens[row : row + 1, :length], max_new_tokens=12, stop_tokens=())
        np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_causality_by_gradient(family):
    """No gradient reaches a later token; some reaches every earlier one (distinct tokens, so rows of the embedding)."""
    config = dsparse.ModelConfig.tiny(family, index_topk_freq=2)
    model = dsparse.Model(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).permutation(256)[:40].astype(np.int32)[None]
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def logit_sum(params, query):
        merged = nnx.merge(graphdef, params, rest)
        hidden, _, _ = merged.hidden_states(tokens)
        return jnp.sum(merged.logits(hidden)[0, query] ** 2)

    gradient = jax.jit(jax.grad(logit_sum))
    for query in (5, 20, 39):
        rows = np.abs(gradient(params, query)["embed_tokens"]["weight"][...])[tokens[0]].max(-1)
        assert (rows[query + 1 :] == 0).all()
        assert rows[query] > 0 and np.count_nonzero(rows) > min(query, config.index_topk)


def test_transformers_reads_the_same_indexer_types():
    for spelling in (
        {"index_topk_freq": 3}, {"index_topk_freq": 4, "index_skip_topk_offset": 5}, {"index_topk_pattern": "FFSSFSFS"},
        {"index_topk_pattern": ["full", "shared"] * 4}, {"indexer_types": ["full", "full"] + ["shared"] * 6}, {},
    ):  # fmt: skip
        config = dsparse.ModelConfig.tiny("glm_moe_dsa", num_hidden_layers=8, **spelling)
        theirs = transformers.AutoConfig.for_model("glm_moe_dsa", num_hidden_layers=8, **spelling)
        assert list(config.indexer_types) == theirs.indexer_types


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"index_topk": 0}, "index_topk must be a positive integer, found 0"),
        ({"index_topk": [8, 8]}, "index_topk lists 2 layers, num_hidden_layers is 3"),
        ({"indexer_types": ["shared", "full", "full"]}, "layer 0 is shared, but no full layer comes before it"),
        ({"indexer_types": ["full", "none", "full"]}, "indexer_types: 'none' is not supported"),
        ({"index_head_dim": 4}, "index_head_dim (4) is smaller than qk_rope_head_dim (8)"),
        ({"layer_types": ["full_attention", "linear", "linear"]}, "layer_types: 'linear' is not supported"),
    ],
)
def test_contradictions_are_named(overrides, message):
    with pytest.raises(dsparse.DsparseError) as error:
        dsparse.ModelConfig.tiny("glm_moe_dsa", **overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(("family", "options"), [("deepseek_v32", {}), ("glm_moe_dsa", {"index_topk_freq": 2})])
def test_any_pieces_equal_one_pass(family, options):
    """One token, fewer than top-k, more than top-k; beginning before and beyond top-k."""
    model = dsparse.Model(dsparse.ModelConfig.tiny(family, initializer_range=0.1, **options), rngs=nnx.Rngs(0))
    tokens = random_tokens(2, 60)
    assert_pieces_equal_one_pass(model, tokens, [0, 1, 5, 25, 26, 46, 50, 51, 52, 56, 60])


@pytest.mark.parametrize("options", [{}, {"index_topk_freq": 4, "index_skip_topk_offset": 3}])
def test_depth_costs_no_tracing(options):
    """The program of a deep model is as long as that of one a third as deep."""

    def equations(depth: int) -> int:
        config = dsparse.ModelConfig.tiny("glm_moe_dsa", num_hidden_layers=depth, first_k_dense_replace=3, **options)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: dsparse.Model(config, rngs=nnx.Rngs(0))))
        tokens = jax.ShapeDtypeStruct((1, 40), jnp.int32)
        traced = jax.make_jaxpr(lambda s, t: nnx.merge(graphdef, s).hidden_states(t)[0])(state, tokens)
        return str(traced).count(" = ")

    assert equations(39) <= 1.1 * equations(15)
