"""Tasks and labels: the named questions a model answers, in one global label index.

Axes: L labels, of one task or, where it says so, of the whole taxonomy.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import InputError, listed


class TaskKind(enum.StrEnum):
    """How a task's labels relate: which activation, loss and decoding it takes."""

    BINARY = "binary"  # two labels, exactly one holds
    MULTICLASS = "multiclass"  # three or more labels, exactly one holds
    MULTILABEL = "multilabel"  # any number of labels hold
    HIERARCHICAL = "hierarchical"  # a tree of labels: exactly one is given, and those above it hold with it

    @property
    def exclusive(self) -> bool:
        """Whether a text is given exactly one label (softmax) rather than any number (sigmoids)."""
        return self is not TaskKind.MULTILABEL


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """One possible answer of a task.

    Attributes:
      name: unique within the task.
      description: what it means, for people.
      parent: hierarchical tasks only: the name of the label above; None at the top.
    """

    name: str
    description: str | None = None
    parent: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A named question: its kind and its labels, in the order of the model's outputs.

    Raises:
      InputError: an empty or repeated label name, a number of labels that the kind cannot have, or parents that make
        no tree.
    """

    name: str
    kind: TaskKind
    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("A task needs a name; this one's is empty.")
        seen: dict[str, Label] = {}
        for label in self.labels:
            if not label.name:
                raise InputError(f"Task '{self.name}' has a label with an empty name.")
            twin = seen.setdefault(label.name, label)
            if twin is not label and twin.parent != label.parent:
                raise InputError(
                    f"Task '{self.name}': the label '{label.name}' has two parents, {_top_or(twin.parent)} and "
                    f"{_top_or(label.parent)}; a label stands in one place of the tree."
                )
            if twin is not label:
                raise InputError(f"Task '{self.name}' names the label '{label.name}' twice; label names must differ.")
        count = len(self.labels)
        named = f" ({listed([label.name for label in self.labels], 5)})" if count else ""
        if self.kind is TaskKind.BINARY and count != 2:
            raise InputError(f"Task '{self.name}' is binary and so needs 2 labels, not {count}{named}.")
        if self.kind is TaskKind.MULTICLASS and count < 2:
            raise InputError(f"Task '{self.name}' is multiclass and so needs at least 2 labels, not {count}{named}.")
        if self.kind is TaskKind.MULTILABEL and count < 1:
            raise InputError(f"Task '{self.name}' is multilabel and needs at least 1 label.")
        self._check_tree(seen)

    def _check_tree(self, labels: Mapping[str, Label]) -> None:
        with_parent = [label for label in self.labels if label.parent is not None]
        if self.kind is not TaskKind.HIERARCHICAL:
            if with_parent:
                raise InputError(
                    f"Task '{self.name}' is {self.kind}, but its label '{with_parent[0].name}' has a parent; only "
                    f"the labels of hierarchical tasks do."
                )
            return
        if not with_parent:
            raise InputError(
                f"Task '{self.name}' is hierarchical, but none of its labels has a parent; give some, or call it "
                f"multiclass. It has {listed(list(labels), 5) or 'no labels'}."
            )
        for label in with_parent:
            if label.parent not in labels:
                raise InputError(
                    f"Task '{self.name}': the label '{label.name}' has the parent '{label.parent}', which is no label "
                    f"of the task."
                )
        sound: set[str] = set()  # labels known to lead to the top
        for label in with_parent:
            path: dict[str, None] = {}
            above: str | None = label.name
            while above is not None and above not in sound:
                if above in path:
                    cycle = " → ".join([*list(path)[list(path).index(above) :], above])
                    raise InputError(f"Task '{self.name}': the label '{above}' stands above itself ({cycle}).")
                path[above] = None
                above = labels[above].parent
            sound.update(path)
        if self.leaves_L.sum() < 2:
            (leaf,) = np.flatnonzero(self.leaves_L)
            raise InputError(
                f"Task '{self.name}' has one leaf only, '{self.labels[leaf].name}'; a classifier needs at least two to "
                f"tell apart."
            )

    @functools.cached_property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    @functools.cached_property
    def index(self) -> Mapping[str, int]:
        """Label name → position within the task."""
        return {name: i for i, name in enumerate(self.label_names)}

    @functools.cached_property
    def parent_L(self) -> np.ndarray:
        """int32 (L,): the position of each label's parent; -1 at the top."""
        parents = [-1 if label.parent is None else self.index[label.parent] for label in self.labels]
        return np.array(parents, np.int32)

    @functools.cached_property
    def group_L(self) -> np.ndarray:
        """int32 (L,): a number for each set of siblings, from 0: labels between which the model decides at once."""
        return np.unique(self.parent_L, return_inverse=True)[1].astype(np.int32)

    @functools.cached_property
    def leaves_L(self) -> np.ndarray:
        """bool (L,): whether nothing stands below the label."""
        leaves_L = np.ones(len(self.labels), bool)
        leaves_L[self.parent_L[self.parent_L >= 0]] = False
        return leaves_L

    @functools.cached_property
    def depth_L(self) -> np.ndarray:
        """int32 (L,): how many labels stand above each."""
        depth_L = np.zeros(len(self.labels), np.int32)
        above_L = self.parent_L
        while (above_L >= 0).any():
            depth_L += above_L >= 0
            above_L = np.where(above_L >= 0, self.parent_L[above_L], -1)
        return depth_L

    def path(self, label: int) -> tuple[str, ...]:
        """The names from the top of the tree down to the label at that position, itself included."""
        names = []
        while label >= 0:
            names.append(self.label_names[label])
            label = int(self.parent_L[label])
        return tuple(reversed(names))

    def to_json(self) -> dict[str, Any]:
        labels = [{k: v for k, v in dataclasses.asdict(label).items() if v is not None} for label in self.labels]
        return {"name": self.name, "kind": self.kind.value, "labels": labels}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: str) -> Task:
        """Reads what `to_json` wrote (a `task.json` has the same fields and more, which are ignored)."""
        try:
            kind = TaskKind(data["kind"])
        except KeyError:
            raise InputError(f"{source}: the task has no field 'kind'.") from None
        except ValueError:
            kinds = ", ".join(TaskKind)
            raise InputError(f"{source}: kind '{data['kind']}' is none of those supported ({kinds}).") from None
        if "labels" not in data:
            raise InputError(f"{source}: the task has no field 'labels'.")
        entries = data["labels"]
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise InputError(f'{source}: \'labels\' must be a list of objects such as {{"name": "refund"}}.')
        for name in (data.get("name", ""), *(entry.get("name", "") for entry in entries)):
            if not isinstance(name, str):
                raise InputError(f"{source}: a name must be a string, not {name!r}.")
        for entry in entries:
            if isinstance(entry.get("parent"), list):
                raise InputError(
                    f"{source}: the label '{entry.get('name')}' has a list of parents; a label has one at most."
                )
            for field in ("parent", "description"):
                if not isinstance(entry.get(field), str | None):
                    raise InputError(
                        f"{source}: the {field} of the label '{entry.get('name')}' must be a string, not "
                        f"{entry[field]!r}."
                    )
        try:
            labels = tuple(Label(entry["name"], entry.get("description"), entry.get("parent")) for entry in entries)
            name = data["name"]
        except KeyError as e:
            raise InputError(f"{source}: the task has no field {e}.") from None
        try:
            return cls(name=name, kind=kind, labels=labels)
        except InputError as e:
            raise InputError(f"{source}: {e}") from None


def with_ancestors(parent_L: np.ndarray, targets_NL: Any) -> Any:
    """Targets in which each label counts for those above it too.

    Args:
      parent_L: of the task or the taxonomy; -1 at the top.
      targets_NL: what each row is given: an array, or a sparse one in SciPy's CSR format.

    Returns:
      The same kind of array: every label has the sum over itself and all below it.
    """
    held_NL, above_L = targets_NL, parent_L
    while (above_L >= 0).any():  # one step up the tree at a time
        rows = np.flatnonzero(above_L >= 0)
        if isinstance(targets_NL, np.ndarray):
            step_NL = np.zeros_like(targets_NL)
            np.add.at(step_NL.T, above_L[rows], targets_NL.T[rows])
        else:
            up_LL = type(targets_NL)((np.ones(len(rows), np.float32), (rows, above_L[rows])), (len(parent_L),) * 2)
            step_NL = targets_NL @ up_LL
        held_NL = held_NL + step_NL
        above_L = np.where(above_L >= 0, parent_L[above_L], -1)
    return held_NL


def _top_or(parent: str | None) -> str:
    return "the top" if parent is None else f"'{parent}'"


@dataclasses.dataclass(frozen=True, eq=False)
class LabelTable:
    """The rows of the label table, over the whole taxonomy.

    Attributes:
      task_L: int32, the position of the label's task.
      group_L: int32, its set of siblings; those of different tasks differ.
      parent_L: int32, the row of the label above; -1 at the top.
      exclusive_L: bool, whether it shares a softmax with its siblings (else it has a sigmoid of its own).
      num_groups: how many sets of siblings there are.
    """

    task_L: np.ndarray
    group_L: np.ndarray
    parent_L: np.ndarray
    exclusive_L: np.ndarray
    num_groups: int


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """All tasks of a model; their labels, one after the other, are the rows of the model's label table."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        for name, count in collections.Counter(names).items():
            if count > 1:
                raise InputError(f"The taxonomy names the task '{name}' twice; task names must differ.")
        if not names:
            raise InputError("A taxonomy needs at least one task.")

    @functools.cached_property
    def num_labels(self) -> int:
        return sum(len(task.labels) for task in self.tasks)

    def task(self, name: str) -> Task:
        for task in self.tasks:
            if task.name == name:
                return task
        known = ", ".join(task.name for task in self.tasks)
        raise InputError(f"There is no task '{name}'; this model has: {known}.")

    def slice_of(self, name: str) -> slice:
        """The task's rows in the global label index."""
        start = 0
        for task in self.tasks:
            if task.name == name:
                return slice(start, start + len(task.labels))
            start += len(task.labels)
        self.task(name)  # raises
        raise AssertionError("unreachable")

    @functools.cached_property
    def table(self) -> LabelTable:
        """What training must know of every label, in the global index."""
        offsets = np.cumsum([0, *(len(task.labels) for task in self.tasks)])
        groups = np.cumsum([0, *(int(task.group_L.max()) + 1 for task in self.tasks)])
        parents = [
            np.where(task.parent_L >= 0, task.parent_L + start, -1)
            for task, start in zip(self.tasks, offsets[:-1], strict=True)
        ]
        return LabelTable(
            task_L=np.concatenate([np.full(len(task.labels), i, np.int32) for i, task in enumerate(self.tasks)]),
            group_L=np.concatenate([task.group_L + start for task, start in zip(self.tasks, groups[:-1], strict=True)]),
            parent_L=np.concatenate(parents).astype(np.int32),
            exclusive_L=np.concatenate([np.full(len(task.labels), task.kind.exclusive) for task in self.tasks]),
            num_groups=int(groups[-1]),
        )

    def to_json(self) -> dict[str, Any]:
        return {"tasks": [task.to_json() for task in self.tasks]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: str) -> Taxonomy:
        """Reads what `to_json` wrote; `source` names the file in errors (InputError)."""
        if not isinstance(data, Mapping) or not isinstance(data.get("tasks"), list):
            raise InputError(f"{source}: the taxonomy has no list 'tasks'.")
        return cls(tasks=tuple(Task.from_json(task, source=source) for task in data["tasks"]))
