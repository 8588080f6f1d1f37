"""The training loop of one phase of a run: epochs of steps, each with a look at the dev sets and a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ..data.errors import InputError
from ..data.pipeline import Batches
from ..data.shards import Shards
from ..data.taxonomy import Taxonomy
from ..model.classifier import TextClassifier
from ..model.config import EncoderConfig
from ..model.focus import FocusDraw
from ..model.quantize import Weights, flatten
from ..model.sharding import Layout, make_layout
from ..model.stacking import stack_layers, unstack_layers
from .checkpoints import Checkpoints, Progress
from .config import Recipe
from .dev_evaluator import DevEvaluator
from .evaluation import TokenizedSplit
from .focus import TEACHER_SHARE, draw_focus
from .losses import balanced_class_weights
from .probe import probe_head
from .processes import CheckpointSchedule, Stopped, compute_on_primary, deferred
from .runlog import RunLog, open_log
from .step import (
    Dense,
    Schedule,
    StepMetrics,
    TrainState,
    TrainStep,
    abstract_state,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The outcome of a phase, or of a run.

    Attributes:
      weights: of the epoch that was kept.
      score: its dev score; -1 where no epoch was trained.
      kept_epoch: which one that was; of `epochs` that were trained.
    """

    weights: Weights
    score: float
    kept_epoch: int
    epochs: int


# (the state, its step, whether an epoch ends with it)
AfterStep = Callable[[TrainState, int, bool], None]


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How a run is carried out, which changes nothing that it learns.

    Attributes:
      layout: of the devices; None takes all of them for `data`.
      save_steps, save_minutes: see `processes.CheckpointSchedule`.
      config: kept in the checkpoints.
    """

    layout: Layout | None = None
    save_steps: int = 0
    save_minutes: float = 0.0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a run with a learning-rate schedule, checkpoints and a log of its own.

    Attributes:
      batches: what it trains on.
      num_evals: how often the dev sets are read; between two evaluations lies an epoch.
      patience: as in `Recipe`.
      label_smoothing: as in `Recipe`.
      learning_rate: its peak.
      folder: for `checkpoints`, `metrics.jsonl` and `tensorboard`.
      dev_tasks: which tasks' dev sets are read.
      new_tasks: those whose head is to be found by `probe_head` before the first step.
      focuses: what the dev sets are read with; the score is the mean over them.
      focus_from: rows are trained with budgets drawn at random, from where so great a share of that training is done;
        None trains the dense classifier.
      dense: the classifier whose answers each step is to mix into the targets; None for no such.
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
class TrainContext:
    """What all parts of a run have in common.

    Attributes:
      recipe: how to train.
      taxonomy: the tasks.
      encoder: the encoder's config; `gated` if the recipe has epochs of focus.
      train, dev: the examples, by task.
      pad_id: fills token rows.
      out: the run's folder.
      execution: how to carry it out.
      shards: the examples to train on where they are read from disk; `train` is then a sample of them.
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


def _counts(context: TrainContext) -> tuple[np.ndarray, np.ndarray]:
    """How many examples have each label, and how many of each task have labels of their own."""
    if context.shards is not None:
        return context.shards.label_counts_L, context.shards.rows_T
    splits = [context.train[task.name] for task in context.taxonomy.tasks]
    positives = [np.asarray(split.targets.sum(axis=0)).ravel() for split in splits]
    return np.concatenate(positives), np.array([split.labelled_N.sum() for split in splits])


def run_phase(phase: Phase, context: TrainContext, weights: Weights, train_step: TrainStep | None = None) -> FitResult:
    """Trains one phase, from the last checkpoint in its folder if there is any.

    Args:
      phase: what is its own.
      context: what it has in common with the others.
      weights: by name, what it begins with where there is no checkpoint.
      train_step: that of a phase before (see `make_step`), whose compiled programs it then shares.

    Raises:
      InputError, Stopped: as `fit.fit` does.
    """
    recipe, taxonomy, encoder = context.recipe, context.taxonomy, context.encoder
    batches = phase.batches
    steps_per_epoch = batches.num_steps // phase.num_evals
    schedule = learning_rate_schedule(recipe, batches.num_steps, phase.learning_rate)
    optimizer = make_optimizer(recipe, schedule)
    model = _classifier(context)
    execution = context.execution
    layout = context.layout
    layout.rows(recipe.batch_size)  # raises where it cannot be divided
    train_step = train_step or make_step(phase, context)
    iterator = iter(batches)
    progress = Progress(0, iterator.get_state(), -1.0, -1.0, 0, 0)
    dev = {name: context.dev[name] for name in phase.dev_tasks}

    with (
        Checkpoints(phase.folder / "checkpoints", config=execution.config) as checkpoints,
        contextlib.closing(iterator),
        deferred(),
    ):
        restored = checkpoints.restore_latest(abstract_state(model, optimizer, layout))
        if restored is not None:
            state, progress = restored
            iterator.set_state(progress.data)
        else:
            if phase.new_tasks and weights:
                known, train = weights, context.train
                weights = known | compute_on_primary(
                    lambda: probe_head(recipe, taxonomy, encoder, known, train, context.dev, phase.new_tasks)
                )
            state = init_state(initial_params(model, weights, recipe.seed, layout), optimizer, layout)
        look = DevEvaluator(taxonomy, encoder, _weights(state), recipe.compute_dtype, dev, phase.focuses)
        pace = CheckpointSchedule(execution.save_steps, execution.save_minutes)

        def after_step(state: TrainState, step: int, ends_epoch: bool) -> None:
            save, stop = pace.after(step)
            if save and not ends_epoch:  # else it is saved with the dev score; a stop is heard after the next step
                checkpoints.save(state, dataclasses.replace(progress, data=iterator.get_state()), epoch_ends=False)
            if stop and not ends_epoch:
                checkpoints.wait()
                raise Stopped(f"Stopped after step {step:,} of {batches.num_steps:,}; it is saved.")

        with open_log(phase.folder, batches.num_steps, start_step=int(state.step)) as log:
            if restored is not None:
                log.say(f"Going on after epoch {progress.epoch} (step {int(state.step):,}).")
            while progress.epoch < phase.num_evals and not progress.is_stuck(phase.patience):
                state = _train_epoch(train_step, state, iterator, steps_per_epoch, schedule, log, after_step)
                score = look(_weights(state), int(state.step), log)
                progress = progress.after_epoch(iterator.get_state(), score, int(state.step))
                checkpoints.save(state, progress)
                best = " (best so far)" if progress.epochs_since_best == 0 else ""
                log.say(f"epoch {progress.epoch}/{phase.num_evals} · dev {look.sentence}{best}")
            if progress.epoch < phase.num_evals:
                log.say(f"Stopped early: no better dev score for {phase.patience} epochs.")
        checkpoints.wait()
        if progress.keeps_last(phase.num_evals, [len(split.ids) for split in dev.values()]):
            return FitResult(_weights(state), progress.dev_score, progress.epoch, progress.epoch)
        if progress.best_step != int(state.step):
            state, _ = checkpoints.restore(state, progress.best_step)
    return FitResult(_weights(state), progress.best_score, progress.best_step // steps_per_epoch, progress.epoch)


def _weights(state: TrainState) -> Weights:
    return unstack_layers(flatten(state.params))


def _classifier(context: TrainContext) -> TextClassifier:
    recipe = context.recipe
    return TextClassifier(
        context.encoder,
        context.taxonomy.num_labels,
        jnp.dtype(recipe.compute_dtype),
        dropout=recipe.dropout,
        scan=recipe.scan,
        remat=recipe.remat,
    )


def make_step(phase: Phase, context: TrainContext) -> TrainStep:
    """The step of a phase, and of all that differ from it in batches and learning rate alone and do not focus."""
    recipe, table, layout = context.recipe, context.taxonomy.table, context.layout
    model = _classifier(context)
    num_steps, focus_from = phase.batches.num_steps, phase.focus_from or 0.0

    def draw(key: jax.Array, step: jax.Array, num_rows: int) -> FocusDraw:
        done = focus_from + (1 - focus_from) * step / num_steps
        return draw_focus(key, num_rows, model.config.num_layers, done)

    class_weights_L = None
    if recipe.class_weights == "balanced":
        class_weights_L = balanced_class_weights(table, *_counts(context))
    dense = None
    if phase.dense is not None:
        dense = Dense(initial_params(model, phase.dense, recipe.seed, layout), TEACHER_SHARE)
    return make_train_step(
        model,
        table,
        make_optimizer(recipe, learning_rate_schedule(recipe, num_steps, phase.learning_rate)),
        label_smoothing=phase.label_smoothing,
        class_weights_L=class_weights_L,
        seed=recipe.seed,
        temperature=recipe.soft_temperature,
        relation_share=recipe.relation_share,
        draw_focus=None if phase.focus_from is None else draw,
        dense=dense,
        layout=layout,
        batch_size=None if context.shards is None else recipe.batch_size,
    )


def initial_params(model: TextClassifier, weights: Weights, seed: int, layout: Layout | None = None) -> Any:
    """The pretrained encoder under a head of initial values, straight to where `layout` says; by default one device."""
    layout = make_layout(jax.devices()[:1]) if layout is None else layout
    given = stack_layers(weights) if model.scan else weights

    def missing() -> dict[str, jax.Array]:
        tokens_BS, lengths_B = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
        rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(seed)}
        params: dict[str, Any] = traverse_util.flatten_dict(
            cast(dict, model.init(rngs, tokens_BS, lengths_B))["params"], sep="."
        )
        return {name: value for name, value in params.items() if name not in given}

    return traverse_util.unflatten_dict(layout.create(missing) | layout.put(given), sep=".")


def _train_epoch(
    train_step: TrainStep,
    state: TrainState,
    iterator,
    num_steps: int,
    schedule: Schedule,
    log: RunLog,
    after_step: AfterStep,
) -> TrainState:
    """Steps to the end of an epoch. A step is logged after the next one was begun, so that the device never waits."""
    pending: tuple[StepMetrics, int] | None = None
    step = int(state.step)

    def report() -> None:
        if pending is not None:
            metrics, tokens = pending
            loss = metrics.loss.item()
            of_teachers = [x if x is None else x.item() for x in (metrics.teacher_loss, metrics.relation_loss)]
            log.step(step, loss, tokens, float(schedule(step - 1)), *of_teachers)
            if not math.isfinite(loss):
                raise InputError(
                    f"The loss of step {step} is {loss}: training diverged, and no weights of it are of use. "
                    "Begin a new run with a lower learning_rate."
                )

    for _ in range(num_steps - step % num_steps):
        batch = next(iterator)
        state, metrics = train_step(state, batch, schedule)
        report()
        step += 1
        pending = (metrics, int(batch.lengths_B.sum()))
        after_step(state, step, step % num_steps == 0)
    report()
    return state
