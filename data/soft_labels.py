"""Files of soft labels, which `classer teach` writes; files from other teachers can be used as well.

JSON Lines; each line is {"text": …, "probabilities": {"label": 0.9, …}}, with "task" if the model has several tasks.
Two optional files stand beside `soft.jsonl`: `soft.teachers.json` lists the teachers and their losses, and
`soft.vectors.npz` holds the teachers' pooled vectors of the texts.

Axes: N texts, L labels of one task, V dimensions of the teachers' vectors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .readers import read_mapping
from .tables import read_rows
from .taxonomy import Task, Taxonomy

# The sum of an exclusive task's probabilities may differ from 1 by this much: rounding, and omitted small values.
SUM_TOLERANCE = 0.02
# Smaller probabilities are not written.
SMALLEST = 1e-4


def read_soft_labels(path: Path, taxonomy: Taxonomy) -> dict[tuple[str, str], dict[str, float]]:
    """Reads soft labels: (task, text) → probability by label. An exclusive task's are rescaled to sum to exactly 1.

    Raises:
      InputError: as `read_rows`; the file is empty; or, with file and row: the text or the probabilities are missing,
        the task or a label is unknown, a number is not a probability, an exclusive task's probabilities do not sum
        to 1, or a text is repeated.
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
    if abs(total - 1) > SUM_TOLERANCE:
        raise InputError(
            f"{source}: the probabilities of the {task.kind} task '{task.name}' sum to {total:.3f}; they must sum to 1"
            + (" (of hierarchical tasks give the leaves alone)." if task.parent_L.max() >= 0 else ".")
        )
    return {label: value / total for label, value in probs.items()}


def write_soft_labels(path: Path, task: Task, texts: Iterable[str], probs_NL: Iterable[Any]) -> None:
    """Appends a task's soft labels to a file.

    Probabilities below `SMALLEST` are omitted; those of an exclusive task are then rescaled to sum to 1.

    Args:
      path: the file, created if missing.
      task: the task. Only its leaves are written.
      texts: N texts.
      probs_NL: N rows of (L,) probabilities.
    """
    leaves = np.flatnonzero(task.leaves_L)
    with path.open("a", encoding="utf-8") as file:
        for text, probs_L in zip(texts, probs_NL, strict=True):
            leaf_probs = np.asarray(probs_L, np.float64)[leaves]
            # With very many labels all may be below SMALLEST; then those of at least half the largest are kept.
            kept = leaf_probs >= (min(SMALLEST, leaf_probs.max() / 2) if task.kind.exclusive else SMALLEST)
            scale = 1 / leaf_probs[kept].sum() if task.kind.exclusive else 1.0
            named = {
                task.label_names[i]: round(p * scale, 6)
                for i, p in zip(leaves[kept].tolist(), leaf_probs[kept].tolist(), strict=True)
            }
            file.write(json.dumps({"text": text, "task": task.name, "probabilities": named}, ensure_ascii=False) + "\n")


@dataclasses.dataclass(frozen=True)
class TeacherScore:
    """A teacher's loss on the labelled texts among those it annotated.

    Attributes:
      name: its folder, or its name on the hub.
      weight: its weight in the mean over teachers; all weights sum to 1.
      loss: mean negative log-likelihood of the labels, in nats; None if no text has labels.
      texts: the number of texts with labels.
    """

    name: str
    weight: float
    loss: float | None
    texts: int

    def __str__(self) -> str:
        if self.loss is None:
            return f"{self.name}: no loss, for no text has labels."
        return f"{self.name}: a mean loss of {self.loss:.3f} nats on the {self.texts:,} texts with labels."


def teachers_file(path: Path) -> Path:
    """The path of the list of teachers beside a file of soft labels."""
    return path.with_suffix(".teachers.json")


def write_teachers(path: Path, teachers: Iterable[TeacherScore]) -> None:
    path.write_text(json.dumps(list(map(dataclasses.asdict, teachers)), indent=1) + "\n", encoding="utf-8")


def read_teachers(path: Path) -> list[TeacherScore]:
    """The teachers of a file of soft labels; empty if the file beside it does not exist.

    Raises:
      InputError: as `read_mapping`, or the file is not a list of teachers.
    """
    file = teachers_file(path)
    if not file.exists():
        return []
    try:
        return [TeacherScore(**teacher) for teacher in read_mapping(file)]
    except TypeError as e:
        raise InputError(f"{file} does not list teachers as `classer teach` does: {e}.") from None


def vectors_file(path: Path) -> Path:
    """The path of the teachers' vectors beside a file of soft labels."""
    return path.with_suffix(".vectors.npz")


def write_vectors(path: Path, texts: Sequence[str], vectors_NV: np.ndarray) -> None:
    """Writes the teachers' vectors, one row per text, as float16."""
    with path.open("wb") as file:
        as_json = np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)  # a string array would pad
        np.savez(file, texts=as_json, vectors=vectors_NV.astype(np.float16))


def read_vectors(path: Path) -> dict[str, np.ndarray]:
    """The teachers' vectors for a file of soft labels: text → float16 (V,).

    Raises:
      InputError: the file of vectors does not exist or is malformed.
    """
    file = vectors_file(path)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            texts, vectors_NV = json.loads(arrays["texts"].tobytes()), arrays["vectors"]
        whole = len(texts) == len(vectors_NV) and vectors_NV.ndim == 2 and np.isfinite(vectors_NV).all()
    except FileNotFoundError:
        raise InputError(
            f"{file} is not there, which holds the teachers' vectors that relation_share is for; `classer teach` makes "
            f"it with --relations and --out {path}."
        ) from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise InputError(f"{file} cannot be read as vectors of `classer teach`: {e}.") from None
    if not whole or vectors_NV.dtype != np.float16:
        raise InputError(f"{file} must hold a finite float16 vector for each of its {len(texts):,} texts.")
    return dict(zip(texts, vectors_NV, strict=True))
