"""Training a classifier to focus: soft gates first, then hard selection, distilled from its own dense answers.

The first part of the steps dims tokens by soft gates whose temperature falls. In the rest half of the rows drop them;
the others keep training the gates, which only soft rows can. Each row of each step draws its own budget, so that one
set of weights serves all of them. The dense classifier's answers from before this training are mixed into the targets
(self-distillation). docs/internals/focus.md has the maths.

Axes: B batch, I layers, N examples, L labels of one task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.sparse import csr_array
from tqdm import tqdm

from ..data.files import atomic_write
from ..data.soft_labels import SMALLEST
from ..data.taxonomy import Task, Taxonomy
from ..model.config import EncoderConfig
from ..model.decode import Calibration, probabilities
from ..model.focus import UNITS, FocusDraw
from ..model.precision import Precision
from ..model.predict import Predictor
from ..model.quantize import Weights
from .config import Recipe
from .distributed import is_quiet
from .tokenized import TokenizedSplit

# Share of the steps with soft gates, and their temperature at both ends; it falls geometrically, and stays.
SOFT_SHARE = 0.25
GATE_TEMPERATURES = (1.0, 0.1)
# Share of the rows that stay soft in the other steps, and teach the gates there.
SOFT_ROWS = 0.5
# Share of the rows that keep everything, so that the dense classifier stays what it was.
DENSE_ROWS = 0.2
# The least share that the last layer keeps, and the range of the exponents by which budgets fall over the layers.
MIN_END = 0.03
SHAPES = (0.5, 1.5)
# Weight of the dense classifier's answer in a target; the label has the rest.
TEACHER_SHARE = 0.7
# With more labels than this, the least probable ones are dropped.
MANY_LABELS = 1000
# The dev score of a set of weights is its mean over these.
DEV_FOCUSES = (1.0, 0.35)


def draw_focus(rng: jax.Array, num_rows: int, num_layers: int, done: jax.Array) -> FocusDraw:
    """A random budget for each row: of layers 1 to I, layer i keeps the share end^((i / I)^shape).

    Args:
      rng: a key; the draw is a function of it.
      num_rows: B.
      num_layers: I.
      done: the share of the training's steps that are done, in [0, 1].
    """
    keys = jax.random.split(rng, 4)
    log_end_B1 = jax.random.uniform(keys[0], (num_rows, 1), minval=np.log(MIN_END), maxval=0.0)
    shape_B1 = jax.random.uniform(keys[1], (num_rows, 1), minval=SHAPES[0], maxval=SHAPES[1])
    shares_BI = jnp.exp(log_end_B1 * (jnp.arange(1, num_layers + 1) / num_layers) ** shape_B1)
    dense_B1 = jax.random.bernoulli(keys[2], DENSE_ROWS, (num_rows, 1))
    units_BI = jnp.where(dense_B1, UNITS, jnp.maximum(1, jnp.round(shares_BI * UNITS))).astype(jnp.int32)
    first, last = GATE_TEMPERATURES
    temperature = first * (last / first) ** jnp.minimum(done / SOFT_SHARE, 1.0)
    hard_B = (done >= SOFT_SHARE) & jax.random.bernoulli(keys[3], 1 - SOFT_ROWS, (num_rows,))
    return FocusDraw(units_BI, temperature, hard_B)


def distilled(
    recipe: Recipe,
    taxonomy: Taxonomy,
    encoder: EncoderConfig,
    weights: Weights,
    train: Mapping[str, TokenizedSplit],
    out: Path,
) -> dict[str, TokenizedSplit]:
    """The training examples of each task with the dense classifier's answers mixed into their targets.

    Args:
      recipe: for the compute dtype and the label smoothing, which hides from the student what it hid from the teacher.
      taxonomy: whose labels they are.
      encoder, weights: the trained classifier.
      train: the examples.
      out: keeps the answers, so that a run that goes on does so with the very same ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    predictor = Predictor(encoder, taxonomy.num_labels, weights, Precision.float32, recipe.compute_dtype)
    mixed = {}
    for task in taxonomy.tasks:
        if (split := train.get(task.name)) is None:
            continue
        answers = _answers(predictor, taxonomy, task, split, out / f"teacher-{taxonomy.tasks.index(task)}.npz")
        known = split.targets
        if split.soft is not None:  # where there is no label, a teacher's answer stands for it
            known = known + split.soft.multiply(~split.labelled_N[:, None])
        targets = csr_array(TEACHER_SHARE * answers + (1 - TEACHER_SHARE) * known)
        mixed[task.name] = dataclasses.replace(split, targets=targets, soft=None, has_soft_N=None, vectors_NV=None)
    return mixed


def _answers(predictor: Predictor, taxonomy: Taxonomy, task: Task, split: TokenizedSplit, file: Path) -> csr_array:
    """The classifier's probabilities of what can be given as an answer, sparse (N, L); read from the file if it is."""
    if file.is_file():
        return sparse.load_npz(file)
    with tqdm(
        total=len(split.ids), desc=f"Dense answers, {task.name}", unit="text", mininterval=1, disable=is_quiet()
    ) as bar:
        logits_NL = predictor.logits(split.ids, columns=taxonomy.slice_of(task.name), progress=bar.update)
    probs_NL = np.where(task.leaves_L, probabilities(task, logits_NL, Calibration()), 0.0)
    if len(task.labels) > MANY_LABELS:
        probs_NL = np.where(probs_NL >= SMALLEST, probs_NL, 0.0)
    if task.kind.exclusive:
        probs_NL /= probs_NL.sum(axis=1, keepdims=True)
    answers = csr_array(probs_NL.astype(np.float32))
    with atomic_write(file) as part, part.open("wb") as opened:
        sparse.save_npz(opened, answers)
    return answers
