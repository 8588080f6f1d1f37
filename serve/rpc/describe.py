"""Wire messages that describe a server's tasks and models."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ...data import taxonomy
from ..core.models import Model, Models
from ..proto import classifier_pb2 as pb
from ..wire.enums import value_of


def task_message(task: taxonomy.Task, model: Model, *, labels: bool) -> pb.Task:
    """The message of a task, with its labels if `labels`."""
    message = pb.Task(
        name=task.name,
        kind=value_of(pb.TaskKind, task.kind.value),
        num_labels=len(task.labels),
        model=model.name,
        model_version=model.version,
    )
    if labels:
        tree = task.kind is taxonomy.TaskKind.HIERARCHICAL
        message.labels.extend(
            pb.TaskLabel(label=one.name, description=one.description or "", path=task.path(i) if tree else ())
            for i, one in enumerate(task.labels)
        )
    return message


def model_message(model: Model, models: Models, *, labels: bool) -> pb.Model:
    """The message of a model, with its tasks' labels if `labels`."""
    programs = [
        pb.Program(
            bucket=warmed.length,
            batch_size=warmed.batch_size,
            precision=value_of(pb.Precision, warmed.precision),
            focus=focus,
            run_duration=timedelta(seconds=warmed.run_seconds),
        )
        for focus, engine in model.engines.items()
        for warmed in engine.programs
    ]
    return pb.Model(
        name=model.name,
        version=model.version,
        is_default=models.is_default(model),
        state=value_of(pb.ModelState, model.state.name.lower()),
        precision=value_of(pb.Precision, model.bundle.precision),
        max_length=model.bundle.max_length,
        focuses=list(model.engines),
        tasks=[task_message(task, model, labels=labels) for task in model.bundle.taxonomy.tasks],
        programs=programs,
        in_flight=model.in_flight,
        load_time=datetime.fromtimestamp(model.loaded_at, UTC),
    )
