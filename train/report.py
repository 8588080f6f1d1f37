"""The results folder of an evaluation: metrics.json, report.md and its pictures.

Axes: N texts, L labels of one task.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from ..data.taxonomy import Label, Task, TaskKind
from .metrics import Metrics, check_predictions
from .pictures import GRID_LABELS, draw_confusions, draw_label_scores, draw_reliability
from .style import markdown_table

COUNTED_LABELS = 500  # a matrix of more counts would take gigabytes at ten thousand labels
WORST_ROWS = 20  # rows of the tables of errors


def write_report(
    folder: Path,
    task: Task,
    metrics: Metrics,
    probs_NL: np.ndarray,
    targets_NL: np.ndarray,
    chosen_NL: np.ndarray,
    title: str,
) -> None:
    """Writes, and overwrites, the files of a results folder.

    - metrics.json: `title`, `task`, `kind` and the fields of `Metrics`.
    - report.md: the same for people, the labels with the worst F1 first, and the most frequent errors.
    - reliability.png: confidence against accuracy, and how often each confidence occurs.
    - confusion_matrix.png: counts of true against predicted labels; of many labels only the most confused. A
      multilabel task has no such matrix; label_f1.png shows its labels' F1 instead.

    Args:
      folder: made if missing.
      task: whose labels the columns are.
      metrics: what `evaluate` made of the arrays.
      probs_NL: (N, L) calibrated probabilities.
      targets_NL: (N, L) 1 where a label holds, else 0.
      chosen_NL: (N, L) bool, the labels decided for.
      title: what was evaluated, such as "banking77, test".

    Raises:
      ValueError: as `evaluate`.
      OSError: the folder cannot be written.
    """
    check_predictions(task, probs_NL, targets_NL, chosen_NL)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"title": title, "task": task.name, "kind": task.kind.value, **metrics.to_json()}
    (folder / "metrics.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    draw_reliability(folder / "reliability.png", task, probs_NL, targets_NL, title)
    sections = [_summary(task, metrics, title)]
    if task.kind.exclusive:
        shown, counts_LL = _most_wrong(task, targets_NL, chosen_NL)
        draw_confusions(folder / "confusion_matrix.png", shown, counts_LL, title)
        errors = round(metrics.n * (1 - metrics.accuracy))
        sections += [_confusions(shown, counts_LL, errors), _calibration(), _labels(metrics)]
    else:
        draw_label_scores(folder / "label_f1.png", metrics, title)
        sections += [_label_errors(metrics), _calibration(), _labels(metrics)]
    (folder / "report.md").write_text("\n".join(sections), encoding="utf-8")


def confusion_counts(targets_NL: np.ndarray, chosen_NL: np.ndarray) -> np.ndarray:
    """(L, L) int: texts by true label (row) and predicted label (column), for tasks where exactly one label holds."""
    labels = targets_NL.shape[1]
    pairs_N = targets_NL.argmax(axis=1) * labels + chosen_NL.argmax(axis=1)
    return np.bincount(pairs_N, minlength=labels * labels).reshape(labels, labels)


def _most_wrong(task: Task, targets_NL: np.ndarray, chosen_NL: np.ndarray) -> tuple[Task, np.ndarray]:
    """The task and its confusion counts; of very many labels those with most errors, and one for all others."""
    if len(task.labels) <= COUNTED_LABELS:
        return task, confusion_counts(targets_NL, chosen_NL)
    true_N, said_N = targets_NL.argmax(axis=1), chosen_NL.argmax(axis=1)
    wrong_N = true_N != said_N
    errors_L = np.bincount(np.concatenate([true_N[wrong_N], said_N[wrong_N]]), minlength=len(task.labels))
    kept = np.sort(np.argsort(-errors_L, kind="stable")[:COUNTED_LABELS])
    place_L = np.full(len(task.labels), COUNTED_LABELS)
    place_L[kept] = np.arange(COUNTED_LABELS)
    counts_LL = np.zeros((COUNTED_LABELS + 1,) * 2, int)
    np.add.at(counts_LL, (place_L[true_N], place_L[said_N]), 1)
    names = [task.label_names[i] for i in kept]
    labels = tuple(map(Label, [*names, "(all other labels)"]))
    return dataclasses.replace(task, kind=TaskKind.MULTICLASS, labels=labels), counts_LL


def worst_confusions(counts_LL: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """The most frequent errors as (true label, predicted label, count), the most frequent first, zeros left out."""
    errors_LL = counts_LL - np.diag(np.diag(counts_LL))
    order = np.argsort(-errors_LL, axis=None, kind="stable")[:most]
    rows, columns = np.unravel_index(order, errors_LL.shape)
    return [(int(r), int(c), int(errors_LL[r, c])) for r, c in zip(rows, columns, strict=True) if errors_LL[r, c]]


def _summary(task: Task, metrics: Metrics, title: str) -> str:
    accuracy = "accuracy" if task.kind.exclusive else "accuracy (all labels of a text right)"
    rows = [(accuracy, f"{metrics.accuracy:.2%}"), ("macro-F1", f"{metrics.macro_f1:.2%}")]
    if not task.kind.exclusive:
        rows.append(("micro-F1", f"{metrics.micro_f1:.2%}"))
    rows.append(("expected calibration error", f"{metrics.ece:.2%}"))
    rows.append(("texts", f"{metrics.n:,}"))
    heading = f"# {_escape(title)}\n\nTask `{task.name}`: {task.kind.value}, {len(task.labels)} labels.\n"
    return f"{heading}\n{markdown_table(('', ''), rows)}"


def _confusions(task: Task, counts_LL: np.ndarray, errors: int) -> str:
    shown = "the most confused labels" if len(task.labels) > GRID_LABELS else "true and predicted labels"
    text = f"## Confusions\n\n![Counts of {shown}](confusion_matrix.png)\n\n"
    worst = worst_confusions(counts_LL, WORST_ROWS)
    if not worst:
        return f"{text}No text was given a wrong label.\n"
    support_L = counts_LL.sum(axis=1)
    names = task.label_names
    rows = [(_escape(names[t]), _escape(names[p]), f"{n:,}", f"{n / support_L[t]:.1%}") for t, p, n in worst]
    lead = f"{errors:,} texts were given a wrong label; the most frequent confusions:\n\n"
    return (
        text
        + lead
        + markdown_table(("true label", "predicted", "texts", "share of the true label's texts"), rows, words=2)
    )


def _label_errors(metrics: Metrics) -> str:
    text = (
        "## Errors\n\n![F1 of each label](label_f1.png)\n\n"
        "A text may have several labels at once, so there is no confusion matrix. The labels with most errors:\n\n"
    )
    rows = []
    for label in metrics.labels:
        hits = round(label.recall * label.support)
        rows.append((label.support - hits, label.predicted - hits, label.name))
    rows.sort(key=lambda row: -(row[0] + row[1]))
    shown = [
        (_escape(name), f"{missed:,}", f"{extra:,}") for missed, extra, name in rows[:WORST_ROWS] if missed + extra
    ]
    if not shown:
        return text.split("The labels with")[0].rstrip() + " No decision was wrong.\n"
    return text + markdown_table(("label", "missed", "wrongly chosen"), shown)


def _calibration() -> str:
    return "## Calibration\n\n![Confidence against accuracy](reliability.png)\n"


def _labels(metrics: Metrics) -> str:
    rows = [
        (_escape(m.name), f"{m.f1:.1%}", f"{m.precision:.1%}", f"{m.recall:.1%}", f"{m.support:,}", f"{m.predicted:,}")
        for m in sorted(metrics.labels, key=lambda m: (m.support == 0, m.f1))
    ]
    header = ("label", "F1", "precision", "recall", "texts", "predicted")
    return f"## Labels, the worst F1 first\n\n{markdown_table(header, rows)}"


def _escape(text: str) -> str:
    """A name as Markdown shows it in a table's cell: on one line, with nothing that Markdown would read."""
    return re.sub(r"[\\|*`\[\]<>#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
