"""Generation: sampling, stopping, chunks, buckets, compilations, callbacks, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsparse
from dsparse import generation
from dsparse.sampling import make_sampling, sample


@pytest.fixture(scope="module")
def model():
    return dsparse.Model(dsparse.ModelConfig.tiny("deepseek_v3", initializer_range=0.2), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(2, 256, (3, 90)).astype(np.int32)


def test_greedy_equals_repeated_full_passes(model, prompts):
    tokens = prompts
    for _ in range(5):
        tokens = np.concatenate([tokens, np.argmax(model(tokens)[:, -1:], axis=-1)], axis=1)
    np.testing.assert_array_equal(dsparse.generate(model, prompts, max_new_tokens=5, stop_tokens=()), tokens[:, 90:])


def test_prefill_in_chunks_changes_nothing(model, prompts, monkeypatch):
    lengths = [90, 33, 1]
    whole = dsparse.generate(model, prompts, lengths=lengths, max_new_tokens=10, stop_tokens=())
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 32)
    chunked = dsparse.generate(model, prompts, lengths=lengths, max_new_tokens=10, stop_tokens=())
    np.testing.assert_array_equal(whole, chunked)


def test_padding_content_does_not_matter(model, prompts):
    lengths = [40, 20, 3]
    other = prompts.copy()
    for row, length in enumerate(lengths):
        other[row, length:] = 7
    ours = [dsparse.generate(model, p, lengths=lengths, max_new_tokens=8, stop_tokens=()) for p in (prompts, other)]
    np.testing.assert_array_equal(*ours)


def test_a_list_may_hold_prompts_of_different_lengths(model, prompts):
    rows = [prompts[0, :9].tolist(), prompts[1, :4].tolist()]
    filled = np.array([rows[0], rows[1] + [7] * 5])
    together = dsparse.generate(model, rows, max_new_tokens=6, stop_tokens=())
    np.testing.assert_array_equal(
        together, dsparse.generate(model, filled, lengths=[9, 4], max_new_tokens=6, stop_tokens=())
    )


def test_stops_and_fills(model, prompts):
    free = dsparse.generate(model, prompts, max_new_tokens=12, stop_tokens=())
    stop = int(free[0, 4])
    out = dsparse.generate(model, prompts, max_new_tokens=12, stop_tokens=[stop])
    for row, expected in zip(out, free, strict=True):
        end = np.flatnonzero(expected == stop)
        if end.size:
            np.testing.assert_array_equal(row[: end[0] + 1], expected[: end[0] + 1])
            assert set(row[end[0] + 1 :]) <= {stop}  # the config has no pad token
        else:
            np.testing.assert_array_equal(row, expected)


def test_callback_sees_every_token(model, prompts):
    seen = []
    out = dsparse.generate(
        model, prompts, max_new_tokens=6, stop_tokens=(), on_token=lambda tokens, finished: seen.append(tokens)
    )
    np.testing.assert_array_equal(np.stack(seen, axis=1), out)


def test_sampling_is_reproducible_and_independent_of_the_batch(model, prompts):
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3, "stop_tokens": ()}
    first, again = (dsparse.generate(model, prompts, **options) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, dsparse.generate(model, prompts, **options | {"seed": 4}))
    np.testing.assert_array_equal(first[:1], dsparse.generate(model, prompts[:1], **options))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.01}, {0}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.55}, {0, 1}),
    ],
)
def test_filters_keep_the_right_tokens(options, kept):
    probability = jnp.array([0.45, 0.25, 0.15, 0.1, 0.05])
    logits = jnp.broadcast_to(jnp.log(probability), (4000, 5))
    sampling = make_sampling(1.0, options.get("top_k"), options.get("top_p"), options.get("min_p"))
    drawn = np.asarray(sample(logits, sampling, jax.random.split(jax.random.key(0), 4000)))
    assert set(drawn.tolist()) == kept
    expected = np.array([float(p) if i in kept else 0.0 for i, p in enumerate(probability)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 4000, expected / expected.sum(), atol=0.03)


def test_similar_shapes_share_one_compilation(model, prompts):
    dsparse.generate(model, prompts[:, :70], max_new_tokens=20, stop_tokens=())
    before = generation._decode._cache_size(), generation._prefill_chunk._cache_size()
    for length, new in ((66, 17), (80, 28), (90, 9)):
        dsparse.generate(model, prompts[:, :length], max_new_tokens=new, temperature=0.0, stop_tokens=())
    assert (generation._decode._cache_size(), generation._prefill_chunk._cache_size()) == before


def test_cache_holds_latents_only(model):
    config = model.config
    arrays = jax.tree.leaves(model.init_cache(2, 64))
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert sum(a.size for a in arrays) == config.num_hidden_layers * 2 * 64 * width


def test_causality_by_gradient(model, prompts):
    """No output depends on a later token's embedding: through packing, too, none on another segment's."""
    graphdef, state = nnx.split(model)
    path = ("embed_tokens", "weight")
    segments = jnp.repeat(jnp.array([1, 2]), jnp.array([10, 14]), total_repeat_length=24)[None]

    def outputs(embeddings):
        arrays = [(p, v.replace(embeddings) if p == path else v) for p, v in nnx.to_flat_state(state)]
        merged = nnx.merge(graphdef, nnx.from_flat_state(arrays))  # token i is row i of the embeddings
        return merged.hidden_states(jnp.arange(24)[None], segment_ids=segments)[0][0].sum(axis=-1)

    jacobian = np.asarray(jax.jacrev(outputs)(model.embed_tokens.weight[...]))[:, :24]
    reach = np.abs(jacobian).sum(axis=-1) > 0
    same = np.asarray(segments[0])[:, None] == np.asarray(segments[0])[None]
    np.testing.assert_array_equal(reach, np.tril(same))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [[1, 300]]}, "token id 300 at row 0, position 1"),
        ({"tokens": [[1, -2]]}, "token id -2"),
        ({"tokens": np.zeros((1, 0), np.int32)}, "lengths must be 1 numbers from 1"),
        ({"tokens": [[1, 2]], "lengths": [3]}, "lengths must be"),
        ({"tokens": np.array([[1.5]])}, "must be integers"),
        ({"tokens": np.array([1, 2])}, "must be integers of shape"),
        ({"tokens": [[1]], "temperature": -1.0}, "temperature -1.0 is out of range"),
        ({"tokens": [[1]], "temperature": 1.0, "top_p": 0.0}, "top_p 0.0 is out of range"),
        ({"tokens": [[1]], "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_input_is_named(model, options, message):
    with pytest.raises(dsparse.DsparseError, match=message):
        dsparse.generate(model, **options)
