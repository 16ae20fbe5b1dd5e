"""The command line: results, and one clear line on bad input."""

import json
import re

import jax
import numpy as np
import pytest
from support import DEMO, sample_text_tokens

import dsparse
from dsparse import dispatch
from dsparse.cli import main
from dsparse.evaluate import evaluate, windows
from dsparse.tokenizer import Tokenizer

TEXT = DEMO.parent / "text.txt"


def run(capsys, *argv):
    status = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_prints_the_continuation(capsys):
    status, out, _ = run(
        capsys, "generate", DEMO, "--prompt", "The king of", "--max-new-tokens", 8, "--dtype", "float32"
    )
    assert status == 0 and out.startswith("The king of") and len(out) > len("The king of") + 4
    status, as_json, _ = run(
        capsys, "generate", DEMO, "--prompt", "The king of", "--max-new-tokens", 8, "--dtype", "float32", "--json"
    )
    result = json.loads(as_json)
    assert status == 0 and len(result["tokens"]) == 8 and out.strip() == "The king of" + result["text"].rstrip()


def test_generate_says_once_which_implementations_serve(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "served", {})
    jax.clear_caches()  # the choice is made while a program is traced
    status, _, err = run(capsys, "generate", DEMO, "--prompt", "The king of", "--max-new-tokens", 3)
    (line,) = (line for line in err.splitlines() if line.startswith("served by: "))
    assert status == 0
    assert "causal_attention xla, expert_mlp xla, latent_attention xla" in line
    assert line.endswith("(cudnn: needs a GPU, found cpu; mosaic_gpu: needs a GPU, found cpu)")


def test_eval_equals_the_mean_loss_of_the_windows(capsys, tmp_path):
    tokens = sample_text_tokens(DEMO, 1, 1500)[0]
    np.save(tmp_path / "tokens.npy", tokens.astype(np.uint16))
    status, out, _ = run(
        capsys, "eval", DEMO, "--data", tmp_path / "tokens.npy", "--dtype", "float32", "--json", "--context-length", 400
    )
    result = json.loads(out)
    model = dsparse.from_pretrained(DEMO, dtype="float32")
    losses = []
    for start in range(0, len(tokens) - 1, 400):
        window = tokens[start : start + 401]
        logits = np.asarray(model(window[None, :-1])[0], np.float64)
        peak = logits.max(axis=-1)
        normalizer = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=-1))
        losses.extend(normalizer - logits[np.arange(len(window) - 1), window[1:]])
    assert status == 0 and result["tokens"] == len(losses) == 1499
    assert result["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_eval_reads_examples_whole(capsys, tmp_path):
    """Prompt and completion, and conversations, count with all their tokens."""
    tokenizer = Tokenizer(DEMO)
    prompt, completion = "In the beginning God created", " the heaven and the earth."
    count = len(tokenizer.encode(prompt)) + len(tokenizer.encode(completion, special=False)) + 1
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    status, out, _ = run(capsys, "eval", DEMO, "--data", tmp_path / "one.jsonl", "--json", "--dtype", "float32")
    assert status == 0 and json.loads(out)["tokens"] == count - 1


def test_windows_predict_every_token_once():
    tokens = np.arange(1000)
    seen = np.zeros(1000)
    for inputs, targets, weights in windows(tokens, 64, 3):
        assert inputs.shape == (3, 64)
        np.testing.assert_array_equal((inputs + 1)[weights > 0], targets[weights > 0])
        np.add.at(seen, targets[weights > 0], 1)
    assert seen[0] == 0 and (seen[1:] == 1).all()


def test_evaluation_needs_two_tokens():
    model = dsparse.from_pretrained(DEMO, dtype="float32")
    with pytest.raises(dsparse.DsparseError, match="at least two tokens"):
        evaluate(model, np.array([3]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "no/such/folder", "--prompt", "a"], "no/such/folder: not found; expected the folder of a model"),
        (["generate", DEMO, "--prompt", ""], "--prompt is empty"),
        (["generate", DEMO, "--prompt", "a", "--dtype", "int4"], "dtype 'int4' is not supported"),
        (["generate", DEMO, "--prompt", "a", "--mesh", "rows=2"], "mesh 'rows=2'"),
        (["generate", DEMO, "--prompt", "a", "--mesh", "data=64"], "needs 64 devices"),
        (["generate", DEMO, "--prompt", "king " * 2100], "--prompt has 21"),
        (["generate", DEMO, "--prompt", "half a \udcff"], "text cannot be encoded: '\\udcff' at character 7"),
        (["eval", DEMO, "--data", TEXT, "--context-length", 0], "context_length must be at least 1, found 0"),
        (["eval", DEMO, "--data", TEXT, "--context-length", 9999], "exceeds the model's max_position_embeddings"),
        (["eval", DEMO, "--data", TEXT, "--batch-size", 0], "batch_size must be at least 1, found 0"),
        (["eval", DEMO, "--data", "no-such-file.txt"], "no-such-file.txt: not found"),
        (["generate", DEMO, "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["generate", DEMO, "--prompt", "a", "--temperature", "-1"], "temperature -1.0 is out of range"),
        (["generate", DEMO, "--prompt", "a", "--seed", 1 << 32], "seed 4294967296 is out of range"),
        (["convert", "no/such/folder", "out"], "no/such/folder"),
        (["convert", DEMO, __file__ + "/inside"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert status == 1 and out == ""
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


def test_bad_data_files_are_named(capsys, tmp_path):
    cases = {
        "empty.txt": (b"", "empty"),
        "latin.txt": (b"caf\xe9 au lait", "byte 3"),
        "bad.jsonl": (b'{"text": "ok"}\n{"txt": 1}\n', "line 2"),
        "odd.xyz": (b"x", "unknown kind of data"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        status, _, err = run(capsys, "eval", DEMO, "--data", tmp_path / name)
        assert status == 1 and name in err and re.search(message, err), err
    np.save(tmp_path / "ids.npy", np.array([1, 9000]))
    status, _, err = run(capsys, "eval", DEMO, "--data", tmp_path / "ids.npy")
    assert status == 1 and "token id 9000 at position 1" in err
