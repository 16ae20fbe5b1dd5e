import json

import numpy as np
import pytest

from dsparse.errors import DsparseError
from dsparse.training.data import Batches, Examples, Stream, make_batch, read_data

LETTERS = {chr(c): c - 30 for c in range(32, 127)}


def read(files, folder, length=8, **options):
    options = {"batch_size": 2, "seed": 0, "vocab_size": 256, "eos": (1,)} | options
    return read_data([str(f) for f in files], str(folder), length=length, **options)


def write(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def lines(*entries):
    return "\n".join(json.dumps(entry) for entry in entries)


def test_stream_rows_cover_every_token_once_and_documents_are_kept_apart():
    tokens = np.array([5, 6, 1, 7, 8, 9, 1, 10, 11, 12, 13], np.uint16)
    stream = Stream(tokens, 5, (1,))
    batch = make_batch([stream[0], stream[1]])
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 1, 7, 8], [9, 1, 10, 11, 12]])
    np.testing.assert_array_equal(batch.targets, [[6, 1, 7, 8, 9], [1, 10, 11, 12, 13]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 2, 2], [1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]])  # not across documents


def test_examples_stay_whole_and_padding_is_not_learned():
    examples = [([10 + i] * n, [False] * (n - 1) + [True]) for i, n in enumerate([6, 3, 4, 2, 30])]
    rows = Examples(examples, length=8)
    assert sorted(index for row in rows.rows for index in row) == [0, 1, 2, 3, 4]
    for row in range(len(rows)):
        tokens, segments, _ = rows[row]
        for segment, index in enumerate(rows.rows[row], start=1):
            assert set(tokens[segments == segment]) == {10 + index}
            assert (segments == segment).sum() == min(9, len(examples[index][0]))
        assert not tokens[segments == 0].any()
    assert len(rows) == 3  # 6 + 3, 4 + 2, 9
    batch = make_batch([rows[i] for i in range(3)])
    assert batch.weights.sum() == 4  # one token of each but the cut one, whose learned token is cut off


def test_only_the_completion_is_learned(tmp_path, byte_tokenizer):
    file = write(tmp_path, "a.jsonl", lines({"prompt": "ab", "completion": "cd"}))
    batch = next(read([file], byte_tokenizer, batch_size=1))
    a, b, c, d = (LETTERS[x] for x in "abcd")
    np.testing.assert_array_equal(batch.tokens[0], [a, b, c, d, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.targets[0], [b, c, d, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.weights[0], [0, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.segment_ids[0], [1, 1, 1, 1, 1, 0, 0, 0])


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "r"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "s"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected", "learned"),
    [
        (None, "S\n\nUser: q\n\nAssistant: r~User: q\n\nAssistant: s~", " r~ s~"),
        (TEMPLATE, "<s>S;<u>q;<a>r;<u>q;<a>s;", "r;s;"),
    ],
)
def test_only_the_assistant_is_learned(tmp_path, byte_tokenizer, template, expected, learned):
    if template:
        config = json.loads((byte_tokenizer / "tokenizer_config.json").read_text())
        (byte_tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    file = write(tmp_path, "a.jsonl", lines({"messages": CHAT}))
    batch = next(read([file], byte_tokenizer, length=60, batch_size=1))
    letters = {i: c for c, i in LETTERS.items()} | {1: "~", 97: "\n", 0: ""}
    used = batch.segment_ids[0] > 0
    assert "".join(letters[t] for t in batch.tokens[0][used].tolist()) == expected
    assert "".join(letters[t] for t in batch.targets[0][batch.weights[0] > 0].tolist()) == learned


def test_text_and_jsonl_text_are_one_stream_of_documents(tmp_path, byte_tokenizer):
    files = [
        write(tmp_path, "a.txt", "hello there"),
        write(tmp_path, "b.jsonl", lines({"text": "more"}, {"text": "words"})),
    ]
    data = read(files, byte_tokenizer)
    assert data.rows == (12 + 5 + 6 - 1) // 8
    assert sum(int((data._row(i)[0] == 1).sum()) for i in range(2)) == 2


def test_order_is_drawn_from_the_seed_and_resumes_exactly():
    stream = Stream(np.arange(2, 203), 10, (1,))

    def batches(seed):
        return Batches([stream], 3, seed)

    straight = batches(7)
    first = [next(straight).tokens for _ in range(14)]  # two epochs
    starts = [int(row[0]) for batch in first for row in batch]
    assert sorted(starts[:20]) == sorted(starts[20:40]) == list(range(2, 202, 10))
    assert starts[:20] != starts[20:40] != sorted(starts[20:40])
    other = next(batches(8)).tokens
    assert not np.array_equal(first[0], other)
    resumed = batches(7)
    for _ in range(5):
        next(resumed)
    fresh = batches(7)
    fresh.restore(json.loads(json.dumps(resumed.state())))
    for expected in first[5:]:
        np.testing.assert_array_equal(next(fresh).tokens, expected)
    with pytest.raises(DsparseError, match="seed differs"):
        batches(8).restore(resumed.state())


def test_resuming_with_other_data_is_refused(tmp_path):
    for name, step in (("a.npy", 1), ("b.npy", 3)):
        np.save(tmp_path / name, (np.arange(100) * step % 200 + 2).astype(np.uint16))
    saved = read([tmp_path / "a.npy"], tmp_path).state()
    with pytest.raises(DsparseError, match="data or sequence_length differs"):
        read([tmp_path / "b.npy"], tmp_path).restore(saved)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing\.txt: not found"),
        ("empty.txt", " \n", r"empty\.txt: empty"),
        ("broken.txt", b"good\xff", r"broken\.txt: not UTF-8 text: invalid start byte at byte 4"),
        ("a.csv", "x", r"a\.csv: unknown kind of data"),
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}', r"a\.jsonl line 2: field text is missing .*found: body"),
        ("a.jsonl", '{"prompt": "x"}', r"a\.jsonl line 1: field completion is missing"),
        ("a.jsonl", '{"text": "x"}\n\n{"text"}', r"a\.jsonl line 3: not valid JSON"),
        ("a.jsonl", '{"text": 3}', r"a\.jsonl line 1: field text must be text, found int"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user"}]}',
            r"a\.jsonl line 1: every entry of messages needs a role and a content",
        ),
        ("short.txt", "abc", r"short\.txt: 4 tokens, less than one row of 9"),
        ("a.npy", "not an array", r"a\.npy: not a NumPy array"),
    ],
)
def test_bad_data_is_named(tmp_path, byte_tokenizer, name, content, message):
    file = tmp_path / name if content is None else write(tmp_path, name, content)
    with pytest.raises(DsparseError, match=message):
        read([file], byte_tokenizer)


def test_token_ids_outside_the_vocabulary_are_named(tmp_path, byte_tokenizer):
    np.save(tmp_path / "a.npy", np.array([3] * 20 + [300] + [3] * 20, np.int32))
    with pytest.raises(DsparseError, match=r"a\.npy: token id 300 at position 20 is outside the vocabulary of 256"):
        read([tmp_path / "a.npy"], tmp_path)
    np.save(tmp_path / "b.npy", np.zeros((3, 3)))
    with pytest.raises(
        DsparseError, match=r"b\.npy: expected one dimension of integer token ids, found float64 \[3, 3\]"
    ):
        read([tmp_path / "b.npy"], tmp_path)
    file = write(tmp_path, "a.txt", "text of another model")
    with pytest.raises(DsparseError, match="its tokenizer gives token id 90, outside the model's 64"):
        read([file], byte_tokenizer, vocab_size=64)
