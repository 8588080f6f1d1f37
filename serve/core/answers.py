"""From logits to responses: decoding against the taxonomy, by the same code as in evaluation. No gRPC.

Axes: `N` texts, `L` labels of one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import numpy as np

from ...data.taxonomy import Task, TaskKind, Taxonomy
from ...model.decode import Calibration, choose_all, probabilities
from ...model.evidence import evidence_spans
from ..proto import classifier_pb2 as pb
from ..wire.enums import value_of
from ..wire.errors import InternalError, InvalidRequest, UnknownTask
from ..wire.limits import DEFAULT_TOP_K
from .tokenizing import TokenizedText
from .work import Scored


class Decoded(NamedTuple):
    """What N texts' logits amount to, for one task.

    Attributes:
      probs_NL: float32, calibrated probabilities.
      chosen_NL: bool, the labels that hold.
      finite_N: bool, whether a text's logits are all finite; if not, its other rows mean nothing.
    """

    probs_NL: np.ndarray
    chosen_NL: np.ndarray
    finite_N: np.ndarray


class AnswerDecoder:
    """Decodes the device's outputs into responses, for one model.

    Args:
      taxonomy: the model's tasks and labels.
      calibration: the calibration of each task, by its name.
      name: the model's name in responses.
      version: the model's version in responses.
    """

    def __init__(self, taxonomy: Taxonomy, calibration: Mapping[str, Calibration], name: str, version: str) -> None:
        self._tasks = {task.name: task for task in taxonomy.tasks}
        self._slices = {task.name: taxonomy.slice_of(task.name) for task in taxonomy.tasks}
        self._calibration = {name: calibration[name] for name in self._tasks}
        self._name, self._version = name, version

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks, by name."""
        return self._tasks

    def task(self, name: str) -> Task:
        """The task of a name; the only task if the name is empty.

        Raises:
          UnknownTask: there is no task of that name.
          InvalidRequest: the name is empty and there are several.
        """
        known = ", ".join(self._tasks)
        if name in self._tasks:
            return self._tasks[name]
        if name:
            raise UnknownTask(f"This model has no task of the name given; it has: {known}.", field="task")
        if len(self._tasks) > 1:
            raise InvalidRequest(
                f"The field `task` is empty, but this model has several; name one of: {known}.", field="task"
            )
        return next(iter(self._tasks.values()))

    def decode(self, task: Task, scored: Sequence[Scored], threshold: float | None = None) -> Decoded:
        """Probabilities and chosen labels of at least one text; see `answer` for the arguments."""
        calibration = self._calibration[task.name]
        logits_NL = np.stack([one.output.logits_L for one in scored])[:, self._slices[task.name]]
        finite_N = np.asarray(np.isfinite(logits_NL).all(axis=1))
        probs_NL = probabilities(task, np.where(finite_N[:, None], logits_NL, 0.0), calibration)
        chosen_NL = choose_all(task, probs_NL, calibration, threshold)
        if threshold is not None and task.kind is not TaskKind.HIERARCHICAL:
            reach_NL = probs_NL >= np.float32(threshold)
            chosen_NL = chosen_NL & reach_NL if task.kind.exclusive else reach_NL
        return Decoded(probs_NL, chosen_NL, finite_N)

    def answer(
        self,
        task: Task,
        tokens: Sequence[TokenizedText],
        scored: Sequence[Scored],
        top_k: int,
        *,
        threshold: float | None = None,
        evidence: bool = False,
        focus: str = "",
    ) -> list[pb.ClassifyResponse | InternalError]:
        """Responses to N texts.

        Args:
          task: the task that was asked for.
          tokens: each text as the model read it.
          scored: the device's result of each text.
          top_k: how many labels to give, best first (0: `DEFAULT_TOP_K`); the chosen ones are given in any case. Of a
            tree these are leaves, and the label at which the answer stops.
          threshold: the score from which a label is chosen, instead of the model's own; of labels that exclude one
            another the best one is then chosen only if it reaches that; in a tree, the first from the best leaf upwards
            that does.
          evidence: whether to return the tokens that the model kept; `tokens` must then have spans.
          focus: what the texts were read with, as responses give it.

        Returns:
          One for each text; an InternalError for one whose logits are not finite.
        """
        if not scored:
            return []
        probs_NL, chosen_NL, finite_N = self.decode(task, scored, threshold)
        tree = task.kind is TaskKind.HIERARCHICAL
        rank_by_NL = probs_NL
        if tree:  # labels above a leaf only sum them up; the one at which an answer stops is as probable as any leaf
            rank_by_NL = np.where(chosen_NL, 2.0, np.where(task.leaves_L, probs_NL, -1.0))
        ranked_NL = np.argsort(-rank_by_NL, axis=1, kind="stable")
        shown = top_k or DEFAULT_TOP_K
        responses: list[pb.ClassifyResponse | InternalError] = []
        for i, (read, one) in enumerate(zip(tokens, scored, strict=True)):
            if not finite_N[i]:
                responses.append(not_finite())
                continue
            ranks = [
                label
                for rank, label in enumerate(ranked_NL[i].tolist())
                if chosen_NL[i, label] or (rank < shown and rank_by_NL[i, label] >= 0)
            ]
            labels = [
                pb.ScoredLabel(
                    label=task.label_names[label],
                    score=float(probs_NL[i, label]),
                    chosen=bool(chosen_NL[i, label]),
                    path=task.path(label) if tree else (),
                )
                for label in ranks
            ]
            response = pb.ClassifyResponse(
                task=task.name,
                model=self._name,
                model_version=self._version,
                labels=labels,
                truncated=read.truncated,
                tokens=len(read.ids),
                focus=focus,
                precision=value_of(pb.Precision, one.output.precision),
                queue_duration=timedelta(seconds=one.queue_seconds),
                compute_duration=timedelta(seconds=one.compute_seconds),
            )
            if evidence and one.output.kept is not None and read.spans is not None:
                for start, end, score in evidence_spans(one.output.kept, read.spans):
                    response.evidence.add(start=start, end=end, score=score)
            responses.append(response)
        return responses


def not_finite() -> InternalError:
    """The error of a text whose logits are not finite."""
    return InternalError("The model's scores for this text are not finite numbers.")


def check_threshold(threshold: float | None) -> None:
    """Raises InvalidRequest: the threshold is not None and lies outside 0 … 1."""
    if threshold is not None and not 0 <= threshold <= 1:  # also when NaN
        raise InvalidRequest("The field `threshold` must lie between 0 and 1.", field="threshold")
