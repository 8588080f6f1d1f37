"""Planning a focus: each layer's share of tokens, for a given loss of accuracy or a given speed, on dev data.

A greedy search from the dense classifier downwards. Each step tries to cut each layer (and those after it that would
keep more) and takes the cut that saves the most time for the least divergence from the dense answers. Answers come from
the masked computation (`focus.mask`), so that one program tries every budget.

Axes: B batch, N texts, L labels of one task, I layers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls
from scipy.special import xlogy

from ..data.buckets import BUCKETS, bucket_for, pad_batch
from ..data.errors import InputError
from ..data.taxonomy import Task
from ..model.bundle import Bundle
from ..model.classifier import TextClassifier
from ..model.config import EncoderConfig
from ..model.decode import probabilities
from ..model.focus import UNITS, Focus, FocusDraw, kept_length
from ..model.precision import Precision
from ..model.quantize import unflatten
from .distributed import say
from .evaluation import measure
from .tokenized import TokenizedSplit

_BATCH_SIZE = 32
# Factor by which a step of the search cuts a layer's share, and the least share of any layer.
STEP, MIN_SHARE = 0.8, 0.03
# Texts on which steps are compared; the result is evaluated on all.
SEARCH_TEXTS = 256
# Predicted speed-up at which the search ends.
MAX_SPEEDUP = 8.0


@dataclasses.dataclass(frozen=True)
class FocusPlan:
    """A planned focus.

    Attributes:
      focus: what each layer keeps.
      accuracy, dense_accuracy: with it and without, on all dev texts.
      speedup: against the dense classifier, predicted; `classer focus-report` measures it.
    """

    focus: Focus
    accuracy: float
    dense_accuracy: float
    speedup: float


def plan_focus(
    bundle: Bundle,
    task: Task,
    dev: TokenizedSplit,
    *,
    max_loss: float | None = None,
    speedup: float | None = None,
    compute_dtype: Precision = Precision.bfloat16,
) -> FocusPlan:
    """The fastest focus within a loss of accuracy, or the most faithful one of a given speed.

    Args:
      bundle: a classifier trained for focus.
      task: one of its tasks.
      dev: labelled texts like those to come, but none that are to be measured afterwards.
      max_loss: points of accuracy on `dev` that may be lost.
      speedup: how many times as fast as the dense classifier; give this or `max_loss`.
      compute_dtype: of activations.

    Raises:
      InputError: the bundle was not trained for focus; not one target is given, or one out of range.
    """
    if (max_loss is None) == (speedup is None):
        raise InputError("Plan for --max-loss or for --speedup: one of them.")
    if speedup is not None and not 1 <= speedup <= MAX_SPEEDUP:
        raise InputError(f"--speedup is {speedup:g}; it must be between 1 and {MAX_SPEEDUP:g}.")
    if max_loss is not None and not max_loss >= 0:
        raise InputError(f"--max-loss is {max_loss:g}; it counts points of accuracy, from 0.")
    if not bundle.encoder.gated:
        bundle.predictor(focus=Focus.pyramid(0.5, bundle.encoder.num_layers))  # says why not
    answers = _Answers(bundle, task, compute_dtype)
    cost = _CostModel.measured(bundle, compute_dtype, max(len(row) for row in dev.ids))
    sample = dev.sample(SEARCH_TEXTS)
    lengths_N = np.array([len(row) for row in dev.ids])
    dense = Focus.pyramid(1, bundle.encoder.num_layers)
    dense_NL = answers(sample.ids, dense)
    dense_seconds = cost(dense, lengths_N)

    def divergence(focus: Focus) -> float:
        return _divergence(task, dense_NL, answers(sample.ids, focus))

    def accuracy(focus: Focus) -> float:
        return measure(task, answers.logits(dev.ids, focus), dev.targets_NL, bundle.calibration[task.name]).accuracy

    dense_accuracy = accuracy(dense)
    best = FocusPlan(dense, dense_accuracy, dense_accuracy, 1.0)
    for focus in greedy_path(divergence, lambda focus: cost(focus, lengths_N), dense):
        faster = dense_seconds / cost(focus, lengths_N)
        if faster > MAX_SPEEDUP:
            break
        if speedup is not None and faster < speedup:
            say(f"{faster:.2f}×: {focus}")
            continue
        plan = FocusPlan(focus, accuracy(focus), dense_accuracy, faster)
        say(f"{faster:.2f}×, accuracy {plan.accuracy:.2%} ({100 * (plan.accuracy - dense_accuracy):+.2f}): {focus}")
        if speedup is not None:
            return plan
        assert max_loss is not None
        if 100 * (dense_accuracy - plan.accuracy) <= max_loss + 1e-9:
            best = plan
        elif 100 * (dense_accuracy - plan.accuracy) > 2 * max_loss + 1:
            break  # accuracy is noisy, so that one step too much does not end the search, but this does
    if speedup is not None:
        raise InputError(f"No focus of this model is {speedup:g} times as fast as the dense classifier.")
    return best


def greedy_path(divergence: Callable[[Focus], float], cost: Callable[[Focus], float], dense: Focus) -> Iterator[Focus]:
    """Yields ever cheaper focuses, each the best step from the one before: least divergence for the time it saves."""
    current, current_cost = dense, cost(dense)
    while True:
        steps = [step for layer in range(len(dense.units)) if (step := _cut(current, layer)) is not None]
        steps = [step for step in steps if cost(step) < current_cost]
        if not steps:
            return
        current = min(steps, key=lambda step: divergence(step) / (cost(dense) - cost(step)))
        current_cost = cost(current)
        yield current


def _cut(focus: Focus, layer: int) -> Focus | None:
    """The focus with one layer cut, and those after it to what it keeps; None where it keeps the least already."""
    share = round(focus.units[layer] * STEP)
    if share < MIN_SHARE * UNITS:
        return None
    return Focus(tuple(min(units, share) if i >= layer else units for i, units in enumerate(focus.units)))


def _divergence(task: Task, dense_NL: np.ndarray, probs_NL: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence from the dense answers, in nats; of a multilabel task summed over labels."""
    tiny = 1e-9
    kl_NL = xlogy(dense_NL, (dense_NL + tiny) / (probs_NL + tiny))
    if not task.kind.exclusive:
        kl_NL += xlogy(1 - dense_NL, (1 - dense_NL + tiny) / (1 - probs_NL + tiny))
    return float(kl_NL.sum(axis=1).mean())


class _Answers:
    """Calibrated probabilities at any focus, from one program for each length."""

    def __init__(self, bundle: Bundle, task: Task, compute_dtype: Precision) -> None:
        self._bundle, self._task = bundle, task
        model = TextClassifier(bundle.encoder, bundle.taxonomy.num_labels, jnp.dtype(compute_dtype), bundle.precision)
        self._variables = jax.device_put({"params": unflatten(bundle.weights)})

        @jax.jit
        def forward(variables: dict, tokens_BS: jax.Array, lengths_B: jax.Array, units_I: jax.Array) -> Any:
            draw = FocusDraw(jnp.tile(units_I, (len(tokens_BS), 1)), jnp.float32(1.0), jnp.ones(len(tokens_BS), bool))
            return model.apply(variables, tokens_BS, lengths_B, draw)

        self._forward = forward

    def logits(self, ids: Sequence[np.ndarray], focus: Focus) -> np.ndarray:
        """The task's slice of the logits, (N, L), in the order of the texts."""
        logits_NL = np.zeros((len(ids), self._bundle.taxonomy.num_labels), np.float32)
        order = np.argsort([len(row) for row in ids], kind="stable")
        units_I = np.asarray(focus.units, np.int32)
        for start in range(0, len(ids), _BATCH_SIZE):
            rows = order[start : start + _BATCH_SIZE]
            length = bucket_for(len(ids[rows[-1]]), BUCKETS)
            tokens_BS, lengths_B = pad_batch([ids[row] for row in rows], _BATCH_SIZE, length, pad_id=0)
            logits_NL[rows] = np.asarray(self._forward(self._variables, tokens_BS, lengths_B, units_I))[: len(rows)]
        return logits_NL[:, self._bundle.taxonomy.slice_of(self._task.name)]

    def __call__(self, ids: Sequence[np.ndarray], focus: Focus) -> np.ndarray:
        return probabilities(self._task, self.logits(ids, focus), self._bundle.calibration[self._task.name])


@dataclasses.dataclass(frozen=True)
class _CostModel:
    """Seconds that a layer takes for n tokens of a text of which m are left after its attention.

    attention · n + quadratic · n² + feed_forward · m
    """

    attention: float
    quadratic: float
    feed_forward: float

    @classmethod
    def measured(cls, bundle: Bundle, compute_dtype: Precision, max_length: int) -> _CostModel:
        """Fitted to the dense classifier at all bucket lengths up to that of the longest text."""
        predictor = bundle.predictor(compute_dtype)
        lengths = [bucket for bucket in BUCKETS if bucket <= bucket_for(max_length, BUCKETS) and bucket >= 32] or [32]
        seconds = []
        for length in lengths:
            program = predictor.compile(8, length)
            tokens_BS, lengths_B = np.zeros((8, length), np.int32), np.full(8, length, np.int32)
            times = []
            for _ in range(6):
                begin = time.perf_counter()
                program(tokens_BS, lengths_B)
                times.append(time.perf_counter() - begin)
            seconds.append(min(times[1:]) / 8 / bundle.encoder.num_layers)
        n = np.array(lengths, float)
        # Relative errors count alike for short and long texts; neither part is negative.
        (linear, quadratic), _ = nnls(np.stack([n, n**2], axis=1) / np.array(seconds)[:, None], np.ones(len(n)))
        share = _attention_share(bundle.encoder)
        return cls(float(share * linear), float(quadratic), float((1 - share) * linear))

    def __call__(self, focus: Focus, lengths_N: np.ndarray) -> float:
        """Mean seconds a text."""
        values, counts = np.unique(lengths_N, return_counts=True)
        kept_IN = np.array([[kept_length(int(n), units) for n in values] for units in focus.units], float)
        read_IN = np.concatenate([values[None], kept_IN[:-1]])
        seconds_IN = self.attention * read_IN + self.quadratic * read_IN**2 + self.feed_forward * kept_IN
        return float((seconds_IN @ counts).sum() / counts.sum())


def _attention_share(encoder: EncoderConfig) -> float:
    """What attention's products have of the multiplications that a layer does for each token."""
    attention = 4 * encoder.d_model
    return attention / (attention + (2 + (encoder.activation != "gelu")) * encoder.d_ff)
