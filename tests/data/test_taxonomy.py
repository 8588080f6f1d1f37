"""Label trees: their structure, invalid trees, and large ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from scipy.sparse import csr_array

from classer.data.errors import InputError
from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy, with_ancestors
from classer.tests.strategies import trees

# a ─ b ─ c, d;  a ─ e;  f: of uneven depth, some children listed before their parents
TREE = Task(
    "tree",
    TaskKind.HIERARCHICAL,
    tuple(
        Label(name, parent=parent)
        for name, parent in (("c", "b"), ("a", None), ("b", "a"), ("d", "b"), ("e", "a"), ("f", None))
    ),
)


def test_the_shape_of_a_tree() -> None:
    assert TREE.parent_L.tolist() == [2, -1, 1, 2, 1, -1]
    assert TREE.leaves_L.tolist() == [True, False, False, True, True, True]
    assert TREE.depth_L.tolist() == [2, 0, 1, 2, 1, 0]
    assert TREE.path(0) == ("a", "b", "c")
    siblings = [set(np.flatnonzero(TREE.group_L == group)) for group in range(3)]
    assert sorted(map(sorted, siblings)) == [[0, 3], [1, 5], [2, 4]]
    assert Task.from_json(TREE.to_json(), source="x") == TREE


def test_a_flat_task_is_one_set_of_siblings() -> None:
    flat = Task("flat", TaskKind.MULTICLASS, tuple(map(Label, "abc")))
    assert flat.group_L.tolist() == [0, 0, 0]
    assert flat.leaves_L.all()
    assert flat.path(1) == ("b",)


@given(trees())
def test_paths_lead_from_the_top_along_parents(task: Task) -> None:
    for i, label in enumerate(task.labels):
        path = task.path(i)
        assert path[-1] == label.name
        assert len(path) == task.depth_L[i] + 1
        above = [task.labels[task.index[name]].parent for name in path]
        assert above == [None, *path[:-1]]


@given(trees())
def test_targets_with_ancestors_hold_on_the_whole_path(task: Task) -> None:
    targets_NL = np.eye(len(task.labels), dtype=np.float32)
    held_NL = with_ancestors(task.parent_L, targets_NL)
    for i in range(len(task.labels)):
        assert {task.label_names[j] for j in np.flatnonzero(held_NL[i])} == set(task.path(i))
    assert set(np.unique(held_NL)) <= {0, 1}
    np.testing.assert_array_equal(with_ancestors(task.parent_L, csr_array(targets_NL)).toarray(), held_NL)


def labels(*pairs: tuple[str, str | None]) -> list[dict]:
    return [{"name": name, **({"parent": parent} if parent else {})} for name, parent in pairs]


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("hierarchical", labels(("a", "b"), ("b", "c"), ("c", "a")), r"'a' stands above itself \(a → b → c → a\)"),
        ("hierarchical", labels(("a", "a"), ("b", None)), r"'a' stands above itself \(a → a\)"),
        ("hierarchical", labels(("a", None), ("x", "a"), ("x", "b"), ("b", None)), r"'x' has two parents, 'a' and 'b'"),
        ("hierarchical", [{"name": "x", "parent": ["a", "b"]}], r"'x' has a list of parents; a label has one at most"),
        ("hierarchical", labels(("a", None), ("x", "a"), ("x", "a")), r"names the label 'x' twice"),
        ("hierarchical", labels(("x", "nowhere"), ("y", None)), r"'x' has the parent 'nowhere', which is no label"),
        (
            "hierarchical",
            labels(("x", None), ("y", None)),
            r"none of its labels has a parent; .* call it multiclass\. It has 'x', 'y'\.",
        ),
        ("hierarchical", labels(("x", None), ("y", "x")), r"has one leaf only, 'y'"),
        ("multiclass", labels(("x", None), ("y", "x")), r"is multiclass, but its label 'y' has a parent"),
        ("binary", labels(*((f"l{i}", None) for i in range(7))), r"needs 2 labels, not 7 \('l0', .*'l4' and 2 more\)"),
        ("binary", labels(("x", None)), r"'t' is binary and so needs 2 labels, not 1 \('x'\)"),
        ("multiclass", labels(("x", None)), r"'t' is multiclass and so needs at least 2 labels, not 1 \('x'\)"),
        ("multiclass", [], r"needs at least 2 labels, not 0\."),
        ("hierarchical", [{"name": "x", "parent": 3}], r"the parent of the label 'x' must be a string, not 3"),
    ],
)
def test_what_is_no_tree_is_refused_with_its_label(kind: str, entries: list[dict], message: str) -> None:
    with pytest.raises(InputError, match=f"^task.json: .*{message}"):
        Task.from_json({"name": "t", "kind": kind, "labels": entries}, source="task.json")


def test_the_label_table_numbers_all_tasks_labels() -> None:
    flags = Task("flags", TaskKind.MULTILABEL, (Label("x"), Label("y")))
    table = Taxonomy((flags, TREE)).table
    assert table.task_L.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert table.exclusive_L.tolist() == [False] * 2 + [True] * 6
    assert table.parent_L.tolist() == [-1, -1, 4, -1, 3, 4, 3, -1]
    assert table.num_groups == 4
    assert set(table.group_L[:2]) & set(table.group_L[2:]) == set()


def test_a_tree_of_twenty_thousand_labels(tmp_path: Path) -> None:
    entries = labels(*((f"top {i}", None) for i in range(200)))
    entries += labels(*((f"label {i}", f"top {i % 200}") for i in range(20_000)))
    taxonomy = Taxonomy.from_json(
        {"tasks": [{"name": "t", "kind": "hierarchical", "labels": entries}]}, source="taxonomy.json"
    )
    assert taxonomy.table.num_groups == 201
    assert taxonomy.tasks[0].path(20_199) == ("top 199", "label 19999")
    file = tmp_path / "taxonomy.json"
    file.write_text(json.dumps(taxonomy.to_json()))
    loaded = Taxonomy.from_json(json.loads(file.read_text()), source=str(file))
    assert loaded == taxonomy
    np.testing.assert_array_equal(loaded.table.group_L, taxonomy.table.group_L)
