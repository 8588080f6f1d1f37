"""The training loop: epochs of steps, each followed by a look at the dev set and a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..data.errors import InputError
from ..data.pipeline import TrainBatches
from ..data.taxonomy import Task
from ..model.classifier import TextClassifier
from ..model.config import EncoderConfig
from ..model.decode import Calibration
from ..model.encoder import FocusDraw
from ..model.focus import Focus
from ..model.predict import Predictor
from ..model.quantize import Weights, flatten, variables
from ..model.stacking import stack_layers, unstack_layers
from .checkpoints import Checkpoints, Progress
from .config import Recipe
from .evaluation import TokenizedSplit, measure
from .focus import DEV_FOCUSES, distilled, draw_focus
from .losses import balanced_class_weights
from .probe import probe_head
from .runlog import RunLog
from .step import TrainState, TrainStep, init_state, learning_rate_schedule, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The outcome of `fit`: the best epoch's weights, and how they got there."""

    weights: Weights
    best_score: float
    best_epoch: int
    epochs: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run with a learning-rate schedule, checkpoints and a log of its own.

    Attributes:
      epochs: passes over the training examples.
      patience: as in `Recipe`.
      label_smoothing: as in `Recipe`.
      folder: for `checkpoints`, `metrics.jsonl` and `tensorboard`.
      focuses: what the dev set is read with after each epoch; the score is the mean over them.
      draws_focus: whether rows are trained with budgets drawn at random.
    """

    epochs: int
    patience: int
    label_smoothing: float
    folder: Path
    focuses: tuple[float, ...] = (1.0,)
    draws_focus: bool = False


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
    """Trains a classifier, from the last checkpoint in `out` if there is one: dense, then to focus if the recipe says.

    Args:
      recipe: how.
      task: the question.
      encoder: the encoder's config; `gated` if the recipe has epochs of focus.
      weights: its pretrained weights, by name; none to begin with random ones.
      train, dev: the examples.
      pad_id: fills token rows.
      out: the run's folder, for `checkpoints` and the logs; those of the second stage are in its folder `focus`.

    Returns:
      The weights of the epoch with the best dev score: accuracy, or micro-F1 of a multilabel task. After training for
      focus that is the mean over `focus.DEV_FOCUSES`, of that stage's epochs.

    Raises:
      InputError: the loss became NaN or infinite; the checkpoints in `out` are of other examples or another seed.
    """
    dense = Stage(recipe.epochs, recipe.patience, recipe.label_smoothing, out)
    fitted = _fit_stage(dense, recipe, task, encoder, weights, train, dev, pad_id)
    if not recipe.focus_epochs:
        return fitted
    print("Training to focus, beside the dense classifier's answers.", flush=True)
    folder = out / "focus"
    train = distilled(recipe, task, encoder, fitted.weights, train, folder)
    focused = Stage(recipe.focus_epochs, 0, 0.0, folder, DEV_FOCUSES, draws_focus=True)
    return _fit_stage(focused, recipe, task, encoder, fitted.weights, train, dev, pad_id)


def _fit_stage(
    stage: Stage,
    recipe: Recipe,
    task: Task,
    encoder: EncoderConfig,
    weights: Weights,
    train: TokenizedSplit,
    dev: TokenizedSplit,
    pad_id: int,
) -> Fitted:
    batches = TrainBatches(
        train.ids,
        train.targets_NL,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        pad_id=pad_id,
        num_epochs=stage.epochs,
    )
    schedule = learning_rate_schedule(recipe, batches.num_steps)
    optimizer = make_optimizer(recipe, schedule)
    model = TextClassifier(
        encoder,
        len(task.labels),
        jnp.dtype(recipe.compute_dtype),
        dropout=recipe.dropout,
        scan=recipe.scan,
        remat=recipe.remat,
    )
    train_step = _make_step(stage, recipe, task, model, optimizer, train, batches.num_steps)
    iterator = iter(batches)
    progress = Progress(0, iterator.get_state(), -1.0, -1.0, 0, 0)

    with Checkpoints(stage.folder / "checkpoints") as checkpoints, contextlib.closing(iterator):
        last = checkpoints.latest_step
        if last is None and task.kind.exclusive and weights and "head.kernel" not in weights:
            weights = weights | probe_head(recipe, task, encoder, weights, train, dev)
        state = init_state(initial_params(model, weights, recipe.seed), optimizer)
        look = _DevLook(stage, recipe, task, encoder, state, dev)
        if last is not None:
            state, progress = checkpoints.restore(state, last)
            iterator.set_state(progress.data)
        with RunLog(stage.folder, batches.num_steps, start_step=int(state.step)) as log:
            if last is not None:
                log.say(f"Going on after epoch {progress.epoch} (step {last:,}).")
            while progress.epoch < stage.epochs and not _is_stuck(progress, stage.patience):
                state = _train_epoch(train_step, state, iterator, batches.steps_per_epoch, schedule, log)
                score = look(state, log)
                progress = _advance(progress, iterator.get_state(), score, int(state.step))
                checkpoints.save(state, progress)
                best = " (best so far)" if progress.epochs_since_best == 0 else ""
                log.say(f"epoch {progress.epoch}/{stage.epochs} · dev {look.sentence}{best}")
            if progress.epoch < stage.epochs:
                log.say(f"Stopped early: no better dev score for {stage.patience} epochs.")
        checkpoints.wait()
        best_state = state
        if progress.best_step != int(state.step):
            best_state, _ = checkpoints.restore(state, progress.best_step)
    best_epoch = progress.best_step // batches.steps_per_epoch
    best = unstack_layers(flatten(jax.device_get(best_state.params)))
    return Fitted(best, progress.best_score, best_epoch, progress.epoch)


def _make_step(
    stage: Stage,
    recipe: Recipe,
    task: Task,
    model: TextClassifier,
    optimizer: optax.GradientTransformation,
    train: TokenizedSplit,
    num_steps: int,
) -> TrainStep:
    def draw(key: jax.Array, step: jax.Array, num_rows: int) -> FocusDraw:
        return draw_focus(key, num_rows, model.config.num_layers, step / num_steps)

    balanced = recipe.class_weights == "balanced"
    return make_train_step(
        model,
        task.kind,
        optimizer,
        label_smoothing=stage.label_smoothing,
        class_weights_L=balanced_class_weights(task.kind, train.targets_NL) if balanced else None,
        seed=recipe.seed,
        draw_focus=draw if stage.draws_focus else None,
    )


class _DevLook:
    """Reads the dev set with a state's weights, logs what it sees, and scores it."""

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        task: Task,
        encoder: EncoderConfig,
        state: TrainState,
        dev: TokenizedSplit,
    ) -> None:
        self._task, self._dev = task, dev
        params = unstack_layers(flatten(state.params))
        self._predictors = {
            focus: Predictor(
                encoder,
                len(task.labels),
                params,
                "float32",
                recipe.compute_dtype,
                Focus.pyramid(focus, encoder.num_layers),
            )
            for focus in stage.focuses
        }
        self.sentence = ""

    def __call__(self, state: TrainState, log: RunLog) -> float:
        params = unstack_layers(flatten(state.params))
        said, scores = [], []
        for focus, predictor in self._predictors.items():
            logits_NL = predictor.with_weights(params).logits(self._dev.ids)
            metrics = measure(self._task, logits_NL, self._dev.targets_NL, Calibration())
            suffix, where = ("", "") if focus == 1 else (f"/focus_{focus:g}", f" at focus {focus:g}")
            log.scalars(
                int(state.step),
                {
                    f"dev{suffix}/accuracy": metrics.accuracy,
                    f"dev{suffix}/macro_f1": metrics.macro_f1,
                    f"dev{suffix}/ece": metrics.ece,
                },
            )
            said.append(f"accuracy {metrics.accuracy:.2%} · macro-F1 {metrics.macro_f1:.3f}{where}")
            scores.append(metrics.accuracy if self._task.kind.exclusive else metrics.micro_f1)
        self.sentence = ", ".join(said)
        return sum(scores) / len(scores)


def initial_params(model: TextClassifier, weights: Weights, seed: int) -> Any:
    """The pretrained encoder under a head of initial values."""
    tokens_BS, lengths_B = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
    rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(seed)}
    params = flatten(jax.jit(model.init)(rngs, tokens_BS, lengths_B)["params"])
    return variables(params | (stack_layers(weights) if model.scan else weights), "float32")["params"]


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
