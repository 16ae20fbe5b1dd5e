"""Perplexity of a model on text or tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dsparse.config import ModelConfig
from dsparse.errors import DsparseError
from dsparse.model import Model, check_tokens, split
from dsparse.training.loss import cross_entropy


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss: mean negative log-likelihood a token, in nats. tokens: how many were predicted."""

    loss: float
    perplexity: float
    tokens: int
    context_length: int
    seconds: float
    tokens_per_second: float


def evaluate(
    model: Model,
    tokens: Int[np.ndarray, " tokens"],
    *,
    context_length: int = 1024,
    batch_size: int = 4,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of one long sequence, cut into windows of `context_length` that overlap by one token.

    Every token but the first is predicted exactly once, from at most `context_length` tokens before it in its window.

    Raises:
        DsparseError: fewer than two tokens, an id outside the vocabulary, or no room in a window or a batch.
    """
    from tqdm import tqdm

    for name, value in (("context_length", context_length), ("batch_size", batch_size)):
        if value < 1:
            raise DsparseError(f"{name} must be at least 1, found {value}")
    if np.size(tokens) < 2:
        raise DsparseError(f"evaluation needs at least two tokens, found {np.size(tokens)}")
    tokens = check_tokens(np.asarray(tokens)[None], model.config.vocab_size)[0]
    structure, state = split(model)
    total, started = 0.0, time.perf_counter()
    batches = list(windows(tokens, context_length, batch_size))
    for inputs, targets, weights in tqdm(batches, desc="evaluating", unit="batch", disable=not progress):
        total += float(_batch_loss(structure, state, inputs, targets, weights))
    seconds, count = time.perf_counter() - started, len(tokens) - 1
    loss = total / count
    return Evaluation(loss, math.exp(min(loss, 700.0)), count, context_length, seconds, count / seconds)


Window = tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Float[np.ndarray, "B T"]]


def windows(tokens: Int[np.ndarray, " tokens"], length: int, batch_size: int) -> Iterator[Window]:
    """Batches of (inputs, targets, weights); the last is filled up with tokens of weight 0."""
    count = len(tokens) - 1
    rows = -(-count // (length * batch_size)) * batch_size
    padded = np.pad(tokens, (0, rows * length + 1 - len(tokens)))
    weights = (np.arange(rows * length) < count).astype(np.float32)
    shape = (-1, batch_size, length)
    yield from zip(padded[:-1].reshape(shape), padded[1:].reshape(shape), weights.reshape(shape), strict=True)


@functools.partial(jax.jit, static_argnums=0)
def _batch_loss(structure, state, inputs: Array, targets: Array, weights: Array) -> Float[Array, ""]:
    model = structure.merge(state)
    hidden, _, _ = model.hidden_states(inputs)
    return cross_entropy(model.norm(hidden), model.head_weight(), targets, weights)


def read_tokens(file: str, model_folder: str, config: ModelConfig) -> Int[np.ndarray, " tokens"]:
    """All tokens of a .txt, .jsonl or .npy file, one document after the other.

    Raises:
        DsparseError: as `dsparse.training.data.read_files`.
    """
    from dsparse.training.data import read_files

    arrays, examples = read_files([file], model_folder, config.vocab_size, config.eos_token_id)
    return np.concatenate([np.asarray(ids, np.int32) for ids in (*arrays, *(ids for ids, _ in examples))])
