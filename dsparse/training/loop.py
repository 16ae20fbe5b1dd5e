"""A training run from its command line to the exported model."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsparse.errors import DsparseError, one_line
from dsparse.model import Model
from dsparse.sharding import make_mesh, named_sharding
from dsparse.training.checkpoint import Checkpoints
from dsparse.training.config import TrainConfig, parse_config
from dsparse.training.data import Batch, Batches, read_data
from dsparse.training.metrics import Reporter
from dsparse.training.step import Step, TrainState, make_train_step, write_back


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the options of a command line; 0 if it went well or was stopped by a signal."""
    try:
        train(parse_config(argv))
    except (DsparseError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def train(config: TrainConfig, model: Model | None = None) -> TrainState:
    """Train `model`, or the one `config.model` names, and return the last state.

    Raises:
        DsparseError: bad options or data; output that is already there; a loss or gradient that is not finite (the last
            good state is saved first).
    """
    with StopSignals() as stop:
        checkpoints = _open_output(config)
        try:
            model = model or _load(config)
            data = _read(config, model)
            print(_describe(model, data), flush=True)
            state, update = make_train_step(model, config)
            if checkpoints.latest() is not None:
                state, position = checkpoints.restore(state)
                data.restore(position)
                print(f"going on from step {int(state.step)} in {checkpoints.folder}", flush=True)
            checkpoints.check_space(config.steps, state)  # not only after hours
            state = _Run(config, update, data, checkpoints, model.mesh, stop)(state)
        finally:
            checkpoints.close()
        if config.export_dir and not stop.received:
            _export(config, model, state)
    return state


def _open_output(config: TrainConfig) -> Checkpoints:
    """The saved states of the output folder, after checking that nothing would be overwritten."""
    if config.export_dir and Path(config.export_dir).exists():
        raise DsparseError(f"{config.export_dir}: already exists; choose another export_dir or remove it")
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise DsparseError(f"{folder}: is not a folder")
    states = folder / "states"
    if not config.resume and states.is_dir() and any(states.iterdir()):
        raise DsparseError(f"{folder}: already holds a run; go on with --resume or choose another output_dir")
    checkpoints = Checkpoints(states, config.keep_last)
    if config.resume and checkpoints.latest() is None:
        raise DsparseError(f"{folder}: holds no saved state to resume from")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    return checkpoints


def _load(config: TrainConfig) -> Model:
    from dsparse.pretrained import from_pretrained

    return from_pretrained(config.model, dtype="float32", mesh=make_mesh(config.mesh))


def _read(config: TrainConfig, model: Model) -> Batches:
    if config.sequence_length > model.config.max_position_embeddings:
        raise DsparseError(
            f"training option sequence_length ({config.sequence_length}) exceeds the model's max_position_embeddings "
            f"({model.config.max_position_embeddings})"
        )
    return read_data(
        config.data, config.model, length=config.sequence_length, batch_size=config.batch_size, seed=config.seed,
        vocab_size=model.config.vocab_size, eos=model.config.eos_token_id,
    )  # fmt: skip


def _describe(model: Model, data: Batches) -> str:
    from flax import nnx

    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    where = f"{jax.devices()[0].platform}" if model.mesh is None else f"a mesh of {model.mesh.size} devices"
    return f"{model.config.model_type}, {parameters / 1e6:.1f} M parameters, on {where}; {data.rows} rows of data"


def _export(config: TrainConfig, model: Model, state: TrainState) -> None:
    from dsparse.pretrained import save_pretrained

    write_back(model, state)
    save_pretrained(model, config.export_dir, format="huggingface")
    print(f"fine-tuned model written to {config.export_dir}", flush=True)


class StopSignals:
    """Turns the first SIGTERM or SIGINT into a request to stop after the running update; a second one acts as usual."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self.previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name
        for each, handler in self.previous.items():
            signal.signal(each, handler)


@dataclasses.dataclass
class _Run:
    """The loop itself."""

    config: TrainConfig
    update: Step
    data: Batches
    checkpoints: Checkpoints
    mesh: Mesh | None
    stop: StopSignals

    def __call__(self, state: TrainState) -> TrainState:
        config, first = self.config, int(state.step)
        reporter = Reporter(
            Path(config.output_dir),
            first_step=first,
            steps=config.steps,
            every=config.log_every,
            tensorboard=config.tensorboard,
        )
        step = saved = first
        try:
            while step < config.steps and not self.stop.received:
                position = self.data.state()
                state, metrics = self.update(state, self.place(next(self.data)))
                metrics = jax.device_get(metrics)
                if not metrics["finite"]:
                    self.fail(state, step, saved, position, metrics)
                step += 1
                reporter.step(step, metrics)
                if config.save_every and step % config.save_every == 0:
                    self.checkpoints.save(step, state, self.data.state())
                    saved = step
            if step > saved:
                self.checkpoints.save(step, state, self.data.state())
            if self.stop.received:
                reporter.say(f"stopped by {self.stop.received} after step {step}; go on with --resume")
        finally:
            reporter.close()
        return state

    def place(self, batch: Batch) -> Batch:
        """The batch on its devices."""
        if self.mesh is None:
            return jax.device_put(batch)
        return jax.device_put(batch, named_sharding(("batch", None), batch.tokens.shape, self.mesh))

    def fail(self, state: TrainState, step: int, saved: int, position: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Save the state before the bad update and raise."""
        if step > saved:
            self.checkpoints.save(step, state, position)
        what = "loss" if not jnp.isfinite(metrics["loss"]) else "norm of the gradient"
        value = metrics["loss"] if what == "loss" else metrics["grad_norm"]
        kept = f"the state of step {step} is kept in {self.checkpoints.folder}" if step else "nothing was trained"
        raise DsparseError(
            f"{what} is {value} at step {step + 1}; {kept}; try a lower learning_rate, a warm-up, other data"
        )
