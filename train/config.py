"""The settings of a training run: a job (which data, where to) and a recipe (how to train)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..data.buckets import BUCKETS
from ..data.errors import InputError
from ..data.readers import read_mapping
from ..data.taxonomy import TaskKind
from ..model.precision import ComputeDtype, Precision
from ..model.pretrained import MINILM


@dataclasses.dataclass(frozen=True)
class CurriculumStage:
    """A stage of the training, on some of the tasks.

    Attributes:
      name: of the stage; its checkpoints and log are in a folder of that name.
      kinds: the kinds of tasks that the stage is for: binary, multiclass, multilabel, hierarchical.
      tasks: the names of tasks that it is for, beside those of `kinds`; neither means all.
      weights: factors on how often a task is drawn, by its name; 1 where it is not named.
      temperature: see `data.curriculum.sampling_shares`; 1 draws tasks in proportion to their examples.
      replay: the share of the examples that are drawn from the tasks of earlier stages instead.
      epochs: passes over the stage's own examples, as many draws as they would be.
      steps: how many steps instead; 0 goes by `epochs`.
      learning_rate: its peak; None takes the recipe's.
    """

    name: str
    kinds: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0
    replay: float = 0.0
    epochs: float = 1.0
    steps: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name in (".", ".."):
            raise InputError(f"A stage's name names a folder: letters, digits, '_', '-' and '.'; it is '{self.name}'.")
        where = f"Stage '{self.name}'"
        for kind in self.kinds:
            if kind not in tuple(TaskKind):
                raise InputError(f"{where}: there is no kind '{kind}', only {', '.join(TaskKind)}.")
        if not all(0 < weight < math.inf for weight in self.weights.values()):
            raise InputError(f"{where}: weights must be finite and above 0; leave a task out of the stage instead.")
        if not (self.temperature > 0 and 0 <= self.replay < 1 and 0 < self.epochs < math.inf and self.steps >= 0):
            raise InputError(
                f"{where}: temperature and epochs must be above 0, epochs finite, steps not below, replay from 0 to 1."
            )
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            raise InputError(f"{where}: learning_rate must be finite and at least 0; it is {self.learning_rate}.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. Presets are recipes under a name.

    Attributes:
      encoder: the pretrained encoder: a folder, or a name on the Hugging Face hub; a native size to train from nothing:
        classer-5m, -22m, -110m, -400m, -1b; or a float32 bundle, to go on training it: with its head if it has the
        same tasks and labels, else from its encoder alone; or several of the same labels with commas between, to begin
        with the mean of their weights.
      max_length: tokens that a text is cut to, special tokens included.
      epochs: passes over the training examples; 0 leaves a bundle of the same labels as it is, for `focus_epochs` to
        go on with, or to be calibrated, quantised and measured.
      focus_epochs: passes after those that teach Focused Attention; 0 leaves the classifier dense.
      batch_size: examples a step.
      learning_rate: its peak, after the warm-up; it then falls to 0 along a cosine.
      warmup: the share of all steps in which the learning rate rises.
      weight_decay: of kernels and embedding tables (AdamW).
      max_grad_norm: gradients of a larger global norm are scaled down to it.
      label_smoothing: probability mass that single-label targets spread over all labels.
      class_weights: `balanced` weighs each label by the inverse of its frequency; of a multilabel task, where it holds.
      dropout: rate on embeddings, attention weights and sublayers.
      scan: run the layers in one loop, so that compiling takes no longer for a deeper encoder (see `Encoder`).
      remat: compute activations again in the backward pass, which saves memory.
      compute_dtype: of activations and products; parameters, sums and the optimiser are float32.
      dev_fraction: share of the training examples set aside for development where no dev examples are given.
      curriculum: stages that follow one another; none trains `epochs` epochs on all examples alike.
      soft_share: what a teacher's answer weighs in the loss beside the example's own label (see `soft_labels`).
      soft_temperature: what teacher and student are softened by (see `losses.classification_loss`).
      relation_share: what the teachers' relations between texts weigh in the loss, beside the labels and answers (see
        `losses.relation_loss`); above 0 it needs their vectors: `classer teach --relations`.
      patience: epochs without a better dev score after which training stops early; 0 never stops early.
      seed: of the split, the shuffles, the head's initial values and dropout.
    """

    encoder: str = MINILM
    max_length: int = 256
    epochs: int = 8
    focus_epochs: int = 0
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.05
    class_weights: Literal["none", "balanced"] = "none"
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    compute_dtype: ComputeDtype = Precision.bfloat16
    dev_fraction: float = 0.1
    curriculum: Annotated[tuple[CurriculumStage, ...], tyro.conf.Suppress] = ()
    soft_share: float = 0.7
    soft_temperature: float = 2.0
    relation_share: float = 0.0
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_length", 8, BUCKETS[-1]),
            ("epochs", 0, None),
            ("focus_epochs", 0, None),
            ("batch_size", 1, None),
            ("learning_rate", 0, None),
            ("warmup", 0, 1),
            ("weight_decay", 0, None),
            ("max_grad_norm", 1e-6, None),
            ("label_smoothing", 0, 1),
            ("dropout", 0, 0.9),
            ("dev_fraction", 0.001, 0.9),
            ("soft_share", 0, 1),
            ("soft_temperature", 0.1, 100),
            ("relation_share", 0, None),
            ("patience", 0, None),
            ("seed", 0, None),
        ):
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):  # also when NaN
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise InputError(f"{name} must be {bounds}; it is {value}.")
        names = [stage.name for stage in self.curriculum]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"The curriculum has two stages called '{name}'; their names must differ.")


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """One training run.

    Attributes:
      data: a CSV, TSV, JSONL or Parquet file of labelled texts; a folder with task.json (or task.yaml) and one file a
        split; a folder of such folders, for a classifier of several tasks; or what `classer prepare` made.
      out: the run's folder: made by the run, and refused if it holds anything (see `resume`).
      recipe: how to train.
      dev: a file of examples to tell epochs apart and calibrate on; by default a share of the training examples.
      test: a file of examples to measure the finished model on.
      text_column: the column or field that holds the text.
      label_column: the column or field that holds the label or labels; by default `label` or `labels`.
      curriculum: a JSON or YAML file with a list of stages; see `CurriculumStage` and docs/guide/curricula.md.
      soft_labels: a JSON Lines file of a teacher's answers, as `classer teach` writes it.
      texts: learn from at most so many of each task's training examples, drawn at random; 0 is all.
      held_out_texts: use at most so many of each task's development and test examples, drawn at random; 0 is all.
      resume: go on with the run in `out` from its last checkpoint.
      baseline: also train TF-IDF + linear SVM on the same examples, and print both scores.
      fsdp: devices that parameters and optimiser are divided over; fsdp × tensor must divide the number of devices.
      tensor: devices that attention heads, hidden units and labels are divided over.
      input_workers: processes that make batches of what `classer prepare` made, for each process that trains; 0 makes
        them in a thread of that one, which does for all but the fastest devices.
      save_minutes: save within an epoch when so many have passed; 0 saves at the ends of epochs only.
      save_steps: save within an epoch every so many steps; 0 leaves it to save_minutes.
      restartable: begin the run, go on with it, or leave it finished, whichever `out` calls for; tools/launch.py says
        so, for schedulers that give the same command again.
    """

    data: Path
    out: Path
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    dev: Path | None = None
    test: Path | None = None
    text_column: str = "text"
    label_column: str | None = None
    curriculum: Path | None = None
    soft_labels: Path | None = None
    texts: int = 0
    held_out_texts: int = 0
    resume: bool = False
    baseline: bool = False
    fsdp: int = 1
    tensor: int = 1
    input_workers: int = 0
    save_minutes: float = 10.0
    save_steps: int = 0
    restartable: bool = False

    def __post_init__(self) -> None:
        for name, low in (("fsdp", 1), ("tensor", 1), ("input_workers", 0), ("save_minutes", 0), ("save_steps", 0)):
            if not getattr(self, name) >= low:
                raise InputError(f"{name} must be at least {low}; it is {getattr(self, name)}.")
        for name in ("texts", "held_out_texts"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; give a number of examples, or 0 for all.")
        if self.recipe.relation_share and self.soft_labels is None:
            raise InputError("relation_share needs teachers' vectors, which stand beside soft labels; name these too.")


def read_curriculum(path: Path) -> tuple[CurriculumStage, ...]:
    """The stages that a JSON or YAML file lists: each an object with fields of `CurriculumStage`.

    Raises:
      InputError: unreadable, or not such a list; a field that there is not, or with a value that it cannot have.
    """
    entries = read_mapping(path)
    if isinstance(entries, dict):
        entries = entries.get("stages")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path} must hold a list of stages, each with a name and what it trains on.")
    return tuple(_stage(entry, f"{path}, stage {number}") for number, entry in enumerate(entries, start=1))


def _stage(entry: dict[str, Any], source: str) -> CurriculumStage:
    kinds = {
        "name": str,
        "kinds": list,
        "tasks": list,
        "weights": dict,
        "temperature": (int, float),
        "replay": (int, float),
        "epochs": (int, float),
        "steps": int,
        "learning_rate": (int, float),
    }
    for name, value in entry.items():
        if name not in kinds:
            raise InputError(f"{source}: there is no field '{name}'; there are {', '.join(kinds)}.")
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise InputError(f"{source}: '{name}' cannot be {value!r}.")
    if "name" not in entry:
        raise InputError(f"{source} has no name.")
    for name in ("kinds", "tasks"):
        if not all(isinstance(item, str) for item in entry.get(name, [])):
            raise InputError(f"{source}: '{name}' must list names.")
    if not all(isinstance(weight, int | float) for weight in entry.get("weights", {}).values()):
        raise InputError(f"{source}: 'weights' must be numbers by task name.")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    try:
        return CurriculumStage(**fields)
    except InputError as e:
        raise InputError(f"{source}: {e}") from None
