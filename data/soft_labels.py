"""A teacher's answers as a file: what `classer teach` writes, and what anyone else may bring.

JSON Lines; each line is {"text": …, "probabilities": {"label": 0.9, …}}, with "task" where the model has several tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .tables import read_rows
from .taxonomy import Task, Taxonomy

# Probabilities of an exclusive task may miss 1 by so much: rounding, and labels too improbable to be written.
TOLERANCE = 0.02
# Less than this is not written.
SMALLEST = 1e-4


def read_soft_labels(path: Path, taxonomy: Taxonomy) -> dict[tuple[str, str], dict[str, float]]:
    """Probabilities by label, for each (task, text). Those of an exclusive task are scaled to sum to 1.

    Raises:
      InputError: as `read_rows`, with file and row: no text or probabilities, an unknown task or label, a number that
        is no probability, probabilities of an exclusive task that sum to something else, a text that stands twice.
    """
    answers: dict[tuple[str, str], dict[str, float]] = {}
    tasks = {task.name: task for task in taxonomy.tasks}
    for row in read_rows(Path(path)):
        text, probs = row.fields.get("text"), row.fields.get("probabilities")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{row.source}: 'text' must be a text.")
        name = row.fields.get("task")
        if name is None and len(tasks) > 1:
            raise InputError(f"{row.source}: no 'task', but there are several: {', '.join(tasks)}.")
        if name is not None and name not in tasks:
            raise InputError(f"{row.source}: there is no task '{name}', only {', '.join(tasks)}.")
        task = tasks[name] if name is not None else taxonomy.tasks[0]
        if (task.name, text) in answers:
            raise InputError(f"{row.source}: this text stood before; a text has one answer a task.")
        answers[task.name, text] = _checked(task, probs, row.source)
    if not answers:
        raise InputError(f"{path} is empty; at least one row of text and probabilities was expected.")
    return answers


def _checked(task: Task, probs: Any, source: str) -> dict[str, float]:
    if not isinstance(probs, Mapping):
        raise InputError(f"{source}: 'probabilities' must be an object of numbers by label.")
    for label, value in probs.items():
        if label not in task.index:
            raise InputError(f"{source}: the task '{task.name}' has no label '{label}'.")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and 0 <= value <= 1):
            raise InputError(f"{source}: the probability of '{label}' must lie between 0 and 1; it is {value!r}.")
    if not task.kind.exclusive:
        return {label: float(value) for label, value in probs.items()}
    total = math.fsum(probs.values())
    if abs(total - 1) > TOLERANCE:
        raise InputError(
            f"{source}: the probabilities of the {task.kind} task '{task.name}' sum to {total:.3f}; they must sum to 1"
            + (" (of hierarchical tasks give the leaves alone)." if task.parent_L.max() >= 0 else ".")
        )
    return {label: value / total for label, value in probs.items()}


def write_soft_labels(path: Path, task: Task, texts: Iterable[str], probs_NL: Iterable[Any]) -> None:
    """Adds a task's answers to a file. What is too improbable to be written, an exclusive task's other labels share."""
    with path.open("a", encoding="utf-8") as file:
        for text, probs_L in zip(texts, probs_NL, strict=True):
            kept = {i: float(p) for i, p in enumerate(probs_L) if p >= SMALLEST and task.leaves_L[i]}
            scale = 1 / math.fsum(kept.values()) if task.kind.exclusive else 1.0
            named = {task.label_names[i]: round(p * scale, 6) for i, p in kept.items()}
            file.write(json.dumps({"text": text, "task": task.name, "probabilities": named}, ensure_ascii=False) + "\n")
