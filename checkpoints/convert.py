"""Converting checkpoints between formats and dtypes, streaming: memory for a few tensors, however large the model.

Work happens in a hidden folder beside the destination, which is renamed when everything is there. If it is interrupted,
the same conversion started again goes on after the last finished layer or file.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import math
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsparse.checkpoints import native, saving
from dsparse.checkpoints.loading import THREADS, Box, Reader, split_box, warn_nonfinite, whole_box
from dsparse.checkpoints.mapping import layout_of
from dsparse.checkpoints.orbax_arrays import Streamed
from dsparse.checkpoints.plan import Plan, make_plan
from dsparse.checkpoints.sources import JOURNAL, Checkpoint, open_checkpoint, partial_folder
from dsparse.errors import DsparseError
from dsparse.pretrained import FORMATS, parse_dtype, parse_size

PIECE_BYTES = 8 << 20  # of a parameter, read at once
AHEAD = 4  # pieces or tensors read ahead of the one being written


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did. Sizes in bytes; peak_memory is that of the whole process so far.

    nonfinite: tensors with NaN or infinite values; like the notes, they have been logged.
    """

    source: str
    destination: str
    format: str
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory: int
    resumed_from: int
    nonfinite: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        speed = self.bytes_written / max(self.seconds, 1e-9)
        size = f"{self.bytes_written / 1e9:.2f} GB in {self.seconds:.1f} s ({speed / 1e9:.2f} GB/s)"
        peak = f"peak memory {self.peak_memory / 2**30:.2f} GiB"
        lines = [f"{self.destination}: {self.format}, {self.tensors} tensors, {size}, {peak}"]
        if self.resumed_from:
            lines.append(f"went on from an interrupted conversion with {self.resumed_from / 1e9:.2f} GB done")
        return "\n".join(lines)


def convert(
    source: str | Path,
    destination: str | Path,
    format: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Report:
    """Convert a checkpoint from and to Hugging Face's and dsparse's formats.

    format: "huggingface" or "dsparse"; by default the other one. dtype: to cast to, None keeps every tensor as stored.
    force: overwrite the destination.

    Raises:
        DsparseError: bad input, an existing destination or a full disk; or an interruption, and how to go on from it.
    """
    started, source, destination = time.monotonic(), Path(source), Path(destination)
    checkpoint = open_checkpoint(source, allow_pickle)
    format = format or ("huggingface" if checkpoint.native else "dsparse")
    if format not in FORMATS:
        raise DsparseError(f"format {format!r} is not supported (known: {', '.join(FORMATS)})")
    if quantization is not None:
        raise DsparseError(f"quantization {quantization!r} is not supported")
    saving.check_target(destination, force)
    with checkpoint.files as files, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        plan = make_plan(files, checkpoint.config, checkpoint.layout, checkpoint.origin, parse_dtype(dtype))
        files.once = True
        job = Job(plan, files, pool, parse_size(max_shard_size), progress)
        options = {"format": format, "dtype": dtype, "max_shard_size": job.max_shard_size}
        work = job.write_native if format == "dsparse" else job.write_huggingface
        total = sum(p.nbytes for p in plan.parameters)
        with _partial(checkpoint, source, destination, options, total) as partial:
            work(partial)
    warn_nonfinite(files)
    return Report(
        str(source), str(destination), format, len(files.tensors), files.bytes_read, job.written,
        time.monotonic() - started, peak_memory(), job.resumed, 
        tuple(sorted(files.nonfinite, key=saving.natural)), tuple(plan.notes),
    )  # fmt: skip


def peak_memory() -> int:
    """Bytes of memory this process has held at most."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's getrusage counts the process that started this one, too
        return int(re.search(r"VmHWM:\s*([0-9]+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _partial(
    checkpoint: Checkpoint, source: Path, destination: Path, options: dict[str, Any], total: int
) -> Iterator[Path]:
    """The folder to build in, with what an interrupted run of the same conversion left; renamed at the end."""
    partial = partial_folder(destination)
    journal = json.dumps({"source": str(source.absolute()), "files": _fingerprint(checkpoint), **options})
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / JOURNAL).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DsparseError(f"{destination}: another conversion is writing it") from None
        file.seek(0)
        if file.read() != journal:
            _remove_parts(partial)
            file.truncate(0)
            file.write(journal)
            file.flush()
        done = sum(part.stat().st_size for part in partial.rglob("*") if part.is_file())
        try:
            saving.check_space(destination, max(0, total - done))
            yield partial
        except KeyboardInterrupt:
            raise DsparseError(f"{destination}: interrupted; finished parts are kept: {_go_on(partial)}") from None
        except (OSError, DsparseError) as error:
            if not any(part.name != JOURNAL for part in partial.iterdir()):
                shutil.rmtree(partial)
                raise
            reason = str(error) if isinstance(error, DsparseError) else f"{destination}: {error.strerror or error}"
            raise DsparseError(f"{reason}; {_go_on(partial)}") from error
        (partial / JOURNAL).unlink()
    saving.replace_folder(partial, destination)


def _go_on(partial: Path) -> str:
    return f"the same command goes on from there, or delete {partial}"


def _remove_parts(partial: Path) -> None:
    """What an earlier conversion, of another source or with other options, left."""
    for part in partial.iterdir():
        if part.is_dir():
            shutil.rmtree(part)
        elif part.name != JOURNAL:
            part.unlink()


def _fingerprint(checkpoint: Checkpoint) -> list[list[Any]]:
    """Names, sizes and times of the files the weights come from."""
    files = sorted({info.file for info in checkpoint.files.tensors.values()})
    return [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]


class Job:
    """Writes a planned checkpoint in either format."""

    def __init__(self, plan: Plan, files, pool: concurrent.futures.Executor, max_shard_size: int, progress: bool):
        self.plan, self.pool, self.max_shard_size = plan, pool, max_shard_size
        self.written = self.resumed = 0
        self.layers = saving.by_layer(plan.parameters)
        self.bar = _progress_bar(sum(p.nbytes for p in plan.parameters), enabled=progress)
        self.reader = Reader(files, plan, pool, lambda done: None)

    def write_native(self, folder: Path) -> None:
        """Layer by layer; a layer's item is renamed into place by Orbax when it is complete."""
        with self.bar:
            for layer, parameters in self.layers.items():
                size = sum(math.prod(p.layer_shape) * p.dtype.itemsize for p in parameters.values())
                if (folder / native.WEIGHTS / native.item_name(layer)).exists():
                    self.resumed += size
                    self.bar.update(size)
                    continue
                native.write_layer(folder, layer, {path: self._stream(layer, path) for path in parameters})
                self.written += size
        saving.write_side_files(folder, self._config(), self.plan.origin)
        native.write_manifest(folder, self.plan.origin)

    def _stream(self, layer: int, path: str) -> Streamed:
        """A layer's parameter, read while it is written."""
        parameter = self.layers[layer][path]
        boxes = split_box(whole_box(parameter.layer_shape), PIECE_BYTES // parameter.dtype.itemsize)

        def read(box: Box) -> np.ndarray:
            return self._read(layer, path, box)

        def pieces() -> Iterator[np.ndarray]:
            for piece in read_ahead(boxes, read, self.pool):
                yield piece
                self.bar.update(piece.nbytes)

        return Streamed(parameter.layer_shape, parameter.dtype, pieces)

    def _read(self, layer: int, path: str, box: Box) -> np.ndarray:
        out = np.empty([s.stop - s.start for s in box], self.layers[layer][path].dtype)
        self.reader.read_now(self.reader.layer_reads(layer, path, box, out))
        return out

    def write_huggingface(self, folder: Path) -> None:
        """File by file; a file gets its name when it is complete."""
        exports = saving.exports_of(layout_of(self.plan.config), self.plan.origin, self.plan.parameters)
        shards = saving.shard(exports, self.max_shard_size)
        with self.bar:
            for name, part in zip(saving.shard_names(len(shards)), shards, strict=True):
                size = sum(export.nbytes for export in part)
                if (folder / name).exists():
                    self.resumed += size
                    self.bar.update(size)
                    continue
                values = read_ahead(part, self._read_export, self.pool)
                saving.write_shard(folder / name, part, lambda _, values=values: next(values), self.bar.update)
                self.written += size
        saving.write_index(folder, shards)
        saving.write_side_files(folder, self._config(), self.plan.origin)

    def _read_export(self, export: saving.Export) -> np.ndarray:
        if export.slot is None:
            return self.plan.origin.kept[export.name]
        layer, path, index = export.slot
        rest = self.layers[layer][path].layer_shape[len(index) :]
        box = (*(slice(i, i + 1) for i in index), *whole_box(rest))
        return self._read(layer, path, box).reshape(rest)

    def _config(self) -> dict[str, Any]:
        return saving.export_config(self.plan.config, self.plan.parameters)


def read_ahead[Item](
    items: Iterable[Item], read: Callable[[Item], np.ndarray], pool: concurrent.futures.Executor
) -> Iterator[np.ndarray]:
    """What `read` gives for each item, in order, the next ones being read while one is used."""
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    for item in items:
        waiting.append(pool.submit(read, item))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _progress_bar(total: int, enabled: bool):
    from tqdm import tqdm

    return tqdm(
        total=total, unit="B", unit_scale=True, desc="converting", disable=None if enabled else True, mininterval=0.5
    )
