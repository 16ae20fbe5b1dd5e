"""Rows of tokens to train on: read, packed, shuffled, and resumed exactly where a run left off.

A row is `sequence_length` inputs and, shifted by one, as many targets. Documents share rows; `segment_ids` keep their
attention apart. Two kinds of source:

- streams (text, JSONL `text`, token arrays): documents one after the other, each ended by the end-of-sequence token,
  cut into rows wherever a row is full; the last, incomplete row is left out;
- examples (JSONL `messages`, or `prompt` and `completion`): kept whole, several to a row where they fit, the rest of
  the row padded; those longer than a row lose their end. Only what the assistant says, or the completion, is learned.
"""

from __future__ import annotations

import bisect
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from dsparse.errors import DsparseError
from dsparse.tokenizer import Tokenizer

logger = logging.getLogger("dsparse.training")

# T + 1 of each: tokens, segments, whether a token is learned
Row = tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"], Bool[np.ndarray, " row"]]


class Batch(NamedTuple):
    """tokens: inputs. targets: the token after each. weights: 1 where the target is learned, else 0.

    segment_ids: documents of a row counted from 1; 0 is padding.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]


def make_batch(rows: Sequence[Row]) -> Batch:
    tokens, segments, learned = (np.stack(part) for part in zip(*rows, strict=True))
    weights = learned[:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32), segments[:, :-1])


class Stream:
    """Rows cut from one long array of tokens; row i+1 starts with the last target of row i."""

    def __init__(self, tokens: Integer[np.ndarray, " tokens"], length: int, eos: Sequence[int]):
        self.tokens, self.length, self.eos = tokens, length, np.asarray(eos, np.int64)

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.length

    def __getitem__(self, row: int) -> Row:
        tokens = np.asarray(self.tokens[row * self.length : (row + 1) * self.length + 1], np.int32)
        ended = np.isin(tokens[:-1], self.eos)
        segments = np.concatenate([[1], 1 + np.cumsum(ended)]).astype(np.int32)
        return tokens, segments, np.ones(len(tokens), bool)


class Examples:
    """Rows of whole examples, each put where the least room is left (best fit)."""

    def __init__(self, examples: Sequence[tuple[list[int], list[bool]]], length: int):
        self.examples, self.length = examples, length
        self.rows: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (room left, row), ascending
        for index, (tokens, _) in enumerate(examples):
            needed = min(len(tokens), length + 1)
            place = bisect.bisect_left(rooms, (needed, 0))
            if place < len(rooms):
                room, row = rooms.pop(place)
            else:
                room, row = length + 1, len(self.rows)
                self.rows.append([])
            self.rows[row].append(index)
            bisect.insort(rooms, (room - needed, row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        tokens, segments = np.zeros((2, self.length + 1), np.int32)
        learned, start = np.zeros(self.length + 1, bool), 0
        for segment, index in enumerate(self.rows[row], start=1):
            ids, mask = (part[: self.length + 1] for part in self.examples[index])
            here = slice(start, start + len(ids))
            tokens[here], segments[here], learned[here] = ids, segment, mask
            start += len(ids)
        return tokens, segments, learned


class Batches:
    """Batches without end: every epoch takes each row once, in an order drawn from the seed and the epoch."""

    def __init__(self, sources: Sequence[Stream | Examples], batch_size: int, seed: int, fingerprint: str = ""):
        self.sources, self.batch_size, self.seed, self.fingerprint = sources, batch_size, seed, fingerprint
        self.starts = np.cumsum([0, *(len(source) for source in sources)])
        self.drawn = 0  # rows so far
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, int))

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on with the next batch."""
        return {"drawn": self.drawn, "seed": self.seed, "batch_size": self.batch_size, "fingerprint": self.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            DsparseError: the data, the seed or the batch size are not the ones of `state`.
        """
        for name, what in (("fingerprint", "data or sequence_length"), ("seed", "seed"), ("batch_size", "batch_size")):
            if state[name] != getattr(self, name):
                raise DsparseError(
                    f"cannot resume: {what} differs from the saved run's; start a new output_dir instead"
                )
        self.drawn = state["drawn"]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = [self._row(self.drawn + i) for i in range(self.batch_size)]
        self.drawn += self.batch_size
        return make_batch(rows)

    def _row(self, number: int) -> Row:
        epoch, place = divmod(number, self.rows)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        row = self._order[1][place]
        source = np.searchsorted(self.starts, row, side="right") - 1
        return self.sources[source][int(row - self.starts[source])]


class _Reading(NamedTuple):
    """What reading the files needs and fills."""

    tokenizer: Callable[[], Tokenizer]
    eos: Sequence[int]
    text: list[np.ndarray]
    examples: list[tuple[list[int], list[bool]]]


def read_data(
    files: Sequence[str],
    model_folder: str,
    *,
    length: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
    eos: Sequence[int],
) -> Batches:
    """Read and pack the files of a run.

    eos: end-of-sequence tokens; the first one ends documents, all of them separate the documents of token arrays.

    Raises:
        DsparseError: a file is missing, empty, undecodable or of unknown kind; a JSONL line lacks its fields; a token
            id is outside the vocabulary; or everything together is shorter than one row.
    """
    arrays, examples = read_files(files, model_folder, vocab_size, eos)
    sources: list[Stream | Examples] = [Stream(tokens, length, eos) for tokens in arrays]
    if examples:
        sources.append(Examples(_learnable(examples, length), length))
    batches = Batches([source for source in sources if len(source)], batch_size, seed, _fingerprint(sources, length))
    if not batches.rows and arrays:
        tokens = sum(map(len, arrays))
        raise DsparseError(
            f"{', '.join(files)}: {tokens} tokens, less than one row of {length + 1}; add data or lower sequence_length"
        )
    if not batches.rows:
        raise DsparseError(f"{', '.join(files)}: no example has anything to learn in its first {length + 1} tokens")
    return batches


def read_files(
    files: Sequence[str], model_folder: str, vocab_size: int, eos: Sequence[int]
) -> tuple[list[Integer[np.ndarray, " tokens"]], list[tuple[list[int], list[bool]]]]:
    """Documents one after the other, as arrays of tokens; and examples, with what is learned of them.

    Raises:
        DsparseError: as `read_data`, but for the length.
    """
    loaded: list[Tokenizer] = []

    def tokenizer() -> Tokenizer:
        if not eos:
            raise DsparseError(f"{model_folder}: config.json has no eos_token_id, which ends documents in a row")
        if not loaded:
            loaded.append(Tokenizer(model_folder))
        return loaded[0]

    reading, arrays = _Reading(tokenizer, eos, [], []), []
    for name in files:
        file = Path(name)
        if not file.is_file():
            raise DsparseError(f"{file}: not found")
        if file.suffix == ".npy":
            arrays.append(read_token_array(file, vocab_size))
        elif file.suffix in (".txt", ".md"):
            reading.text.append(_document(reading, read_text(file)))
        elif file.suffix == ".jsonl":
            _read_jsonl(file, reading)
        else:
            raise DsparseError(f"{file}: unknown kind of data (known: .txt, .md, .jsonl, .npy)")
    for ids in (*reading.text, *(ids for ids, _ in reading.examples)):
        if len(ids) and (high := int(np.max(ids))) >= vocab_size:  # a tokenizer may belong to another model
            raise DsparseError(f"{model_folder}: its tokenizer gives token id {high}, outside the model's {vocab_size}")
    if reading.text:
        arrays.append(np.concatenate(reading.text))
    return arrays, reading.examples


def read_text(file: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DsparseError: there is none, or a byte is not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DsparseError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise DsparseError(f"{file}: empty, there is no text in it")
    return text


def read_token_array(file: Path, vocab_size: int) -> Integer[np.ndarray, " tokens"]:
    """Token ids of a .npy file, memory-mapped, every one inside the vocabulary."""
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DsparseError(f"{file}: not a NumPy array ({error})") from error
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DsparseError(
            f"{file}: expected one dimension of integer token ids, found {tokens.dtype} {list(tokens.shape)}"
        )
    block = 1 << 22
    for start in range(0, len(tokens), block):
        part = tokens[start : start + block]
        if part.min() < 0 or part.max() >= vocab_size:
            place = start + int(np.argmax((part < 0) | (part >= vocab_size)))
            raise DsparseError(
                f"{file}: token id {tokens[place]} at position {place} is outside the vocabulary of {vocab_size}"
            )
    return tokens


def _document(reading: _Reading, text: str) -> Integer[np.ndarray, " tokens"]:
    ids = reading.tokenizer().encode(text)
    return np.asarray(ids if ids and ids[-1] in reading.eos else [*ids, reading.eos[0]], np.int32)


def _read_jsonl(file: Path, reading: _Reading) -> None:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DsparseError(f"{file} line {number}: not valid JSON ({error.msg} at column {error.colno})") from error
        try:
            _read_entry(entry, reading)
        except DsparseError as error:
            raise DsparseError(f"{file} line {number}: {error}") from error


def _read_entry(entry: Any, reading: _Reading) -> None:
    """Add one JSONL entry to what is being read."""
    if not isinstance(entry, dict):
        raise DsparseError(f"expected a JSON object, found {type(entry).__name__}")
    tokenizer = reading.tokenizer()
    if "messages" in entry:
        if not isinstance(entry["messages"], list):
            raise DsparseError("field messages must be a list")
        reading.examples.append(tokenizer.encode_chat(entry["messages"], reading.eos[0]))
    elif "prompt" in entry or "completion" in entry:
        prompt, completion = _text(entry, "prompt"), _text(entry, "completion")
        given = tokenizer.encode(prompt)
        learned = [*tokenizer.encode(completion, special=False), reading.eos[0]]
        reading.examples.append((given + learned, [False] * len(given) + [True] * len(learned)))
    else:
        reading.text.append(_document(reading, _text(entry, "text")))


def _text(entry: dict[str, Any], field: str) -> str:
    if field not in entry:
        found = ", ".join(entry) or "none"
        raise DsparseError(
            f"field {field} is missing (needed: text, or messages, or prompt and completion; found: {found})"
        )
    if not isinstance(entry[field], str):
        raise DsparseError(f"field {field} must be text, found {type(entry[field]).__name__}")
    return entry[field]


def _learnable(examples: list[tuple[list[int], list[bool]]], length: int) -> list[tuple[list[int], list[bool]]]:
    """Examples of which something is left to learn inside one row; reports what is lost."""
    kept = [example for example in examples if any(example[1][1 : length + 1])]
    cut = sum(len(tokens) > length + 1 for tokens, _ in kept)
    if cut or len(kept) < len(examples):
        logger.warning(
            "of %d examples, %d were cut to sequence_length and %d left out, having nothing to learn within it",
            len(examples), cut, len(examples) - len(kept),
        )  # fmt: skip
    return kept


def _fingerprint(sources: Sequence[Stream | Examples], length: int) -> str:
    """Tells data apart: row length, counts, and a checksum of (the ends of) each source's tokens."""
    marks, end = [str(length)], 1 << 18
    for source in sources:
        if isinstance(source, Stream):
            ids = np.concatenate([source.tokens[:end], source.tokens[-end:]])
            count = len(source.tokens)
        else:
            ids = np.concatenate([np.asarray(tokens) for tokens, _ in source.examples] or [np.zeros(0)])
            count = len(source.examples)
        marks.append(f"{count}:{zlib.crc32(ids.astype('<i4').tobytes()):08x}")
    return " ".join(marks)
