"""What focus costs and gains: accuracy and time of one classifier at several budgets, measured side by side.

Axes: N texts, L labels of one task, F focuses.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..data.buckets import BUCKETS, bucket_for, pad_batch
from ..data.taxonomy import Task
from ..model.bundle import Bundle
from ..model.focus import Focus, kept_length
from ..model.precision import Precision
from ..model.predict import Predictor, Program
from .distributed import say
from .evaluation import measure
from .pictures import draw_focus_curve
from .tokenized import TokenizedSplit

BATCH_SIZE = 32
SINGLES = 50  # texts whose latency is measured alone


@dataclasses.dataclass(frozen=True)
class FocusRow:
    """One budget.

    Attributes:
      focus: the budget.
      accuracy, macro_f1: on all texts.
      texts_per_second: in batches of `BATCH_SIZE` of like length; the median over rounds.
      speedup: against the dense classifier, round by round; the median.
      latency_ms: of one text alone; the median over texts.
      kept: tokens that each layer keeps, the mean over texts.
    """

    focus: Focus
    accuracy: float
    macro_f1: float
    texts_per_second: float
    speedup: float
    latency_ms: float
    kept: tuple[float, ...]


def focus_report(
    bundle: Bundle,
    task: Task,
    split: TokenizedSplit,
    focuses: Sequence[Focus],
    *,
    compute_dtype: Precision = Precision.bfloat16,
    timed_texts: int = 1024,
    rounds: int = 5,
) -> list[FocusRow]:
    """Measures each focus on one split; the dense classifier comes first in the answer.

    All take turns on the same batches, which are bucketed by length for all alike, so that noise of the machine hits
    each of them and padding flatters none.

    Args:
      bundle: a classifier trained for focus.
      task: one of its tasks.
      split: labelled texts.
      focuses: budgets to measure beside the dense one.
      compute_dtype: of activations.
      timed_texts: how many texts, drawn at random, the time is measured on.
      rounds: how often each focus runs through them.

    Raises:
      InputError: the bundle was not trained for focus.
    """
    dense = Focus.pyramid(1, bundle.encoder.num_layers)
    budgets = [dense, *(focus for focus in focuses if not focus.full)]
    predictors = [bundle.predictor(compute_dtype, focus) for focus in budgets]
    calibration = bundle.calibration[task.name]
    columns = bundle.taxonomy.slice_of(task.name)
    metrics = []
    for focus, predictor in zip(budgets, predictors, strict=True):
        logits_NL = predictor.logits(split.ids)[:, columns]
        predictor.executables.clear()
        metrics.append(measure(task, logits_NL, split.targets_NL, calibration))
        say(f"focus {focus.mean_share:.2f}: accuracy {metrics[-1].accuracy:.2%}")

    rows = np.random.default_rng(0).permutation(len(split.ids))
    batches = _batches([split.ids[row] for row in rows[:timed_texts]])
    seconds_RF = _time(predictors, batches, rounds)
    num_texts = sum(int((lengths_B > 0).sum()) for _, lengths_B in batches)
    say(f"Timed {rounds} rounds of {num_texts:,} texts each.")
    singles = [split.ids[row] for row in rows[:SINGLES]]
    latency_F = _latency(predictors, singles)
    lengths_N = np.array([len(row) for row in split.ids])
    return [
        FocusRow(
            focus=focus,
            accuracy=metrics[i].accuracy,
            macro_f1=metrics[i].macro_f1,
            texts_per_second=float(np.median(num_texts / seconds_RF[:, i])),
            speedup=float(np.median(seconds_RF[:, 0] / seconds_RF[:, i])),
            latency_ms=latency_F[i] * 1e3,
            kept=tuple(_mean_kept(lengths_N, share) for share in focus.units),
        )
        for i, focus in enumerate(budgets)
    ]


def write_focus_report(folder: Path, title: str, rows: Sequence[FocusRow]) -> None:
    """Writes `focus.md` and `focus.png` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_focus_curve(folder / "focus.png", [row.speedup for row in rows], [row.accuracy for row in rows], title)
    head = f"# {title}\n\nTimes are of batches of {BATCH_SIZE}, bucketed by length.\n\n"
    text = f"{head}{focus_table(rows)}\n\n![accuracy and speed](focus.png)\n"
    (folder / "focus.md").write_text(text, encoding="utf-8")


def focus_table(rows: Sequence[FocusRow]) -> str:
    """The rows as a Markdown table; differences in accuracy are in points, against the first row."""
    lines = [
        "| focus | accuracy | points | macro-F1 | speed | texts/s | one text, ms | tokens kept, by layer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept = " ".join(f"{tokens:.0f}" for tokens in row.kept)
        points = 100 * (row.accuracy - rows[0].accuracy)
        lines.append(
            f"| {row.focus.mean_share:.2f} | {row.accuracy:.2%} | {points:+.2f} | {row.macro_f1:.3f} | "
            f"{row.speedup:.2f}× | {row.texts_per_second:,.0f} | {row.latency_ms:.1f} | {kept} |"
        )
    return "\n".join(lines)


def _batches(ids: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Full batches of texts of one bucket each; what is left over of a bucket goes up to the next one."""
    batches, waiting = [], []
    by_length = sorted(ids, key=len)
    for position, row in enumerate(by_length):
        waiting.append(row)
        last = position + 1 == len(by_length)
        if len(waiting) == BATCH_SIZE or last:
            batches.append(pad_batch(waiting, BATCH_SIZE, bucket_for(len(row), BUCKETS), pad_id=0))
            waiting = []
    return batches


def _time(predictors: Sequence[Predictor], batches: Sequence, rounds: int) -> np.ndarray:
    """Seconds that each predictor takes for all batches, in each round (R, F); compiled and run once before."""
    seconds_RF = np.zeros((rounds + 1, len(predictors)))
    for programs, alike in _by_shape(predictors, batches):
        for turn in range(rounds + 1):
            for tokens_BS, lengths_B in alike:
                for i, program in enumerate(programs):
                    begin = time.perf_counter()
                    program(tokens_BS, lengths_B)
                    seconds_RF[turn, i] += time.perf_counter() - begin
    return seconds_RF[1:]


def _latency(predictors: Sequence[Predictor], singles: Sequence[np.ndarray]) -> list[float]:
    """The median seconds of a text alone, in the program of its bucket, for each predictor."""
    batches = [pad_batch([ids], 1, bucket_for(len(ids), BUCKETS), pad_id=0) for ids in singles]
    seconds = []
    for programs, alike in _by_shape(predictors, batches):
        for tokens_BS, lengths_B in alike:
            seconds.append([])
            for program in programs:
                program(tokens_BS, lengths_B)
                begin = time.perf_counter()
                program(tokens_BS, lengths_B)
                seconds[-1].append(time.perf_counter() - begin)
    return np.median(seconds, axis=0).tolist()


def _by_shape(predictors: Sequence[Predictor], batches: Sequence) -> Iterator[tuple[list[Program], list]]:
    """Batches of one shape after another, with each predictor's program for it.

    The programs of a shape are let go before the next: on CPUs each takes some 500 memory mappings, and Linux allows a
    process 65,530, which eight budgets in all shapes would exceed.
    """
    for shape in sorted({tokens_BS.shape for tokens_BS, _ in batches}):
        yield (
            [predictor.compile(*shape) for predictor in predictors],
            [batch for batch in batches if batch[0].shape == shape],
        )
        for predictor in predictors:
            predictor.executables.clear()


def _mean_kept(lengths_N: np.ndarray, units: int) -> float:
    return float(np.mean([kept_length(int(length), units) for length in lengths_N]))
