"""What a run is made of: phases, each with its own batches, learning rate, checkpoints and log."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data.pipeline import Batches
from ..data.shards import Shards
from ..data.taxonomy import Taxonomy
from ..model.config import EncoderConfig
from ..model.quantize import Weights
from ..model.sharding import Layout, make_layout
from .config import Recipe
from .tokenized import TokenizedSplit


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a run, with a learning-rate schedule, checkpoints and a log of its own.

    Attributes:
      batches: the training batches.
      num_evals: how often the dev sets are evaluated; an epoch lies between two evaluations.
      patience: as in `Recipe`.
      label_smoothing: as in `Recipe`.
      learning_rate: its peak.
      folder: for `checkpoints`, `metrics.jsonl` and `tensorboard`.
      dev_tasks: the tasks whose dev sets are evaluated.
      new_tasks: the tasks whose head `probe_head` fits before the first step.
      focuses: the focuses that the dev sets are evaluated at; the score is the mean over them.
      focus_from: where the schedule of random budgets starts, as a share of it (see `focus.draw_focus`); None trains
        the dense classifier.
      dense: a dense classifier whose answers each step mixes into the targets; None for none.
    """

    batches: Batches[Any]
    num_evals: int
    patience: int
    label_smoothing: float
    learning_rate: float
    folder: Path
    dev_tasks: tuple[str, ...]
    new_tasks: tuple[str, ...] = ()
    focuses: tuple[float, ...] = (1.0,)
    focus_from: float | None = None
    dense: Weights | None = None


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The outcome of a phase, or of a run.

    Attributes:
      weights: of the kept epoch.
      score: its dev score; -1 where no epoch was trained.
      kept_epoch: its number, of `epochs` that were trained.
    """

    weights: Weights
    score: float
    kept_epoch: int
    epochs: int


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """Execution settings; they do not affect the learned weights.

    Attributes:
      layout: of the devices; None uses all of them for data parallelism.
      save_steps, save_minutes: see `preemption.CheckpointSchedule`.
      config: kept in the checkpoints.
    """

    layout: Layout | None = None
    save_steps: int = 0
    save_minutes: float = 0.0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainContext:
    """What all phases of a run have in common.

    Attributes:
      recipe: how to train.
      taxonomy: the tasks.
      encoder: the encoder's config; `gated` if the recipe has epochs of focus.
      train, dev: the examples, by task.
      pad_id: fills token rows.
      out: the run's folder.
      execution: settings that do not affect the weights.
      shards: the training examples where they are read from disk; `train` is then a sample of them.
    """

    recipe: Recipe
    taxonomy: Taxonomy
    encoder: EncoderConfig
    train: Mapping[str, TokenizedSplit]
    dev: Mapping[str, TokenizedSplit]
    pad_id: int
    out: Path
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    shards: Shards | None = None

    @property
    def layout(self) -> Layout:
        return make_layout() if self.execution.layout is None else self.execution.layout

    @property
    def label_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of training examples of each label (L,), and of each task those that have labels (T,)."""
        if self.shards is not None:
            return self.shards.label_counts_L, self.shards.rows_T
        splits = [self.train[task.name] for task in self.taxonomy.tasks]
        positives = [np.asarray(split.targets.sum(axis=0)).ravel() for split in splits]
        return np.concatenate(positives), np.array([split.labelled_N.sum() for split in splits])
