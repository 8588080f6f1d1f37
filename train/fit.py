"""The phases of a run: dense training, on all examples alike or stage by stage, and then training to focus."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..data.curriculum import CurriculumPlan
from ..data.pipeline import Batches, Source, epoch_batches, stage_batches
from ..data.plans import ShufflePlan
from ..model.focus import is_gate
from ..model.quantize import Weights
from .curriculum import plan_curriculum, write_curriculum
from .distributed import is_primary, primary_first, say
from .focus import DEV_FOCUSES, SOFT_SHARE, distilled
from .phases import FitResult, Phase, TrainContext
from .tokenized import join_tasks
from .trainer import Trainer


def fit(context: TrainContext, weights: Weights) -> FitResult:
    """Trains a classifier, from the last checkpoints in `out` if there are any: dense, then with focus if asked for.

    Dense training is one phase over all examples, or one for each stage of the curriculum. The phases' checkpoints and
    logs are in `out`, in `out/stages/NAME`, and in `out/focus`.

    Args:
      context: the recipe, the examples and the folder.
      weights: by name: a pretrained encoder's; none for random ones; or a trained classifier's with a head for the same
        labels.

    Returns:
      The weights of the last phase's last epoch, or of the epoch with the best dev score where that is better by more
      than a standard error (see `Progress.keeps_last`). The score is the mean over tasks of accuracy, or micro-F1 of a
      multilabel task, and after training for focus over `focus.DEV_FOCUSES` too.

    Raises:
      InputError: the loss became NaN or infinite; the checkpoints in `out` are of other examples or another seed; a
        checkpoint cannot be written.
      Stopped: SIGTERM came; the progress is saved.
    """
    recipe, taxonomy = context.recipe, context.taxonomy
    trainer = Trainer(context)
    start = weights
    if recipe.curriculum:
        fitted = _fit_stages(trainer, weights)
    elif recipe.epochs:
        fitted = trainer.run(_dense_phase(context, weights), weights)
    else:
        fitted = FitResult(weights, score=-1.0, kept_epoch=0, epochs=0)
    if not recipe.focus_epochs:
        return fitted
    say("Training to focus, beside the dense classifier's answers.")
    folder, weights, examples = context.out / "focus", fitted.weights, context
    if context.shards is None:  # computed once for all epochs; shards' in every step, to hold none in memory
        train = primary_first(lambda: distilled(recipe, taxonomy, context.encoder, weights, context.train, folder))
        examples = dataclasses.replace(context, train=train)
    phase = Phase(
        _epochs(examples, recipe.focus_epochs),
        num_evals=recipe.focus_epochs,
        patience=0,
        label_smoothing=0.0,
        learning_rate=recipe.learning_rate,
        folder=folder,
        dev_tasks=tuple(context.dev),
        focuses=DEV_FOCUSES,
        # Gates that are trained already skip the soft ones.
        focus_from=SOFT_SHARE if any(map(is_gate, start)) else 0.0,
        dense=None if context.shards is None else weights,
    )
    return trainer.run(phase, weights)


def _dense_phase(context: TrainContext, weights: Weights) -> Phase:
    """Dense training on all examples alike."""
    recipe = context.recipe
    return Phase(
        _epochs(context, recipe.epochs),
        num_evals=recipe.epochs,
        patience=recipe.patience,
        label_smoothing=recipe.label_smoothing,
        learning_rate=recipe.learning_rate,
        folder=context.out,
        dev_tasks=tuple(context.dev),
        new_tasks=() if _has_head(weights) else tuple(context.train),
    )


def _fit_stages(trainer: Trainer, weights: Weights) -> FitResult:
    """Dense training by the curriculum, one phase a stage."""
    context = trainer.context
    recipe, taxonomy, shards = context.recipe, context.taxonomy, context.shards
    if shards is not None:
        sizes_T = [len(numbers) for numbers in shards.numbers_T]
    else:
        sizes_T = [len(context.train[task.name].ids) for task in taxonomy.tasks]
    planned = plan_curriculum(recipe.curriculum, taxonomy, sizes_T, recipe.batch_size)
    batches_of = _stages_of(context)
    has_head = _has_head(weights)
    fitted: FitResult | None = None
    drawn: dict[str, np.ndarray] = {}
    for number, plan in enumerate(planned):
        stage = plan.stage
        say(
            f"Stage {number + 1} of {len(planned)}, '{stage.name}': {plan.num_steps:,} steps on "
            + ", ".join(plan.tasks)
            + (f", {stage.replay:.0%} of them on earlier tasks." if stage.replay else ".")
        )
        batches = batches_of(plan.shares_T, plan.num_steps, stage=number)
        phase = Phase(
            batches,
            num_evals=plan.num_evals,
            patience=0,
            label_smoothing=recipe.label_smoothing,
            learning_rate=recipe.learning_rate if stage.learning_rate is None else stage.learning_rate,
            folder=context.out / "stages" / stage.name,
            dev_tasks=plan.seen,
            new_tasks=() if has_head else plan.new,
        )
        fitted = trainer.run(phase, weights)
        weights = fitted.weights
        if is_primary():
            drawn[stage.name] = batches.plan.drawn(plan.num_steps)
            counts = zip(taxonomy.tasks, drawn[stage.name], strict=True)
            counted = ", ".join(f"{task.name} {count:,}" for task, count in counts if count)
            say(f"Stage '{stage.name}' has trained on so many examples: {counted}.")
            write_curriculum(context.out / "stages", taxonomy, drawn)
    assert fitted is not None
    return fitted


def _stages_of(context: TrainContext) -> Callable[..., Batches[CurriculumPlan]]:
    """(shares_T, the number of steps, stage=its number) → its batches."""
    return functools.partial(stage_batches, _source(context), **_batch_options(context))


def _epochs(context: TrainContext, num_epochs: int) -> Batches[ShufflePlan]:
    return epoch_batches(_source(context), num_epochs=num_epochs, **_batch_options(context))


def _batch_options(context: TrainContext) -> dict[str, Any]:
    recipe = context.recipe
    rows = None if context.shards is None else context.layout.rows(recipe.batch_size)
    return {"batch_size": recipe.batch_size, "seed": recipe.seed, "pad_id": context.pad_id, "rows": rows}


def _source(context: TrainContext) -> Source:
    if context.shards is not None:
        return context.shards
    recipe = context.recipe
    return join_tasks(
        context.taxonomy, context.train, soft_share=recipe.soft_share, temperature=recipe.soft_temperature
    )


def _has_head(weights: Weights) -> bool:
    return "head.kernel" in weights
