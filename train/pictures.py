"""The pictures of a results folder, drawn with matplotlib straight to PNG files: no window, no global state.

Axes: N texts, L labels of one task.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..data.taxonomy import Task
from .metrics import NUM_BINS, Metrics, reliability
from .style import BLUE, DPI, GREEN, GREY, ORANGE

GRID_LABELS = 24  # a grid of more would be too small to read, so that only the most confused labels are drawn
BAR_LABELS = 60  # likewise for bars
NAME_LENGTH = 34  # characters of a label's name
NUMBERED_ZEROS = 6  # grids of up to so many labels show zeros too; in larger ones they would drown the errors
CELL = 0.42  # least width and height of a grid's cell, in inches
LETTER = 0.085  # width of a letter of a label's name, in inches


def draw_confusions(path: Path, task: Task, counts_LL: np.ndarray, title: str) -> None:
    """Counts of true (row) against predicted (column) labels, coloured by their share of the row.

    Of more than GRID_LABELS labels it shows the most confused ones, those confused with each other side by side, and
    one more column for all other predictions, so that each row still counts all texts of its label.
    """
    names = task.label_names
    partial = len(names) > GRID_LABELS
    labels = most_confused(counts_LL, GRID_LABELS) if partial else list(range(len(names)))
    rows = counts_LL[labels]
    cells = rows[:, labels]
    columns = [names[i] for i in labels]
    if partial:
        cells = np.column_stack([cells, rows.sum(axis=1) - cells.sum(axis=1)])
        columns.append("(any other)")
    shares = cells / np.maximum(rows.sum(axis=1, keepdims=True), 1)

    cell = max(CELL, 3.4 / len(columns))
    names_width = LETTER * max(len(_short(name)) for name in columns)
    level = names_width < cell  # whether the columns' names fit side by side; else they are turned
    size = (1.4 + names_width + cell * len(columns), 1.5 + (0 if level else 0.7 * names_width) + cell * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _name_ticks(axes, columns, [names[i] for i in labels], level)
    for (row, column), count in np.ndenumerate(cells):
        if count or len(columns) <= NUMBERED_ZEROS:
            shade = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", color=shade, fontsize=_number_size(count))
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    shown = f"the {len(labels)} most confused of {len(names)} labels; " if partial else ""
    _title(figure, title, f"{shown}texts of each true label, by what was predicted")
    _save(figure, path)


def most_confused(counts_LL: np.ndarray, most: int) -> list[int]:
    """Up to `most` labels that take part in the most frequent confusions, so ordered that partners stand together.

    Pairs of labels are taken by their number of confusions in both directions; labels without any, by their number of
    texts, fill up. The order is a chain from the worst pair on: next comes the label most confused with the last placed
    one, else with the one before it, and so on.
    """
    confused_LL = counts_LL + counts_LL.T
    np.fill_diagonal(confused_LL, 0)
    rows, columns = np.unravel_index(np.argsort(-np.triu(confused_LL), axis=None, kind="stable"), confused_LL.shape)
    pairs = [pair for pair in zip(rows.tolist(), columns.tolist(), strict=True) if confused_LL[pair]]
    busiest = np.argsort(-counts_LL.sum(axis=1), kind="stable").tolist()
    chosen = list(dict.fromkeys([label for pair in pairs for label in pair] + busiest))[:most]

    chain, left = [chosen[0]], chosen[1:]
    while left:
        partner = left[0]
        for placed in reversed(chain):
            nearest = left[int(np.argmax(confused_LL[placed, left]))]
            if confused_LL[placed, nearest]:
                partner = nearest
                break
        chain.append(partner)
        left.remove(partner)
    return chain


def draw_label_scores(path: Path, metrics: Metrics, title: str) -> None:
    """A bar for the F1 of each label that occurs, the worst at the top; of many labels the worst BAR_LABELS."""
    occurring = sorted((m for m in metrics.labels if m.support), key=lambda m: m.f1)
    shown = occurring[:BAR_LABELS]
    figure = Figure(figsize=(8, 1.9 + 0.26 * max(len(shown), 4)), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(shown))
    axes.barh(positions, [m.f1 for m in shown], color=BLUE, height=0.7)
    for position, m in enumerate(shown):
        note = f"{m.f1:.0%} · {m.support:,} texts"
        backing = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.text(m.f1 + 0.01, position, note, va="center", fontsize=8, color="#333333", bbox=backing)
    axes.set_yticks(positions, [_short(m.name) for m in shown], fontsize=9, parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    # Room for the numbers beside the longest bar.
    axes.set_xlim(0, 1.25)
    axes.set_xticks(np.arange(0, 1.01, 0.2))
    axes.axvline(metrics.macro_f1, color=ORANGE, zorder=0, label=f"macro-F1 {metrics.macro_f1:.1%}")
    figure.legend(loc="outside lower center", frameon=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    part = f"the worst {len(shown)} of {len(occurring)} labels" if len(shown) < len(occurring) else "all labels"
    _title(figure, title, f"F1 of {part}, the worst first")
    _save(figure, path)


def draw_reliability(path: Path, task: Task, probs_NL: np.ndarray, targets_NL: np.ndarray, title: str) -> None:
    """Accuracy against confidence in the bins of the expected calibration error, over a histogram of the confidence."""
    bins = reliability(task, probs_NL, targets_NL)
    filled = bins.counts > 0
    middles = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    figure = Figure(figsize=(6, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])

    upper.plot([0, 1], [0, 1], linestyle="--", color=GREY, linewidth=1, label="as sure as it is right")
    width = 1 / NUM_BINS
    both = np.minimum(bins.accuracy, bins.confidence)
    upper.bar(middles, both, width, color=BLUE, edgecolor="white")
    for gap, color, label in (
        (bins.confidence - bins.accuracy, ORANGE, "too sure: accuracy is less than confidence"),
        (bins.accuracy - bins.confidence, GREEN, "not sure enough: accuracy is more"),
    ):
        upper.bar(middles, np.maximum(gap, 0), width, both, color=color, edgecolor="white", alpha=0.6, label=label)
    upper.set_ylim(0, 1)
    upper.set_ylabel("share of right decisions" if task.kind.exclusive else "share of texts that have the label")
    figure.legend(loc="outside lower center", frameon=False)

    # On a logarithmic scale, as most decisions are sure and the few others are those to look at.
    lower.set_ylim(0.5, 6 * max(bins.counts.max(), 1))
    lower.set_yscale("log")
    bars = lower.bar(middles[filled], bins.counts[filled], width, color=BLUE, edgecolor="white")
    lower.bar_label(bars, [f"{count:,}" for count in bins.counts[filled]], fontsize=7)
    lower.set_ylabel("texts" if task.kind.exclusive else "decisions")
    lower.set_xlabel("confidence" if task.kind.exclusive else "probability of the label")
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.spines[["top", "right"]].set_visible(False)
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    over = "one decision a text" if task.kind.exclusive else "one decision for each text and label"
    _title(figure, title, f"ECE = {bins.ece:.2%}, {over}")
    _save(figure, path)


def draw_focus_curve(path: Path, speedups: Sequence[float], accuracies: Sequence[float], title: str) -> None:
    """Accuracy against speed, both relative to the first point, the dense classifier; with lines at 0.5 and 1 point."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(speedups)
    axes.plot(np.array(speedups)[order], 100 * np.array(accuracies)[order], color=BLUE, marker="o", markersize=5)
    for points, style in ((0.5, "--"), (1.0, ":")):
        level = 100 * accuracies[0] - points
        axes.axhline(level, color=GREY, linestyle=style, linewidth=1, label=f"{points:g} points below dense")
    axes.set_xlabel("speed against the dense classifier, in batches bucketed by length")
    axes.set_ylabel("accuracy, %")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _title(figure, title, "Focused Attention: accuracy and speed of one checkpoint")
    _save(figure, path)


def draw_curriculum(path: Path, tasks: Sequence[str], drawn: Mapping[str, np.ndarray]) -> None:
    """How often each stage (a bar) drew each task (a colour).

    Args:
      path: of the PNG file.
      tasks: names of the T tasks.
      drawn: int (T,) rows of each task, by stage.
    """
    figure = Figure(figsize=(8, 1.6 + 0.55 * len(drawn) + 0.16 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20"]
    stages = list(drawn)
    before = np.zeros(len(stages))
    for number, task in enumerate(tasks):
        rows = np.array([drawn[stage][number] for stage in stages], float)
        axes.barh(stages, rows, left=before, color=colours(number % 20), label=_short(task))
        before += rows
    axes.invert_yaxis()
    axes.set_xlabel("examples drawn")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _title(figure, "Curriculum", "how often each stage saw each task")
    _save(figure, path)


def _name_ticks(axes: Axes, columns: list[str], rows: list[str], level: bool) -> None:
    names = [_short(name) for name in columns]
    turned = {} if level else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, fontsize=9, parse_math=False, **turned)
    axes.set_yticks(range(len(rows)), [_short(name) for name in rows], fontsize=9, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def _number_size(count: int) -> int:
    return 9 if count < 1_000 else 7 if count < 10_000 else 6


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _title(figure: Figure, title: str, subtitle: str) -> None:
    figure.suptitle(f"{_short(title)}\n{subtitle}", fontsize=11, parse_math=False)


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks becomes boxes; report.md has it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=DPI)
