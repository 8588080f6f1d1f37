"""Tasks and labels: the named questions a model answers, in one global label index."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import Any

from .errors import InputError


class TaskKind(enum.StrEnum):
    """How a task's labels relate: which activation, loss and decoding it takes."""

    BINARY = "binary"  # two labels, exactly one holds
    MULTICLASS = "multiclass"  # three or more labels, exactly one holds
    MULTILABEL = "multilabel"  # any number of labels hold

    @property
    def exclusive(self) -> bool:
        """Whether exactly one label holds (softmax) rather than any number (sigmoids)."""
        return self is not TaskKind.MULTILABEL


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """One possible answer of a task."""

    name: str
    description: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A named question: its kind and its labels, in the order of the model's outputs.

    Raises:
      InputError: an empty or repeated label name, or a number of labels that the kind cannot have.
    """

    name: str
    kind: TaskKind
    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("A task needs a name; this one's is empty.")
        seen: set[str] = set()
        for label in self.labels:
            if not label.name:
                raise InputError(f"Task '{self.name}' has a label with an empty name.")
            if label.name in seen:
                raise InputError(f"Task '{self.name}' names the label '{label.name}' twice; label names must differ.")
            seen.add(label.name)
        count = len(self.labels)
        if self.kind is TaskKind.BINARY and count != 2:
            raise InputError(f"Task '{self.name}' is binary and so needs 2 labels, not {count}.")
        if self.kind is TaskKind.MULTICLASS and count < 2:
            raise InputError(f"Task '{self.name}' is multiclass and so needs at least 2 labels, not {count}.")
        if self.kind is TaskKind.MULTILABEL and count < 1:
            raise InputError(f"Task '{self.name}' is multilabel and needs at least 1 label.")

    @functools.cached_property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    @functools.cached_property
    def index(self) -> Mapping[str, int]:
        """Label name → position within the task."""
        return {name: i for i, name in enumerate(self.label_names)}

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
        try:
            labels = tuple(Label(name=label["name"], description=label.get("description")) for label in entries)
            return cls(name=data["name"], kind=kind, labels=labels)
        except KeyError as e:
            raise InputError(f"{source}: the task has no field {e}.") from None


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """All tasks of a model; their labels, one after the other, are the rows of the model's label table."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
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

    def to_json(self) -> dict[str, Any]:
        return {"tasks": [task.to_json() for task in self.tasks]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: str) -> Taxonomy:
        """Reads what `to_json` wrote; `source` names the file in errors (InputError)."""
        if not isinstance(data, Mapping) or not isinstance(data.get("tasks"), list):
            raise InputError(f"{source}: the taxonomy has no list 'tasks'.")
        return cls(tasks=tuple(Task.from_json(task, source=source) for task in data["tasks"]))
