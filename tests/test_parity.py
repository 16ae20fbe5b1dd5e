"""Against transformers, on trained weights in float32."""

import numpy as np
import pytest
import torch
from support import load_transformers, sample_text_tokens, trained_checkpoint

import dsparse

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["demo", "v3"])
def pair(request):
    folder = trained_checkpoint(request.param)
    return dsparse.from_pretrained(folder, dtype="float32"), load_transformers(folder), folder


def reference_logits(reference, tokens, **options):
    with torch.no_grad():
        return reference(torch.tensor(tokens).long(), **options).logits.numpy()


def reference_continuation(reference, tokens, new):
    with torch.no_grad():
        out = reference.generate(torch.tensor(tokens).long(), max_new_tokens=new, do_sample=False, eos_token_id=None)
    return out[:, tokens.shape[1] :].numpy()


def test_logits_equal(pair):
    model, reference, folder = pair
    tokens = sample_text_tokens(folder, 2, 700)
    np.testing.assert_allclose(model(tokens), reference_logits(reference, tokens), atol=TOLERANCE, rtol=0)


def test_left_padding_equals_single_sequences(pair):
    model, reference, folder = pair
    tokens = sample_text_tokens(folder, 1, 200)
    padded = np.concatenate([np.full((1, 37), 2, np.int32), tokens], axis=1)
    segments = (np.arange(237) >= 37).astype(np.int32)[None]
    logits = model(padded, segment_ids=segments)[:, 37:]
    np.testing.assert_allclose(logits, reference_logits(reference, tokens), atol=TOLERANCE, rtol=0)


def test_packed_segments_equal_single_sequences(pair):
    model, reference, folder = pair
    tokens = sample_text_tokens(folder, 1, 300)
    segments = np.repeat([1, 2, 3], [90, 150, 60])[None].astype(np.int32)
    logits = np.asarray(model(tokens, segment_ids=segments))
    for start, stop in ((0, 90), (90, 240), (240, 300)):
        alone = reference_logits(reference, tokens[:, start:stop])
        np.testing.assert_allclose(logits[:, start:stop], alone, atol=TOLERANCE, rtol=0)


def test_greedy_continuation_is_identical(pair):
    model, reference, folder = pair
    tokens = sample_text_tokens(folder, 3, 130)
    ours = dsparse.generate(model, tokens, max_new_tokens=48, stop_tokens=())
    np.testing.assert_array_equal(ours, reference_continuation(reference, tokens, 48))


def test_ragged_prompts_continue_like_single_ones(pair):
    model, reference, folder = pair
    tokens = sample_text_tokens(folder, 4, 150)
    lengths = [150, 9, 64, 1]
    ours = dsparse.generate(model, tokens, lengths=lengths, max_new_tokens=12, stop_tokens=())
    for row, length in enumerate(lengths):
        expected = reference_continuation(reference, tokens[row : row + 1, :length], 12)
        np.testing.assert_array_equal(ours[row], expected[0])


def test_cached_equals_uncached(pair):
    """Token by token through the absorbed path, against one pass through the expanded path."""
    model, _, folder = pair
    tokens = sample_text_tokens(folder, 2, 40)
    whole = np.asarray(model(tokens))
    cache = model.init_cache(2, 40)
    for start, stop in ((0, 17), (17, 18), (18, 23), (23, 24), (24, 40)):
        positions = np.broadcast_to(np.arange(start, stop), (2, stop - start))
        hidden, cache, _ = model.hidden_states(tokens[:, start:stop], positions, cache=cache)
        np.testing.assert_allclose(model.logits(hidden), whole[:, start:stop], atol=TOLERANCE, rtol=0)
