"""What a load test found: the summary of a run, and a report folder of JSON, Markdown and pictures.

Axes: `N` calls.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from classer.train.style import BLUE, DPI, GREEN, GREY, ORANGE, markdown_table

from .load_runner import OK, OUTCOMES, TIMED_OUT, Recorder

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
MAX_WINDOWS = 120


@dataclasses.dataclass(frozen=True)
class Window:
    """One stretch of a run: the calls that were due in it, whenever they were answered.

    Attributes:
      start, seconds: where it lies.
      calls: how many were due.
      ok: how many of them were answered.
      p50_ms, p99_ms: latency of the answered ones, from when they were due; None if there were none.
    """

    start: float
    seconds: float
    calls: int
    ok: int
    p50_ms: float | None
    p99_ms: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one run found.

    Attributes:
      seconds: from the start to the last answer.
      calls: how many were made.
      offered: calls a second that were due, over the time in which they were due.
      answered: calls a second that were answered, over `seconds`.
      texts_answered: texts a second that were answered, over `seconds`.
      outcomes: calls by status; TIMED_OUT are those to which the server had said nothing within their deadline.
      text_outcomes: texts by status.
      late: answered calls whose answer came after their deadline.
      latency_ms: of answered calls, from when they were due: mean, max, and percentiles by name ("p99").
      from_send_ms: the same from when they were really sent, which hides what a slow server made wait outside.
      refused_ms: of calls that the server itself refused, from when they were sent.
      send_lag_ms: how late calls were sent. Large: this machine could not keep up with the schedule.
      windows: the run, stretch by stretch.
      memory_mb: (seconds, resident MB) of the process that was watched.
    """

    seconds: float
    calls: int
    offered: float
    answered: float
    texts_answered: float
    outcomes: dict[str, int]
    text_outcomes: dict[str, int]
    late: int
    latency_ms: dict[str, float]
    from_send_ms: dict[str, float]
    refused_ms: dict[str, float]
    send_lag_ms: dict[str, float]
    windows: list[Window]
    memory_mb: list[tuple[float, float]]

    @property
    def failed_share(self) -> float:
        """The share of calls that were not answered."""
        return 1 - self.outcomes.get(OK, 0) / max(self.calls, 1)


def summarise(
    recorder: Recorder, seconds: float, boundaries: Sequence[float] = (), memory_mb: Sequence[tuple[float, float]] = ()
) -> Summary:
    """Sums a run up.

    Args:
      recorder: what became of each call.
      seconds: for how long calls were due.
      boundaries: where windows begin and end; by default a second each, longer where that would make too many.
      memory_mb: samples of the watched process.
    """
    due_N, sent_N, done_N = (np.array(x) for x in (recorder.due, recorder.sent, recorder.done))
    outcomes_N = np.array(recorder.outcomes, dtype=object)
    ok_N = outcomes_N == OK
    refused_N = ~ok_N & (outcomes_N != TIMED_OUT)
    last = max(float(done_N.max(initial=0.0)), seconds)
    if not boundaries:
        step = max(1.0, np.ceil(seconds / MAX_WINDOWS))
        boundaries = [*np.arange(0.0, seconds, step), seconds]
    return Summary(
        seconds=last,
        calls=len(due_N),
        offered=len(due_N) / seconds,
        answered=float(ok_N.sum()) / last,
        texts_answered=recorder.texts[OK] / last,
        outcomes={name: count for name in OUTCOMES if (count := int((outcomes_N == name).sum()))},
        text_outcomes={name: recorder.texts[name] for name in OUTCOMES if recorder.texts[name]},
        late=int((done_N - sent_N > recorder.timeout)[ok_N].sum()),
        latency_ms=spread((done_N - due_N)[ok_N] * 1e3),
        from_send_ms=spread((done_N - sent_N)[ok_N] * 1e3),
        refused_ms=spread((done_N - sent_N)[refused_N] * 1e3),
        send_lag_ms=spread((sent_N - due_N) * 1e3),
        windows=[_window(a, b, due_N, done_N, ok_N) for a, b in itertools.pairwise(boundaries) if b > a],
        memory_mb=[(round(at, 1), round(mb, 1)) for at, mb in memory_mb],
    )


def spread(values_N: np.ndarray) -> dict[str, float]:
    """Mean, maximum and percentiles; empty if there is nothing to sum up."""
    if not len(values_N):
        return {}
    points = {
        f"p{q:g}": float(value) for q, value in zip(PERCENTILES, np.percentile(values_N, PERCENTILES), strict=True)
    }
    return {"mean": float(values_N.mean()), **points, "max": float(values_N.max())}


def _window(start: float, end: float, due_N: np.ndarray, done_N: np.ndarray, ok_N: np.ndarray) -> Window:
    inside_N = (due_N >= start) & (due_N < end)
    own = spread((done_N - due_N)[inside_N & ok_N] * 1e3)
    count, ok = int(inside_N.sum()), int((inside_N & ok_N).sum())
    return Window(float(start), float(end - start), count, ok, own.get("p50"), own.get("p99"))


@dataclasses.dataclass(frozen=True)
class Try:
    """One rate that the search for the highest one tried, and whether it was held."""

    rate: float
    held: bool
    why: str
    summary: Summary


def write_load_report(
    folder: Path,
    title: str,
    settings: dict[str, Any],
    summary: Summary | None,
    recorder: Recorder | None,
    tries: Sequence[Try] = (),
    target_ms: float = 0.0,
) -> None:
    """Writes `load.json`, `report.md` and the pictures into a new folder.

    Args:
      folder: to be made.
      title: what was tested, in a line.
      settings: what the run was told.
      summary, recorder: of the run; None if it was a search.
      tries: of a search, in their order.
      target_ms: what the search held the 99th percentile to.
    """
    folder.mkdir(parents=True)
    data = {
        "title": title,
        "settings": settings,
        "summary": None if summary is None else dataclasses.asdict(summary),
        "tries": [dataclasses.asdict(one) for one in tries],
        "highest_rate": max((one.rate for one in tries if one.held), default=None),
    }
    (folder / "load.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    sections = [f"# {title}\n"]
    if tries:
        draw_search(folder / "search.png", tries, target_ms, title)
        sections += ["![The 99th percentile at each rate](search.png)\n", _tries(tries, target_ms)]
    if summary is not None and recorder is not None:
        sections += [describe(summary)]
        if summary.latency_ms:
            draw_latency(folder / "latency.png", recorder, title)
            sections.append("![Latency by percentile](latency.png)\n")
        draw_timeline(folder / "timeline.png", summary, title)
        sections += ["![The run over time](timeline.png)\n", _windows(summary)]
    rows = [(name, f"`{value}`") for name, value in settings.items()]
    sections += ["## Settings\n", markdown_table(("", ""), rows)]
    (folder / "report.md").write_text("\n".join(sections), encoding="utf-8")


def describe(summary: Summary) -> str:
    """A run in Markdown: what was asked, what became of it, and the latencies."""
    s = summary
    lead = (
        f"{s.calls:,} calls in {s.seconds:.1f} s: {s.offered:,.1f} a second were due, {s.answered:,.1f} a second were "
        f"answered ({s.texts_answered:,.1f} texts a second).\n"
    )
    outcomes = [(name, f"{count:,}", f"{count / max(s.calls, 1):.2%}") for name, count in s.outcomes.items()]
    rows = []
    for name, values in (
        ("answered, from when due", s.latency_ms),
        ("answered, from when sent", s.from_send_ms),
        ("refused, from when sent", s.refused_ms),
        ("sent too late by", s.send_lag_ms),
    ):
        if values:
            rows.append((name, *(f"{value:,.1f}" for value in values.values())))
    header = ("ms", "mean", *(f"p{q:g}" for q in PERCENTILES), "max")
    parts = [lead, markdown_table(("status", "calls", "share"), outcomes), markdown_table(header, rows)]
    parts.append(f"Answers that came after their deadline: {s.late}.\n")
    if s.memory_mb:
        sizes = [mb for _, mb in s.memory_mb]
        parts.append(
            f"Resident memory of the watched process: {sizes[0]:,.0f} MB at the start, {max(sizes):,.0f} MB at most, "
            f"{sizes[-1]:,.0f} MB at the end.\n"
        )
    return "\n".join(parts)


def _windows(summary: Summary) -> str:
    rows = [
        (
            f"{w.start:,.0f}–{w.start + w.seconds:,.0f}",
            f"{w.calls / w.seconds:,.1f}",
            f"{w.ok / w.seconds:,.1f}",
            "–" if w.p50_ms is None else f"{w.p50_ms:,.1f}",
            "–" if w.p99_ms is None else f"{w.p99_ms:,.1f}",
        )
        for w in summary.windows
    ]
    header = ("seconds", "due, calls/s", "answered of them, calls/s", "p50, ms", "p99, ms")
    return f"## Over time\n\n{markdown_table(header, rows)}"


def _tries(tries: Sequence[Try], target_ms: float) -> str:
    held = [one.rate for one in tries if one.held]
    found = (
        f"The highest rate that was held: **{max(held):,.1f} calls a second**."
        if held
        else "No rate that was tried was held."
    )
    rows = [
        (
            f"{one.rate:,.1f}",
            f"{one.summary.latency_ms.get('p50', float('nan')):,.1f}",
            f"{one.summary.latency_ms.get('p99', float('nan')):,.1f}",
            f"{one.summary.failed_share:.2%}",
            one.why,
        )
        for one in tries
    ]
    header = ("calls/s", "p50, ms", "p99, ms", "not answered", "")
    return f"{found} Wanted: a p99 of at most {target_ms:g} ms.\n\n{markdown_table(header, rows)}"


def draw_latency(path: Path, recorder: Recorder, title: str) -> None:
    """Latency at each percentile, from when calls were due and from when they were sent; the last nines drawn wide."""
    due_N, sent_N, done_N = (np.array(x) for x in (recorder.due, recorder.sent, recorder.done))
    ok_N = np.array(recorder.outcomes, dtype=object) == OK
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    count = int(ok_N.sum())
    # 1/(1 − q): one step to the right is a ten times rarer call.
    rarity_N = count / (count - np.arange(count))
    # Where the two are alike, the thinner one lies on the thicker.
    lines = ((due_N, BLUE, 3.5, "from when it was due"), (sent_N, ORANGE, 1.2, "from when it was sent"))
    for start_N, colour, width, label in lines:
        axes.plot(rarity_N, np.sort((done_N - start_N)[ok_N]) * 1e3, color=colour, linewidth=width, label=label)
    axes.set_xscale("log")
    ticks = [1 / (1 - q) for q in (0, 0.5, 0.9, 0.99, 0.999, 0.9999)]
    names = ["0", "50", "90", "99", "99.9", "99.99"]
    shown = [(tick, name) for tick, name in zip(ticks, names, strict=True) if tick <= max(count, 2)]
    axes.set_xticks([tick for tick, _ in shown], [name for _, name in shown])
    axes.minorticks_off()
    axes.set_xlabel("percentile of answered calls")
    axes.set_ylabel("latency, ms")
    axes.set_ylim(bottom=0)
    _finish(figure, path, title, "Latency by percentile")


def draw_timeline(path: Path, summary: Summary, title: str) -> None:
    """Due and answered calls a second above, latency below, and the watched process's memory if there is one."""
    windows = [w for w in summary.windows if w.seconds]
    figure = Figure(figsize=(8, 7.6 if summary.memory_mb else 5.6), layout="constrained")
    all_axes = figure.subplots(3 if summary.memory_mb else 2, 1, sharex=True)
    rates, latencies = all_axes[0], all_axes[1]
    middles = [w.start + w.seconds / 2 for w in windows]
    rates.plot(middles, [w.calls / w.seconds for w in windows], color=GREY, label="due")
    rates.plot(middles, [w.ok / w.seconds for w in windows], color=GREEN, label="answered of them")
    rates.set_ylabel("calls a second")
    rates.set_ylim(bottom=0)
    answered = [
        (middle, w.p50_ms, w.p99_ms) for middle, w in zip(middles, windows, strict=True) if w.p50_ms is not None
    ]
    for column, colour, label in ((1, BLUE, "p50"), (2, ORANGE, "p99")):
        latencies.plot([row[0] for row in answered], [row[column] for row in answered], color=colour, label=label)
    latencies.set_ylabel("latency, ms")
    latencies.set_ylim(bottom=0)
    if summary.memory_mb:
        all_axes[2].plot(*zip(*summary.memory_mb, strict=True), color=GREY, label="resident memory")
        all_axes[2].set_ylabel("MB")
        all_axes[2].set_ylim(0, 1.1 * max(mb for _, mb in summary.memory_mb) + 1)
    all_axes[-1].set_xlabel("seconds")
    _finish(figure, path, title, "Rate and latency over time")


def draw_search(path: Path, tries: Sequence[Try], target_ms: float, title: str) -> None:
    """The 99th percentile at each rate that was tried, and the line that it had to stay below."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for held, colour, label in ((True, GREEN, "held"), (False, ORANGE, "not held")):
        points = [
            (one.rate, one.summary.latency_ms["p99"]) for one in tries if one.held is held and one.summary.latency_ms
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, label=label)
    axes.axhline(target_ms, color=GREY, linestyle="--", linewidth=1, label="wanted at most")
    axes.set_yscale("log")
    axes.set_xlabel("calls a second")
    axes.set_ylabel("p99, ms")
    _finish(figure, path, title, "The highest rate")


def _finish(figure: Figure, path: Path, title: str, subtitle: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(f"{title}\n{subtitle}", fontsize=11, parse_math=False)
    figure.savefig(path, dpi=DPI)
