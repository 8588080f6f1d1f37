"""What the server says of its tasks and models, on the wire."""

from __future__ import annotations

from ...data import taxonomy
from ..core.models import Model, Models, State
from ..proto import classifier_pb2 as pb

_STATES = {State.LOADING: pb.LOADING, State.READY: pb.READY, State.RETIRING: pb.RETIRING}


def task_message(task: taxonomy.Task, model: Model, *, labels: bool) -> pb.Task:
    """A task, with its labels if asked for."""
    message = pb.Task(
        name=task.name,
        kind=task.kind.value,
        num_labels=len(task.labels),
        model=model.name,
        model_version=model.version,
    )
    if labels:
        tree = task.kind is taxonomy.TaskKind.HIERARCHICAL
        message.labels.extend(
            pb.Label(name=one.name, description=one.description or "", path=task.path(i) if tree else ())
            for i, one in enumerate(task.labels)
        )
    return message


def model_message(model: Model, models: Models, *, labels: bool) -> pb.Model:
    """A model, with its tasks' labels if asked for."""
    programs = [
        pb.Program(
            bucket=warmed.length,
            batch_size=warmed.batch_size,
            precision=warmed.precision,
            focus=focus,
            run_micros=round(warmed.run_seconds * 1e6),
        )
        for focus, engine in model.engines.items()
        for warmed in engine.programs
    ]
    return pb.Model(
        name=model.name,
        version=model.version,
        is_default=models.is_default(model),
        state=_STATES[model.state],
        precision=model.bundle.precision,
        max_length=model.bundle.max_length,
        focuses=list(model.engines),
        tasks=[task_message(task, model, labels=labels) for task in model.bundle.taxonomy.tasks],
        programs=programs,
        in_flight=model.in_flight,
        loaded_at=model.loaded_at,
    )
