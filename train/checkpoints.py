"""Checkpoints of a run, by Orbax: the state, the position in the data, and the dev scores.

Dropout and budgets are functions of the recipe's seed and the step, so that no other random state needs to be saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import math
import shutil
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ..data.errors import InputError
from ..data.files import atomic_write, disk_error
from .distributed import all_gather, is_primary, on_primary, say
from .step import TrainState

MAX_REASON = 120  # characters of a library's message in a sentence for the user


@dataclasses.dataclass(frozen=True)
class Progress:
    """Host-side progress that is saved with `TrainState`; JSON values only.

    Attributes:
      epoch: epochs done.
      data: the position in the training data (`BatchIterator.get_state`).
      dev_score: of the last epoch done.
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

    def after_epoch(self, data: dict[str, Any], score: float, step: int) -> Progress:
        """The progress after another epoch, which ended at `step` steps and this position in the data."""
        better = score > self.best_score
        return Progress(
            epoch=self.epoch + 1,
            data=data,
            dev_score=score,
            best_score=max(score, self.best_score),
            best_step=step if better else self.best_step,
            epochs_since_best=0 if better else self.epochs_since_best + 1,
        )

    def is_stuck(self, patience: int) -> bool:
        """Whether `patience` epochs have passed without a better dev score; never where it is 0."""
        return patience > 0 and self.epochs_since_best >= patience

    def keeps_last(self, num_evals: int, dev_sizes: Sequence[int]) -> bool:
        """Whether the last epoch is kept: all epochs were trained, and none was better by more than chance.

        The learning rate is lowest at the end, and the highest of many dev scores is biased upwards.

        Args:
          num_evals: epochs that the whole training has.
          dev_sizes: examples of each task that the score is a mean over. Chance is one standard error of the best
            score, taken as a mean of shares of these.
        """
        share = min(max(self.best_score, 0.0), 1.0)
        variance = share * (1 - share) * sum(1 / size for size in dev_sizes) / len(dev_sizes) ** 2
        return self.epoch == num_evals and self.dev_score >= self.best_score - math.sqrt(variance)


class Checkpoints:
    """The checkpoints in a folder: the last two, to resume from, and the best one.

    Saving is asynchronous; a checkpoint is visible once it is complete, and then gets a file of checksums. Damaged
    checkpoints are moved aside when the folder is opened. With several processes, all open, save and restore together.
    Use it as a context manager; it waits for the last save at its end.

    Args:
      folder: made if missing.
      config: the run's settings; kept in each checkpoint, for people and tools.
    """

    def __init__(self, folder: Path, *, config: dict[str, Any] | None = None) -> None:
        self._folder, self._config = folder.resolve(), config or {}
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        on_primary(self._put_damaged_aside)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        managers = ocp.checkpoint_managers
        best = managers.BestN(get_metric_fn=lambda metrics: metrics["dev_score"], n=1)
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(2), best]),
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress, *, epoch_ends: bool = True) -> None:
        """Begins to save; a step that is saved already is left as it is.

        Raises:
          InputError: an earlier checkpoint could not be written.
        """
        step = int(state.step)
        # Of equal scores Orbax keeps the later step; the earlier one is the best by our rule.
        score = progress.dev_score if epoch_ends and progress.best_step == step else -1.0
        with self._naming_failures():
            self._manager.wait_until_finished()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
                    config=ocp.args.JsonSave(self._config),
                ),
                metrics={"dev_score": score},
            )
        if is_primary():
            self._watcher = threading.Thread(target=self._add_checksums, args=(step, self._watcher), daemon=True)
            self._watcher.start()

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, Progress]:
        """The state and progress saved after `step`.

        Args:
          like: gives structure, shapes, dtypes and shardings, which need not be those that were saved.
          step: one of those saved.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        # Each process restores by itself: one that cannot read would block the others in a barrier.
        rank = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(rank, {rank}, f"process-{rank}")
        self.wait()
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as checkpointer:
            restored = checkpointer.restore(
                self._folder / str(step),
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
            )
        return TrainState(**restored["state"]), Progress(**restored["progress"])

    def restore_latest(self, like: TrainState) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint that can be read, straight to the devices as `like` says; None where there is none."""
        while (step := self._manager.latest_step()) is not None:
            restored, reason = None, ""
            try:
                with _silenced("absl", "asyncio"):
                    restored = self.restore(like, step)
            except Exception as e:  # Orbax and TensorStore raise many kinds for a file that is not whole
                reason = f"it cannot be read: {_clause(e)}"
            reason = next(filter(None, all_gather(reason)), "")  # all processes restore it, or none does
            if restored is not None and not reason:
                state, progress = restored
                if progress.epoch and progress.best_step not in self._manager.all_steps():
                    say("Warning: the checkpoint of the best epoch is lost; the best of those to come counts.")
                    progress = dataclasses.replace(progress, best_score=-1.0, best_step=step)
                return state, progress
            self._manager.close()
            on_primary(functools.partial(self._put_aside, step, reason))
            self._manager = self._open()
        return None

    def wait(self) -> None:
        """Waits until all checkpoints are written; raises InputError as `save`."""
        with self._naming_failures():
            self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            with self._naming_failures():
                self._manager.close()
        except Exception as e:
            if kind is None:
                raise
            # The error that ends the run is the one to report.
            say(f"Warning: the last checkpoint may be missing: {e}")
        finally:
            self._closed.set()
            if self._watcher is not None:
                self._watcher.join()
                self._drop_checksums()

    def _naming_failures(self) -> _NamingFailures:
        return _NamingFailures(self._folder)

    def _steps(self) -> list[int]:
        folders = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted(int(path.name) for path in folders if path.is_dir() and path.name.isdecimal())

    def _add_checksums(self, step: int, before: threading.Thread | None) -> None:
        """Waits until a checkpoint is whole, which shows in its name, and writes its checksums; in a thread."""
        if before is not None:
            before.join()
        folder, file = self._folder / str(step), self._checksums_of(step)
        while not folder.is_dir() and not self._closed.wait(0.1):
            pass
        try:
            if folder.is_dir():
                with atomic_write(file) as part:
                    part.write_text(json.dumps(_checksums(folder), indent=1), encoding="utf-8")
            self._drop_checksums()
        except (OSError, InputError):
            file.unlink(missing_ok=True)  # a full disk, or a checkpoint that made way for a newer one meanwhile

    def _drop_checksums(self) -> None:
        """Deletes the checksums of deleted checkpoints."""
        kept = {str(step) for step in self._steps()}
        for file in self._folder.glob("checksums-*.json"):
            if file.stem.removeprefix("checksums-") not in kept:
                file.unlink()

    def _put_damaged_aside(self) -> None:
        for path in sorted(self._folder.glob("*.orbax-checkpoint-tmp*")):  # Orbax removes them
            say(f"Warning: a checkpoint was half written when the run ended ({path.name}); it is passed over.")
        for step in self._steps():
            try:
                expected = json.loads(self._checksums_of(step).read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue  # the run was killed right after it had become whole
            except ValueError:
                self._checksums_of(step).unlink()
                continue
            found = _checksums(self._folder / str(step))
            for name, checksum in expected.items():
                if found.get(name) != checksum:
                    self._put_aside(step, f"its file {name} is {'changed' if name in found else 'missing'}")
                    break

    def _put_aside(self, step: int, reason: str) -> None:
        aside = self._folder.with_name(f"{self._folder.name}-damaged") / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        (self._folder / str(step)).rename(aside)
        self._checksums_of(step).unlink(missing_ok=True)
        before = [other for other in self._steps() if other < step]
        going_on = f"going on from step {before[-1]:,}" if before else "there is none before it, so the run begins anew"
        say(f"Warning: the checkpoint of step {step:,} is damaged ({reason}); {going_on}. It is now {aside}.")

    def _checksums_of(self, step: int) -> Path:
        return self._folder / f"checksums-{step}.json"


@contextlib.contextmanager
def _silenced(*names: str) -> Iterator[None]:
    """Drops the records of these loggers.

    For a damaged checkpoint, Orbax (through absl) and asyncio log a traceback for each array, and raise as well.
    """
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(_drop)
    try:
        yield
    finally:
        gc.collect()  # asyncio logs the exceptions of tasks that nobody awaited when they are collected
        for logger in loggers:
            logger.removeFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return False


def _clause(error: Exception) -> str:
    """The first line of an error, cut where it begins to list details."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= MAX_REASON else line[:MAX_REASON].rsplit(" ", 1)[0] + " …"


class _NamingFailures:
    """Re-raises Orbax's write errors as one sentence."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, InputError):
            return
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        known = ("Permission denied", "RESOURCE_EXHAUSTED")
        reason = disk_error(error) or next((name for name in known if name in str(error)), None)
        if reason is None and not isinstance(error, OSError):
            return
        free = shutil.disk_usage(self._folder).free / 1e6
        raise InputError(
            f"A checkpoint could not be written to {self._folder} ({reason or lines[0][:200]}; {free:,.0f} MB are free "
            "there). The checkpoints before it are whole: make room, and give the same command with --resume."
        ) from error


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file, by its name within the folder."""
    return {str(file.relative_to(folder)): _crc(file) for file in sorted(_files(folder))}


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _crc(file: Path) -> int:
    value = 0
    with file.open("rb") as source:
        while block := source.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
