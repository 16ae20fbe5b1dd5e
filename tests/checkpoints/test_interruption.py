"""Conversions that are cut off leave nothing that looks complete, and go on where they stopped."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from published import make, raw_tensors

import dsparse
from dsparse.checkpoints import native
from dsparse.checkpoints.convert import convert

ROOT = Path(__file__).parents[2]

# Stops for good after the second finished layer or file, as a machine does that is about to be switched off.
STALLING = """
import sys, time
from dsparse.checkpoints import native, saving
from dsparse.checkpoints.convert import convert
calls = []
def stall(write):
    def wrapped(*args, **kwargs):
        if len(calls) == 2:
            print("stalled", flush=True)
            time.sleep(600)
        calls.append(0)
        return write(*args, **kwargs)
    return wrapped
native.write_layer = stall(native.write_layer)
saving.write_shard = stall(saving.write_shard)
convert(sys.argv[1], sys.argv[2], format=sys.argv[3], max_shard_size="150KB", progress=False)
"""


def stall_and_signal(source: Path, destination: Path, format: str, number: signal.Signals) -> None:
    arguments = [sys.executable, "-c", STALLING, str(source), str(destination), format]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "stalled\n"
    process.send_signal(number)
    assert process.wait(60) != 0
    process.stdout.close()


@pytest.mark.parametrize("format", ["dsparse", "huggingface"])
def test_killed_conversion_goes_on(tmp_path: Path, format: str):
    source = make(tmp_path / "source", mtp=1)
    destination = tmp_path / "out"
    stall_and_signal(source, destination, format, signal.SIGKILL)
    assert not destination.exists()
    with pytest.raises(dsparse.DsparseError, match="unfinished conversion: run it again"):
        dsparse.from_pretrained(destination)
    (partial,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    with pytest.raises(dsparse.DsparseError, match="run the same conversion again"):
        dsparse.from_pretrained(partial)
    report = convert(source, destination, format=format, max_shard_size="150KB", progress=False)
    assert report.resumed_from > 100_000 and "went on from an interrupted conversion" in str(report)
    dsparse.save_pretrained(dsparse.from_pretrained(destination), tmp_path / "back")
    assert raw_tensors(tmp_path / "back") == raw_tensors(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out", "source"]


def test_other_options_start_anew(tmp_path: Path):
    source = make(tmp_path / "source")
    stall_and_signal(source, tmp_path / "out", "dsparse", signal.SIGKILL)
    report = convert(source, tmp_path / "out", dtype="float32", progress=False)
    assert report.resumed_from == 0
    assert dsparse.from_pretrained(tmp_path / "out").embed_tokens.weight.dtype == "float32"


def test_interrupted_from_the_keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make(tmp_path / "source")
    write, written = native.write_layer, []

    def interrupted(folder, layer, arrays):
        if written:
            raise KeyboardInterrupt
        written.append(layer)
        write(folder, layer, arrays)

    monkeypatch.setattr(native, "write_layer", interrupted)
    with pytest.raises(dsparse.DsparseError, match=r"interrupted; finished parts are kept: the same command goes on"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(native, "write_layer", write)
    assert convert(source, tmp_path / "out", progress=False).resumed_from > 0


def test_two_conversions_to_one_place(tmp_path: Path):
    source = make(tmp_path / "source")
    arguments = [sys.executable, "-c", STALLING, str(source), str(tmp_path / "out"), "dsparse"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "stalled\n"
        for options in ({"max_shard_size": "150KB"}, {"dtype": "float32"}):
            with pytest.raises(dsparse.DsparseError, match="another conversion is writing it"):
                convert(source, tmp_path / "out", progress=False, **options)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_report(tmp_path: Path):
    source = make(tmp_path / "source")
    report = convert(source, tmp_path / "out", progress=False)
    assert re.search(r"out: dsparse, 67 tensors, 0.00 GB in .* peak memory \d+\.\d\d GiB", str(report))
    assert report.bytes_written == sum(len(data) for _, _, data in raw_tensors(source).values()) <= report.bytes_read
