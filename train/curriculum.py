"""The curriculum's stages for given tasks: which are trained, their sampling shares, and the number of steps.

Axes: T tasks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.curriculum import sampling_shares
from ..data.errors import InputError, listed
from ..data.taxonomy import Taxonomy
from .config import CurriculumStage
from .distributed import say
from .pictures import draw_curriculum


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """A stage with its tasks.

    Attributes:
      stage: from the recipe.
      tasks: names of its tasks.
      new: those of them that no stage before it trained.
      seen: names of all tasks trained by its end, in the order of the taxonomy.
      shares_T: float64, how often each task of the taxonomy is drawn, replay included.
      num_steps: of the stage.
      num_evals: how often the dev sets are evaluated.
    """

    stage: CurriculumStage
    tasks: tuple[str, ...]
    new: tuple[str, ...]
    seen: tuple[str, ...]
    shares_T: np.ndarray
    num_steps: int
    num_evals: int


def stages_for(stages: Sequence[CurriculumStage], taxonomy: Taxonomy) -> tuple[CurriculumStage, ...]:
    """A preset's stages without those of kinds that no task has, and without replay where no task came before.

    What a user wrote himself is taken as it is, and refused by `plan_curriculum` where it does not fit.
    """
    kept: list[CurriculumStage] = []
    seen: set[str] = set()
    for stage in stages:
        if stage.kinds and not stage.tasks and not any(task.kind in stage.kinds for task in taxonomy.tasks):
            say(f"Stage '{stage.name}' is left out: there is no {' or '.join(stage.kinds)} task.")
            continue
        tasks = set(_tasks_of(stage, taxonomy))
        if stage.replay and not seen - tasks:
            say(f"Stage '{stage.name}' replays nothing, for no task came before it.")
            stage = dataclasses.replace(stage, replay=0.0)
        seen |= tasks
        kept.append(stage)
    return tuple(kept)


def plan_curriculum(
    stages: Sequence[CurriculumStage], taxonomy: Taxonomy, sizes_T: Sequence[int], batch_size: int
) -> list[PlannedStage]:
    """Works out every stage.

    Args:
      stages: from the recipe.
      taxonomy: the tasks there are.
      sizes_T: training examples of each.
      batch_size: rows a step.

    Raises:
      InputError: a stage that names an unknown task or has none, replay in a stage that nothing came before, or a task
        that no stage trains.
    """
    planned: list[PlannedStage] = []
    seen: set[str] = set()
    for stage in stages:
        tasks = _tasks_of(stage, taxonomy)
        if stage.replay and not seen - set(tasks):
            raise InputError(
                f"Stage '{stage.name}' replays tasks of earlier stages, but there are none besides its own."
            )
        own_T = _shares(taxonomy, sizes_T, stage, set(tasks))
        shares_T = own_T
        if stage.replay:
            shares_T = (1 - stage.replay) * own_T + stage.replay * _shares(taxonomy, sizes_T, stage, seen - set(tasks))
        num_evals = 1 if stage.steps else max(1, round(stage.epochs))
        own_rows = stage.epochs * sum(n for n, task in zip(sizes_T, taxonomy.tasks, strict=True) if task.name in tasks)
        steps = stage.steps or own_rows / (1 - stage.replay) / batch_size
        new = tuple(name for name in tasks if name not in seen)
        seen |= set(tasks)
        in_order = tuple(task.name for task in taxonomy.tasks if task.name in seen)
        num_steps = num_evals * max(1, round(steps / num_evals))
        planned.append(PlannedStage(stage, tasks, new, in_order, shares_T, num_steps, num_evals))
    left = [task.name for task in taxonomy.tasks if task.name not in seen]
    if left:
        raise InputError(f"No stage of the curriculum trains {listed(left)}; name it in one, or leave its data out.")
    return planned


def write_curriculum(folder: Path, taxonomy: Taxonomy, drawn: dict[str, np.ndarray]) -> None:
    """Writes which stage saw which task how often: `curriculum.json` and `curriculum.png`.

    Args:
      folder: made if missing.
      taxonomy: the tasks.
      drawn: int (T,) rows of each task, by stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [task.name for task in taxonomy.tasks]
    counts = {stage: dict(zip(names, map(int, rows_T), strict=True)) for stage, rows_T in drawn.items()}
    (folder / "curriculum.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    draw_curriculum(folder / "curriculum.png", names, drawn)


def _tasks_of(stage: CurriculumStage, taxonomy: Taxonomy) -> tuple[str, ...]:
    names = [task.name for task in taxonomy.tasks]
    for name in (*stage.tasks, *stage.weights):
        if name not in names:
            raise InputError(f"Stage '{stage.name}' names the task '{name}'; there are {listed(names)}.")
    everything = not stage.kinds and not stage.tasks
    tasks = [t.name for t in taxonomy.tasks if everything or t.kind in stage.kinds or t.name in stage.tasks]
    if not tasks:
        raise InputError(f"Stage '{stage.name}' is for {listed(list(stage.kinds))} tasks, but there is none.")
    return tuple(tasks)


def _shares(taxonomy: Taxonomy, sizes_T: Sequence[int], stage: CurriculumStage, tasks: set[str]) -> np.ndarray:
    names = [task.name for task in taxonomy.tasks]
    sizes = [size if name in tasks else 0 for name, size in zip(names, sizes_T, strict=True)]
    return sampling_shares(sizes, [stage.weights.get(name, 1.0) for name in names], stage.temperature)
