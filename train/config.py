"""What a training run is told: a job (which data, where to) and a recipe (how to train)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from ..data.buckets import BUCKETS
from ..data.errors import InputError
from ..model.config import ComputeDtype
from ..model.pretrained import MINILM


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. Presets are recipes under a name.

    Attributes:
      encoder: the pretrained encoder: a folder, or a name on the Hugging Face hub; or a native size to train from
        nothing: classer-5m, -22m, -110m, -400m, -1b.
      max_length: tokens that a text is cut to, special tokens included.
      epochs: passes over the training examples.
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
    compute_dtype: ComputeDtype = "bfloat16"
    dev_fraction: float = 0.1
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_length", 8, BUCKETS[-1]),
            ("epochs", 1, None),
            ("focus_epochs", 0, None),
            ("batch_size", 1, None),
            ("learning_rate", 0, None),
            ("warmup", 0, 1),
            ("weight_decay", 0, None),
            ("max_grad_norm", 1e-6, None),
            ("label_smoothing", 0, 1),
            ("dropout", 0, 0.9),
            ("dev_fraction", 0.001, 0.9),
            ("patience", 0, None),
            ("seed", 0, None),
        ):
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):  # also when NaN
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise InputError(f"{name} must be {bounds}; it is {value}.")


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """One training run.

    Attributes:
      data: a CSV, TSV, JSONL or Parquet file of labelled texts, or a folder with task.json and one file a split.
      out: the run's folder: made by the run, and refused if it holds anything (see `resume`).
      recipe: how to train.
      dev: a file of examples to choose the best epoch and calibrate on; by default a share of the training examples.
      test: a file of examples to measure the finished model on.
      text_column: the column or field that holds the text.
      label_column: the column or field that holds the label or labels; by default `label` or `labels`.
      texts: learn from at most so many of the training examples, drawn at random; 0 is all.
      resume: go on with the run in `out` from its last checkpoint.
      baseline: also train TF-IDF + linear SVM on the same examples, and print both scores.
    """

    data: Path
    out: Path
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    dev: Path | None = None
    test: Path | None = None
    text_column: str = "text"
    label_column: str | None = None
    texts: int = 0
    resume: bool = False
    baseline: bool = False

    def __post_init__(self) -> None:
        if self.texts < 0:
            raise InputError(f"texts is {self.texts}; give a number of examples, or 0 for all.")
