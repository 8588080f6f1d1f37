"""Tasks, their labels and the taxonomy, which numbers the labels of all tasks in one global index.

Axes: L labels of one task, or of the whole taxonomy where the docstring says so.
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
    """The kind of a task; it decides the activation, the loss and the decoding."""

    BINARY = "binary"  # two labels, exactly one per text
    MULTICLASS = "multiclass"  # two or more labels, exactly one per text
    MULTILABEL = "multilabel"  # any number of labels per text
    HIERARCHICAL = "hierarchical"  # a tree of labels: one per text, which implies its ancestors

    @property
    def exclusive(self) -> bool:
        """True if a text has exactly one label (softmax), false if any number (sigmoids)."""
        return self is not TaskKind.MULTILABEL


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """A label of a task.

    Attributes:
      name: unique within the task.
      description: its meaning, for human readers.
      parent: the parent label's name, in hierarchical tasks only; None for a root.
    """

    name: str
    description: str | None = None
    parent: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task: its kind, and its labels in the order of the model's outputs.

    Raises:
      InputError: a name is empty or repeated, the kind does not allow this number of labels, or the parents do not
        form a tree.
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
        sound: set[str] = set()  # labels whose path to a root is known to be free of cycles
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
        """int32 (L,): the position of each label's parent; -1 for a root."""
        parents = [-1 if label.parent is None else self.index[label.parent] for label in self.labels]
        return np.array(parents, np.int32)

    @functools.cached_property
    def group_L(self) -> np.ndarray:
        """int32 (L,): each label's sibling group, numbered from 0. An exclusive task has one softmax per group."""
        return np.unique(self.parent_L, return_inverse=True)[1].astype(np.int32)

    @functools.cached_property
    def leaves_L(self) -> np.ndarray:
        """bool (L,): whether the label is a leaf."""
        leaves_L = np.ones(len(self.labels), bool)
        leaves_L[self.parent_L[self.parent_L >= 0]] = False
        return leaves_L

    @functools.cached_property
    def depth_L(self) -> np.ndarray:
        """int32 (L,): the number of each label's ancestors."""
        depth_L = np.zeros(len(self.labels), np.int32)
        above_L = self.parent_L
        while (above_L >= 0).any():
            depth_L += above_L >= 0
            above_L = np.where(above_L >= 0, self.parent_L[above_L], -1)
        return depth_L

    def path(self, label: int) -> tuple[str, ...]:
        """The names on the path from the root to the label at position `label`, both included."""
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
        """Reads the output of `to_json`, or a `task.json`; further fields are ignored.

        Args:
          data: the decoded JSON object.
          source: the file's name, for error messages.

        Raises:
          InputError: a field is missing or malformed, or the task is invalid.
        """
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
    """Adds each label's target to all of its ancestors.

    Args:
      parent_L: int (L,), the parents in the task or the taxonomy; -1 for a root.
      targets_NL: the targets of each row: a NumPy array, or a sparse one in SciPy's CSR format.

    Returns:
      An array of the same kind and shape: each label has the sum over itself and its descendants.
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
    """Properties of every label of the taxonomy; axis L is the global label index.

    Attributes:
      task_L: int32, the position of the label's task.
      group_L: int32, the label's sibling group; groups never span tasks.
      parent_L: int32, the global index of the parent; -1 for a root.
      exclusive_L: bool, true for a softmax over the sibling group, false for a sigmoid per label.
      num_groups: the number of sibling groups.
    """

    task_L: np.ndarray
    group_L: np.ndarray
    parent_L: np.ndarray
    exclusive_L: np.ndarray
    num_groups: int


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """All tasks of a model. Their labels, concatenated in order, form the global label index.

    Raises:
      InputError: there is no task, or two tasks have the same name.
    """

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
        """The task's range in the global label index.

        Raises:
          InputError: no task has this name.
        """
        start = 0
        for task in self.tasks:
            if task.name == name:
                return slice(start, start + len(task.labels))
            start += len(task.labels)
        self.task(name)  # raises
        raise AssertionError("unreachable")

    @functools.cached_property
    def table(self) -> LabelTable:
        """The properties of every label that training needs, by global index."""
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
        """Reads the output of `to_json`.

        Args:
          data: the decoded JSON object.
          source: the file's name, for error messages.

        Raises:
          InputError: the list of tasks is missing, or a task is invalid.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("tasks"), list):
            raise InputError(f"{source}: the taxonomy has no list 'tasks'.")
        return cls(tasks=tuple(Task.from_json(task, source=source) for task in data["tasks"]))
