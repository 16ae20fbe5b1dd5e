"""Whole runs: exact resume, signals, export, metrics."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small import small_model

from dsparse import DsparseError
from dsparse.pretrained import from_pretrained, save_pretrained
from dsparse.training import TrainConfig, train
from dsparse.training import loop as loop_module

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def options(tmp_path, tokens_file):
    """A tiny run of 4 updates."""
    return {
        "model": "none", "data": (str(tokens_file),), "output_dir": str(tmp_path / "run"), "steps": 4, "batch_size": 4,
        "sequence_length": 32, "learning_rate": 3e-3, "save_every": 2, "tensorboard": False,
    }  # fmt: skip


def reports(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in reports(folder)]


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(options, tmp_path):
    straight = train(TrainConfig(**options), small_model())
    halves = options | {"output_dir": str(tmp_path / "halves"), "keep_last": 1}

    class StopAfterTwo(loop_module.Reporter):
        def step(self, step, metrics):
            super().step(step, metrics)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "Reporter", StopAfterTwo)
        train(TrainConfig(**halves), small_model())
    assert [step for step, *_ in losses(halves["output_dir"])] == [1, 2]
    resumed = train(TrainConfig(**halves, resume=True), small_model(seed=5))  # its own weights are replaced
    assert losses(halves["output_dir"]) == losses(options["output_dir"])
    assert_equal(resumed, straight)
    assert [int(folder.name) for folder in (tmp_path / "halves" / "states").iterdir() if folder.name.isdigit()] == [4]
    assert reports(options["output_dir"])[-1]["loss"] < reports(options["output_dir"])[0]["loss"]
    assert set(reports(options["output_dir"])[0]) == {
        "step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "balance_loss", "expert_load",
    }  # fmt: skip

    with pytest.raises(DsparseError, match="already holds a run; go on with --resume"):
        train(TrainConfig(**options), small_model())
    with pytest.raises(DsparseError, match="data or sequence_length differs"):
        train(TrainConfig(**options | {"sequence_length": 16}, resume=True), small_model())
    with pytest.raises(DsparseError, match=r"saved from another model \(embed_tokens\.weight: \[256, 64\] there"):
        train(TrainConfig(**options, resume=True), small_model(hidden_size=32))
    with pytest.raises(DsparseError, match="holds no saved state"):
        train(TrainConfig(**options | {"output_dir": str(tmp_path / "new")}, resume=True), small_model())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(options, tmp_path, monkeypatch):
    bad = {"step": 0}

    class Poisoned(loop_module.Batches):
        def __next__(self):
            batch = super().__next__()
            bad["step"] += 1
            return batch._replace(weights=batch.weights * np.float32("nan")) if bad["step"] == 4 else batch

    real = loop_module.read_data
    monkeypatch.setattr(
        loop_module,
        "read_data",
        lambda *a, **k: Poisoned(**{n: getattr(real(*a, **k), n) for n in ("sources", "batch_size", "seed")}),
    )
    with pytest.raises(
        DsparseError, match=r"loss is nan at step 4; the state of step 3 is kept in .*states; try a lower learning_rate"
    ):
        train(TrainConfig(**options), small_model())
    assert sorted(int(f.name) for f in (tmp_path / "run" / "states").iterdir() if f.name.isdigit()) == [2, 3]
    state = train(TrainConfig(**options, resume=True), small_model())  # the poison is spent
    assert int(state.step) == 4 and [step for step, *_ in losses(options["output_dir"])] == [1, 2, 3, 4]


def test_a_full_disk_is_seen_before_a_state_is_written(options, tmp_path, monkeypatch):
    usage, free = shutil.disk_usage(tmp_path), iter([10**12, 10**12, 1000, 1000])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    with pytest.raises(DsparseError, match=r"states.4: 0\.00 GB are needed and 0\.00 GB are free on that disk"):
        train(TrainConfig(**options), small_model())
    assert [step for step, *_ in losses(options["output_dir"])] == [1, 2, 3, 4]
    assert [folder.name for folder in (tmp_path / "run" / "states").iterdir()] == ["2"]
    with pytest.raises(DsparseError, match="are needed and"):  # nothing is trained that could not be saved
        train(TrainConfig(**options | {"output_dir": str(tmp_path / "other")}), small_model())
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_the_export_is_the_trained_model_and_metrics_reach_tensorboard(options, tmp_path):
    source, export = tmp_path / "source", tmp_path / "export"
    save_pretrained(small_model(), source)
    options |= {"model": str(source), "export_dir": str(export), "steps": 2, "tensorboard": True, "dtype": "bfloat16"}
    state = train(TrainConfig(**options))
    written = from_pretrained(export)
    np.testing.assert_array_equal(written.lm_head.weight[...], state.params["lm_head.weight"])
    tokens = np.arange(20)[None] + 2
    assert np.abs(written(tokens) - small_model()(tokens)).max() > 1e-3
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    with pytest.raises(DsparseError, match="export: already exists"):
        train(TrainConfig(**options | {"output_dir": str(tmp_path / "other")}))


def command(model, options, *extra) -> list[str]:
    flags = [
        "--data",
        *options["data"],
        "--output-dir",
        options["output_dir"],
        "--batch-size",
        "2",
        "--sequence-length",
        "16",
    ]
    return [
        sys.executable,
        str(ROOT / "train.py"),
        "--model",
        str(model),
        *flags,
        "--steps",
        "100000",
        "--no-tensorboard",
        *extra,
    ]


def wait_for(process, file, lines):
    for _ in range(2400):
        if file.is_file() and file.read_text().count("\n") >= lines:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    raise AssertionError("the run made no progress")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(options, tmp_path, number):
    """SIGTERM saves and exits cleanly; SIGKILL loses the work since the last save, nothing else."""
    save_pretrained(small_model(num_nextn_predict_layers=0), tmp_path / "source")
    every = "3" if number == signal.SIGKILL else "0"
    run = command(tmp_path / "source", options, "--save-every", every)
    environment = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = Path(options["output_dir"]) / "metrics.jsonl"
    wait_for(process, metrics, 8)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    done = losses(options["output_dir"])
    states = sorted(int(f.name) for f in (tmp_path / "run" / "states").iterdir() if f.name.isdigit())
    if number == signal.SIGTERM:
        assert process.returncode == 0, err
        assert f"stopped by SIGTERM after step {len(done)}; go on with --resume" in out
        assert states == [len(done)]
    else:
        assert process.returncode == -signal.SIGKILL and states and states[-1] % 3 == 0
    again = TrainConfig(
        **options | {"batch_size": 2, "sequence_length": 16, "steps": states[-1] + 2, "learning_rate": 1e-4},
        resume=True,
    )
    assert int(train(again, from_pretrained(tmp_path / "source")).step) == states[-1] + 2


def test_bad_input_is_one_line(tmp_path, capsys):
    from dsparse.training import main

    assert main(["--model", str(tmp_path / "absent"), "--data", "x.txt", "--output-dir", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "absent" in printed and printed.count("\n") == 1
