"""Saved states of a run: everything an exact continuation needs, written in the background by Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dsparse.checkpoints import saving
from dsparse.errors import DsparseError
from dsparse.training.step import TrainState


class Checkpoints:
    """The states saved in a folder, one subfolder a step; one that was interrupted never looks complete."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(keep), cleanup_tmp_directories=True, create=True
        )
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Copy the state and write it in the background, once the save before it is done.

        data: where the run stands in its data (`Batches.state`).

        Raises:
            DsparseError: the disk has no room for it.
        """
        self.manager.wait_until_finished()
        self.check_space(step, state)
        run = {"data": data, "params": _shapes(state)}
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), run=ocp.args.JsonSave(run)), force=True
        )

    def check_space(self, step: int, state: TrainState) -> None:
        """Raise DsparseError if the disk has no room for a state: the background writer fails less clearly."""
        saving.check_space(self.folder / str(step), sum(array.nbytes for array in jax.tree.leaves(state)))

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The latest state, sharded as `like`, whose arrays are given up; and where that run stood in its data.

        Raises:
            DsparseError: the state was saved from another model.
        """
        step = self.latest()
        run = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        saved, wanted = run["params"], _shapes(like)
        different = [name for name in wanted | saved if wanted.get(name) != saved.get(name)]
        if different:
            name = different[0]
            raise DsparseError(
                f"cannot resume: {self.folder / str(step)} was saved from another model "
                f"({name}: {saved.get(name, 'not trained')} there, {wanted.get(name, 'not trained')} here)"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        jax.tree.map(lambda array: array.delete(), like)
        how = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        return self.manager.restore(step, args=ocp.args.Composite(state=how))["state"], run["data"]

    def close(self) -> None:
        """Wait for what is being written."""
        self.manager.wait_until_finished()
        self.manager.close()


def _shapes(state: TrainState) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in sorted(state.params.items())}
