"""What a run reports: one JSON object a line, TensorBoard events, and a progress bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np


class Reporter:
    """Writes metrics to `<folder>/metrics.jsonl` and `<folder>/tensorboard`, and shows progress on the terminal.

    A resumed run's reports after the state it starts from are dropped: they will be made again.
    """

    def __init__(self, folder: Path, *, first_step: int, steps: int, every: int, tensorboard: bool):
        from tqdm import tqdm

        self.every = every
        kept = _reports_up_to(folder / "metrics.jsonl", first_step)
        self.file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self.file.writelines(kept)
        self.bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, desc="compiling")
        self.events = self._events(folder / "tensorboard", first_step) if tensorboard else None
        self.tokens, self.since = 0, time.perf_counter()

    def _events(self, folder: Path, first_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self.say("tensorboardX is not installed: no TensorBoard events are written")
            return None
        return SummaryWriter(str(folder), purge_step=first_step + 1)

    def say(self, message: str) -> None:
        """Print a line without disturbing the progress bar."""
        self.bar.write(message)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Report update number `step`, counted from 1."""
        self.tokens += int(metrics["tokens"])
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        self.bar.set_description("training", refresh=False)
        self.bar.set_postfix(loss=f"{loss:.3f}", grad=f"{norm:.2f}", refresh=False)
        self.bar.update()
        if step % self.every:
            return
        now = time.perf_counter()
        record = {
            "step": step,
            "loss": loss,
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": norm,
            "tokens_per_second": round(self.tokens / (now - self.since), 1),
        }
        if "mtp_loss" in metrics:
            record["mtp_loss"] = float(metrics["mtp_loss"])
        load = np.asarray(metrics["expert_load"], float)
        if load.size:
            record |= {"balance_loss": float(metrics["balance_loss"]), "expert_load": load.round(3).tolist()}
        self.tokens, self.since = 0, now
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.events is not None:
            self._write_events(record)

    def _write_events(self, record: dict[str, Any]) -> None:
        record = dict(record)
        step, load = record.pop("step"), record.pop("expert_load", [])
        for name, value in record.items():
            self.events.add_scalar(name, value, step)
        for layer, value in enumerate(load):
            self.events.add_scalar(f"expert_load/{layer}", value, step)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.events is not None:
            self.events.close()


def _reports_up_to(file: Path, step: int) -> list[str]:
    """The complete lines of `file` that report updates up to number `step`."""
    if not step or not file.is_file():
        return []
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]
