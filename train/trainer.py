"""Training, in the order in which it happens: the trainer is built once, and then runs one phase after another.

A phase restores its last checkpoint or starts from given weights, trains epoch by epoch, evaluates the dev sets and
saves after each, and returns the weights of the epoch that it keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import traverse_util

from ..data.errors import InputError
from ..model.classifier import TextClassifier
from ..model.focus import FocusDraw
from ..model.quantize import Weights, flatten
from ..model.sharding import Layout, make_layout
from ..model.stacking import stack_layers, unstack_layers
from .checkpoints import Checkpoints, Progress
from .dev_evaluator import DevEvaluator
from .distributed import on_primary
from .focus import TEACHER_SHARE, draw_focus
from .losses import balanced_class_weights
from .phases import FitResult, Phase, TrainContext
from .preemption import CheckpointSchedule, Stopped, deferred
from .probe import probe_head
from .runlog import RunLog, open_log
from .step import (
    DenseTeacher,
    DrawFocus,
    LossConfig,
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

# (the state, its step, whether an epoch ends with it)
AfterStep = Callable[[TrainState, int, bool], None]


class Trainer:
    """Runs the phases of one run: one model, one optimiser, and one step for all phases that do not focus.

    Args:
      context: what the phases have in common.

    Raises:
      InputError: the batch size cannot be divided over the devices.
    """

    def __init__(self, context: TrainContext) -> None:
        recipe = context.recipe
        self.context = context
        self.layout = context.layout
        self.layout.check_divides(recipe.batch_size)
        self.model = TextClassifier(
            context.encoder,
            context.taxonomy.num_labels,
            jnp.dtype(recipe.compute_dtype),
            dropout=recipe.dropout,
            scan=recipe.scan,
            remat=recipe.remat,
        )
        # Each phase passes its own schedule to the step.
        self.optimizer = make_optimizer(recipe, learning_rate_schedule(recipe, num_steps=1))
        self._class_weights_L: jax.Array | None = None
        if recipe.class_weights == "balanced":
            self._class_weights_L = balanced_class_weights(context.taxonomy.table, *context.label_counts)
        self._dense_steps: dict[float, TrainStep] = {}  # by label smoothing

    def run(self, phase: Phase, weights: Weights) -> FitResult:
        """Trains one phase, from the last checkpoint in its folder if there is any.

        Args:
          phase: what to train, and where to save.
          weights: by name; what to start from where there is no checkpoint.

        Raises:
          InputError, Stopped: as `fit.fit`.
        """
        execution, batches = self.context.execution, phase.batches
        steps_per_epoch = batches.num_steps // phase.num_evals
        schedule = learning_rate_schedule(self.context.recipe, batches.num_steps, phase.learning_rate)
        train_step = self._step(phase)
        iterator = iter(batches)
        dev = {name: self.context.dev[name] for name in phase.dev_tasks}
        with (
            Checkpoints(phase.folder / "checkpoints", config=execution.config) as checkpoints,
            contextlib.closing(iterator),
            deferred(),
        ):
            restored = checkpoints.restore_latest(abstract_state(self.model, self.optimizer, self.layout))
            if restored is not None:
                state, progress = restored
                iterator.set_state(progress.data)
            else:
                state, progress = self._start(phase, weights), Progress(0, iterator.get_state(), -1.0, -1.0, 0, 0)
            evaluator = self._evaluator(phase, state)
            saves = CheckpointSchedule(execution.save_steps, execution.save_minutes)

            def after_step(state: TrainState, step: int, ends_epoch: bool) -> None:
                save, stop = saves.after(step)
                if ends_epoch:  # it is saved with its dev score; a stop takes effect after the next step
                    return
                if save:
                    checkpoints.save(state, dataclasses.replace(progress, data=iterator.get_state()), epoch_ends=False)
                if stop:
                    checkpoints.wait()
                    raise Stopped(f"Stopped after step {step:,} of {batches.num_steps:,}; it is saved.")

            with open_log(phase.folder, batches.num_steps, start_step=int(state.step)) as log:
                if restored is not None:
                    log.say(f"Going on after epoch {progress.epoch} (step {int(state.step):,}).")
                while progress.epoch < phase.num_evals and not progress.is_stuck(phase.patience):
                    state = _train_epoch(train_step, state, iterator, steps_per_epoch, schedule, log, after_step)
                    score = evaluator(_weights(state), int(state.step), log)
                    progress = progress.after_epoch(iterator.get_state(), score, int(state.step))
                    checkpoints.save(state, progress)
                    best = " (best so far)" if progress.epochs_since_best == 0 else ""
                    log.say(f"epoch {progress.epoch}/{phase.num_evals} · dev {evaluator.sentence}{best}")
                if progress.epoch < phase.num_evals:
                    log.say(f"Stopped early: no better dev score for {phase.patience} epochs.")
            checkpoints.wait()
            if progress.keeps_last(phase.num_evals, [len(split.ids) for split in dev.values()]):
                return FitResult(_weights(state), progress.dev_score, progress.epoch, progress.epoch)
            if progress.best_step != int(state.step):
                state, _ = checkpoints.restore(state, progress.best_step)
        return FitResult(_weights(state), progress.best_score, progress.best_step // steps_per_epoch, progress.epoch)

    def _step(self, phase: Phase) -> TrainStep:
        """The training step of a phase; phases that do not focus share one, and its compiled programs."""
        recipe = self.context.recipe
        if phase.focus_from is None and phase.label_smoothing in self._dense_steps:
            return self._dense_steps[phase.label_smoothing]
        dense = None
        if phase.dense is not None:
            dense = DenseTeacher(initial_params(self.model, phase.dense, recipe.seed, self.layout), TEACHER_SHARE)
        config = LossConfig(
            phase.label_smoothing, self._class_weights_L, recipe.soft_temperature, recipe.relation_share, recipe.seed
        )
        step = make_train_step(
            self.model,
            self.context.taxonomy.table,
            self.optimizer,
            config,
            draw_focus=self._focus_draws(phase),
            dense=dense,
            layout=self.layout,
            batch_size=None if self.context.shards is None else recipe.batch_size,
        )
        if phase.focus_from is None:
            self._dense_steps[phase.label_smoothing] = step
        return step

    def _focus_draws(self, phase: Phase) -> DrawFocus | None:
        if phase.focus_from is None:
            return None
        focus_from, num_steps = phase.focus_from, phase.batches.num_steps

        def draw(key: jax.Array, step: jax.Array, num_rows: int) -> FocusDraw:
            done = focus_from + (1 - focus_from) * step / num_steps
            return draw_focus(key, num_rows, self.model.config.num_layers, done)

        return draw

    def _start(self, phase: Phase, weights: Weights) -> TrainState:
        """The state before a phase's first step; the heads of its new tasks are fitted first."""
        context = self.context
        recipe = context.recipe
        if phase.new_tasks and weights:
            weights = weights | on_primary(
                lambda: probe_head(
                    recipe, context.taxonomy, context.encoder, weights, context.train, context.dev, phase.new_tasks
                )
            )
        return init_state(initial_params(self.model, weights, recipe.seed, self.layout), self.optimizer, self.layout)

    def _evaluator(self, phase: Phase, state: TrainState) -> DevEvaluator:
        context = self.context
        dev = {name: context.dev[name] for name in phase.dev_tasks}
        return DevEvaluator(
            context.taxonomy, context.encoder, _weights(state), context.recipe.compute_dtype, dev, phase.focuses
        )


def _train_epoch(
    train_step: TrainStep,
    state: TrainState,
    iterator,
    num_steps: int,
    schedule: Schedule,
    log: RunLog,
    after_step: AfterStep,
) -> TrainState:
    """Trains to the end of an epoch. A step is logged after the next one has begun, so that the device never waits."""
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


def _weights(state: TrainState) -> Weights:
    return unstack_layers(flatten(state.params))


def initial_params(model: TextClassifier, weights: Weights, seed: int, layout: Layout | None = None) -> Any:
    """Given weights, and initial values for the missing ones, sharded by `layout`; by default on one device."""
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
