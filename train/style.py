"""The look of reports: Markdown tables, and the colours and resolution of pictures. Loads nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DPI = 130
BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#e07b39", "#5aa469", "#8a8a8a"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table whose first `words` columns are words, to the left; the others are numbers, to the right."""
    sides = ("---",) * words + ("---:",) * (len(header) - words)
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, sides, *rows])
