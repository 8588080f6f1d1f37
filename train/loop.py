"""The training loop: epochs of steps, each followed by a look at the dev set and a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..data.errors import InputError
from ..data.pipeline import TrainBatches
from ..data.taxonomy import Task
from ..model.classifier import TextClassifier
from ..model.config import EncoderConfig
from ..model.decode import Calibration
from ..model.predict import Predictor
from ..model.quantize import Weights, flatten, variables
from .checkpoints import Checkpoints, Progress
from .config import Recipe
from .evaluation import TokenizedSplit, measure
from .losses import balanced_class_weights
from .metrics import Metrics
from .probe import probe_head
from .runlog import RunLog
from .step import TrainState, init_state, learning_rate_schedule, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The outcome of `fit`: the best epoch's weights, and how they got there."""

    weights: Weights
    best_score: float
    best_epoch: int
    epochs: int


def fit(
    recipe: Recipe,
    task: Task,
    encoder: EncoderConfig,
    weights: Weights,
    train: TokenizedSplit,
    dev: TokenizedSplit,
    *,
    pad_id: int,
    out: Path,
) -> Fitted:
    """Trains a classifier, from the last checkpoint in `out` if there is one.

    Args:
      recipe: how.
      task: the question.
      encoder: the encoder's config.
      weights: its pretrained weights, by name.
      train, dev: the examples.
      pad_id: fills token rows.
      out: the run's folder, for `checkpoints` and the logs.

    Returns:
      The weights of the epoch with the best dev score: accuracy, or micro-F1 of a multilabel task.

    Raises:
      InputError: the loss became NaN or infinite; the checkpoints in `out` are of other examples or another seed.
    """
    batches = TrainBatches(
        train.ids,
        train.targets_NL,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        pad_id=pad_id,
        num_epochs=recipe.epochs,
    )
    num_steps = recipe.epochs * batches.steps_per_epoch
    schedule = learning_rate_schedule(recipe, num_steps)
    optimizer = make_optimizer(recipe, schedule)
    model = TextClassifier(encoder, len(task.labels), jnp.dtype(recipe.compute_dtype), dropout=recipe.dropout)
    balanced = recipe.class_weights == "balanced"
    train_step = make_train_step(
        model,
        task.kind,
        optimizer,
        label_smoothing=recipe.label_smoothing,
        class_weights_L=balanced_class_weights(task.kind, train.targets_NL) if balanced else None,
        seed=recipe.seed,
    )
    iterator = iter(batches)
    progress = Progress(0, iterator.get_state(), -1.0, -1.0, 0, 0)

    with Checkpoints(out / "checkpoints") as checkpoints:
        last = checkpoints.latest_step
        if last is None and task.kind.exclusive:
            weights = weights | probe_head(recipe, task, encoder, weights, train, dev)
        state = init_state(initial_params(model, weights, recipe.seed), optimizer)
        predictor = Predictor(encoder, len(task.labels), flatten(state.params), "float32", recipe.compute_dtype)
        if last is not None:
            state, progress = checkpoints.restore(state, last)
            iterator.set_state(progress.data)
        with RunLog(out, num_steps, start_step=int(state.step)) as log:
            if last is not None:
                log.say(f"Going on after epoch {progress.epoch} (step {last:,}).")
            while progress.epoch < recipe.epochs and not _is_stuck(progress, recipe.patience):
                state = _train_epoch(train_step, state, iterator, batches.steps_per_epoch, schedule, log)
                metrics = _evaluate(predictor, task, state, dev)
                progress = _advance(progress, iterator.get_state(), _score(task, metrics), int(state.step))
                checkpoints.save(state, progress)
                log.scalars(
                    int(state.step),
                    {"dev/accuracy": metrics.accuracy, "dev/macro_f1": metrics.macro_f1, "dev/ece": metrics.ece},
                )
                best = " (best so far)" if progress.epochs_since_best == 0 else ""
                log.say(
                    f"epoch {progress.epoch}/{recipe.epochs} · dev accuracy {metrics.accuracy:.2%} · "
                    f"macro-F1 {metrics.macro_f1:.3f}{best}"
                )
            if progress.epoch < recipe.epochs:
                log.say(f"Stopped early: no better dev score for {recipe.patience} epochs.")
        checkpoints.wait()
        best_state = state
        if progress.best_step != int(state.step):
            best_state, _ = checkpoints.restore(state, progress.best_step)
    iterator.close()
    best_epoch = progress.best_step // batches.steps_per_epoch
    return Fitted(flatten(jax.device_get(best_state.params)), progress.best_score, best_epoch, progress.epoch)


def initial_params(model: TextClassifier, weights: Weights, seed: int) -> Any:
    """The pretrained encoder under a head of initial values."""
    tokens_BS, lengths_B = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
    rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(seed)}
    params = flatten(jax.jit(model.init)(rngs, tokens_BS, lengths_B)["params"])
    return variables(params | weights, "float32")["params"]


def _train_epoch(train_step, state: TrainState, iterator, num_steps: int, schedule, log: RunLog) -> TrainState:
    """Steps to the end of an epoch. A step is logged after the next one was begun, so that the device never waits."""
    pending: tuple[Callable[[], float], int] | None = None
    step = int(state.step)

    def report() -> None:
        if pending is not None:
            loss, tokens = pending[0](), pending[1]
            log.step(step, loss, tokens, float(schedule(step - 1)))
            if not math.isfinite(loss):
                raise InputError(
                    f"The loss of step {step} is {loss}: training diverged, and no weights of it are of use. "
                    "Begin a new run with a lower learning_rate."
                )

    for _ in range(num_steps - step % num_steps):
        batch = next(iterator)
        state, metrics = train_step(state, batch)
        report()
        step += 1
        pending = (metrics.loss.item, int(batch.lengths_B.sum()))
    report()
    return state


def _evaluate(predictor: Predictor, task: Task, state: TrainState, dev: TokenizedSplit) -> Metrics:
    logits_NL = predictor.with_weights(flatten(state.params)).logits(dev.ids)
    return measure(task, logits_NL, dev.targets_NL, Calibration())


def _score(task: Task, metrics: Metrics) -> float:
    return metrics.accuracy if task.kind.exclusive else metrics.micro_f1


def _advance(progress: Progress, data: dict[str, Any], score: float, step: int) -> Progress:
    better = score > progress.best_score
    return Progress(
        epoch=progress.epoch + 1,
        data=data,
        dev_score=score,
        best_score=max(score, progress.best_score),
        best_step=step if better else progress.best_step,
        epochs_since_best=0 if better else progress.epochs_since_best + 1,
    )


def _is_stuck(progress: Progress, patience: int) -> bool:
    return patience > 0 and progress.epochs_since_best >= patience
