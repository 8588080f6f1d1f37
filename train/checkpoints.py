"""Checkpoints of a run, by Orbax: the state, the position in the data, and what the run has seen of the dev set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from .step import TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands beside its `TrainState`; JSON values only.

    Attributes:
      epoch: epochs done.
      data: the position in the training data (`TrainIterator.get_state`).
      dev_score: of this epoch.
      best_score: the best dev score so far.
      best_step: the step that reached it first.
      epochs_since_best: epochs done since then.
    """

    epoch: int
    data: dict[str, Any]
    dev_score: float
    best_score: float
    best_step: int
    epochs_since_best: int


class Checkpoints:
    """The checkpoints in a folder: the last one, to go on from, and the best one, to keep.

    Saving is asynchronous; a checkpoint is visible once it is whole. Use as a context manager, which waits at its end.
    """

    def __init__(self, folder: Path) -> None:
        managers = ocp.checkpoint_managers
        best = managers.BestN(get_metric_fn=lambda metrics: metrics["dev_score"], n=1)
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(1), best])
            ),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress) -> None:
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            ),
            # Of equal scores Orbax keeps the later step; the earlier one is the best by our rule.
            metrics={"dev_score": progress.dev_score if progress.best_step == int(state.step) else -1.0},
        )

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, Progress]:
        """The state and progress saved after `step`; `like` gives the structure, shapes and dtypes."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
        )
        return TrainState(**restored["state"]), Progress(**restored["progress"])

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()
