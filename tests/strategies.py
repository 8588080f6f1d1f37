"""Hypothesis strategies of tests in several packages."""

from __future__ import annotations

import hypothesis.strategies as st

from classer.data.taxonomy import Label, Task, TaskKind


@st.composite
def trees(draw: st.DrawFn) -> Task:
    """A hierarchical task with 3 to 12 labels in any order."""
    count = draw(st.integers(3, 12))
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    parents[1], parents[2] = draw(st.sampled_from([(0, 0), (-1, 1)]))  # at least two leaves and one parent
    order = draw(st.permutations(range(count)))
    labels = [Label(f"l{i}", parent=None if parents[i] < 0 else f"l{parents[i]}") for i in order]
    return Task("t", TaskKind.HIERARCHICAL, tuple(labels))
