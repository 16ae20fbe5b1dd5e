"""Conversions that are cut off leave nothing that looks complete, and go on where they stopped."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from published import make, raw_tensors

import dsparse
from dsparse.checkpoints import native
from dsparse.checkpoints.convert import convert, peak_memory

ROOT = Path(__file__).parents[2]

# Stops for good after the second finished layer or file, as a machine does that is about to be switched off.
STALLING = """
import sys, time
from dsparse.checkpoints import native, saving
from dsparse.checkpoints.convert import convert
from dsparse.cli import main
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
"""
CALL = 'convert(sys.argv[1], sys.argv[2], format=sys.argv[3], max_shard_size="150KB", progress=False)'
COMMAND = 'sys.exit(main(["convert", sys.argv[1], sys.argv[2], "--format", sys.argv[3]]))'


def stall_and_signal(
    source: Path, destination: Path, format: str, number: signal.Signals, work: str = CALL
) -> tuple[int, str]:
    """Exit status and what was written to standard error."""
    arguments = [sys.executable, "-c", STALLING + work, str(source), str(destination), format]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "stalled\n"
    process.send_signal(number)
    return process.wait(60), process.communicate()[1]


@pytest.mark.parametrize("format", ["dsparse", "huggingface"])
def test_killed_conversion_goes_on(tmp_path: Path, format: str):
    source = make(tmp_path / "source", mtp=1)
    destination = tmp_path / "out"
    assert stall_and_signal(source, destination, format, signal.SIGKILL)[0] == -signal.SIGKILL
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


def test_a_terminated_command_says_how_to_go_on(tmp_path: Path):
    source = make(tmp_path / "source")
    status, err = stall_and_signal(source, tmp_path / "out", "dsparse", signal.SIGTERM, COMMAND)
    assert status == 1 and "Traceback" not in err
    assert "out: interrupted; finished parts are kept: the same command goes on from there, or delete" in err
    assert convert(source, tmp_path / "out", progress=False).resumed_from > 0


def test_two_conversions_to_one_place(tmp_path: Path):
    source = make(tmp_path / "source")
    arguments = [sys.executable, "-c", STALLING + CALL, str(source), str(tmp_path / "out"), "dsparse"]
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


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_peak_memory_is_the_process_own():
    """Linux hands the peak of the process that started this one down through getrusage."""
    ballast = np.ones(1 << 27)  # 1 GiB
    code = "from dsparse.checkpoints.convert import peak_memory; print(peak_memory())"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(started.stdout) < ballast.nbytes < peak_memory()


def test_report(tmp_path: Path):
    source = make(tmp_path / "source")
    report = convert(source, tmp_path / "out", progress=False)
    assert re.search(r"out: dsparse, 67 tensors, 0.00 GB in .* peak memory \d+\.\d\d GiB", str(report))
    assert report.bytes_written == sum(len(data) for _, _, data in raw_tensors(source).values()) <= report.bytes_read
