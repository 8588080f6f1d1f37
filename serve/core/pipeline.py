"""The request pipeline: resolve → check → tokenise → schedule → decode. Runs on one event loop; no gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from ...data.taxonomy import Task
from ..proto import classifier_pb2 as pb
from ..wire.errors import DeadlineExceeded, InvalidRequest, ServeError
from ..wire.limits import MAX_REQUEST_ID
from .answers import check_threshold
from .deadlines import ResponsePath
from .engine import Engine
from .models import Model, Models
from .scheduler import Scheduler
from .tokenizing import TokenizedText, length_error
from .work import Priority, Scored, Work

ResponseOrError = pb.ClassifyResponse | ServeError


@dataclasses.dataclass(frozen=True)
class ResolvedRequest:
    """A request's options after validation and model lookup.

    Attributes:
      deadline: the device's deadline, None for none; see `deadlines.ResponsePath.limits`.
      give_up: the time at which the call is answered without the texts that are not done; infinity for never.
    """

    model: Model
    task: Task
    engine: Engine
    focus: str
    top_k: int
    threshold: float | None
    evidence: bool
    priority: Priority
    deadline: float | None
    give_up: float
    request_id: str


@dataclasses.dataclass(eq=False)
class _Record:
    """One text on its way through the pipeline; `outcome` ends it."""

    text: str
    request: ResolvedRequest
    tokens: TokenizedText | None = None
    scored: Scored | None = None
    outcome: ResponseOrError | None = None


class Pipeline:
    """Classifies texts with the loaded models.

    Args:
      models: the loaded models, by name and task.
      scheduler: queues texts and runs them on the device.
    """

    def __init__(self, models: Models, scheduler: Scheduler) -> None:
        self._models = models
        self._scheduler = scheduler
        self._responses = ResponsePath()

    def resolve(
        self, options: pb.ClassifyOptions, seconds: float | None, priority: Priority = Priority.INTERACTIVE
    ) -> ResolvedRequest:
        """Checks a request's options, and finds its model, task and engine.

        Args:
          options: the request's options.
          seconds: until the caller's deadline; None if there is none.
          priority: the priority if the options name none.

        Raises:
          InvalidRequest: an option is out of range, or several models could be meant.
          UnknownTask: there is no such task, model or version.
        """
        model, task = self._models.resolve(options.task, options.model, options.model_version)
        engine = model.engine(options.focus)
        if options.HasField("top_k") and not options.top_k:
            raise InvalidRequest("The field `top_k` must be at least 1.", field="top_k")
        if options.evidence and not engine.focused:
            raise InvalidRequest(
                "The field `evidence` is set, but this model reads every token, so that none stands out; ask for a "
                f"focus below 1 (there are: {', '.join(model.engines)}), or start it with a focus below 1.",
                field="evidence",
            )
        threshold = options.threshold if options.HasField("threshold") else None
        check_threshold(threshold)
        if options.priority not in pb.Priority.values():
            raise InvalidRequest(
                "The field `priority` must be PRIORITY_INTERACTIVE or PRIORITY_BULK.", field="priority"
            )
        if options.priority != pb.PRIORITY_UNSPECIFIED:
            priority = Priority.BULK if options.priority == pb.PRIORITY_BULK else Priority.INTERACTIVE
        name = options.request_id
        if len(name) > MAX_REQUEST_ID or not (name.isascii() and (name.isprintable() or not name)):
            raise InvalidRequest(
                f"The field `request_id` takes at most {MAX_REQUEST_ID} characters of printable ASCII.",
                field="request_id",
            )
        if options.HasField("timeout"):
            own = options.timeout.ToNanoseconds() / 1e9
            if own <= 0:
                raise InvalidRequest("The field `timeout` must be above 0.", field="timeout")
            seconds = own if seconds is None else min(own, seconds)
        deadline, give_up = self._responses.limits(seconds, self._scheduler.clock())
        return ResolvedRequest(
            model,
            task,
            engine,
            options.focus or next(iter(model.engines)),
            options.top_k,
            threshold,
            options.evidence,
            priority,
            deadline,
            give_up,
            options.request_id,
        )

    async def classify(self, texts: Sequence[str], requests: Sequence[ResolvedRequest]) -> list[ResponseOrError]:
        """Classifies N texts, each with the options of its own request.

        Cancelling the coroutine takes the texts that are not running out of the device's queue.

        Returns:
          N outcomes in order: a response, or the error of that text.

        Raises:
          Exception: a failure that is not one of the texts', from the device's futures.
        """
        records = [_Record(text, request) for text, request in zip(texts, requests, strict=True)]
        with contextlib.ExitStack() as stack:
            for model in {id(one.model): one.model for one in requests}.values():
                stack.enter_context(model.using())
            for record in records:
                record.outcome = length_error(record.text)
            reserved = self._reserve(_open(records))
            try:
                await self._tokenize(_open(records))
                submitted = self._scheduler.clock()
                running = _open(records)
                futures = self._scheduler.submit_all(map(_work, running))
            finally:
                for count, priority in reserved:
                    self._scheduler.release(count, priority)
            # A batch that takes longer than predicted must not hold up the call's other answers.
            latest = max((record.request.give_up for record in running), default=math.inf)
            await finished(futures, latest - self._scheduler.clock() if latest < math.inf else None)
            _take_results(running, futures)
            scored = [record.scored for record in running if record.scored is not None]
            # Where some texts are not done, the time since includes the wait for them.
            if scored and len(scored) == len(running):
                on_device = max(one.queue_seconds + one.compute_seconds for one in scored)
                self._responses.add(self._scheduler.clock() - submitted, on_device)
            _decode(_open(records))
        return [record.outcome for record in records if record.outcome is not None]

    def _reserve(self, records: Sequence[_Record]) -> list[tuple[int, Priority]]:
        """Reserves device time, and refuses what cannot be answered in time before anything is spent on it.

        Returns:
          The numbers of texts reserved and their priorities, to be released.
        """
        reserved = []
        for group in _grouped(records, lambda record: id(record.request)):
            request = group[0].request
            fit, error = self._scheduler.reserve(len(group), request.deadline, request.priority)
            reserved.append((fit, request.priority))
            for record in group[fit:]:
                record.outcome = error
        return reserved

    async def _tokenize(self, records: Sequence[_Record]) -> None:
        async def tokenize(group: Sequence[_Record]) -> None:
            request = group[0].request
            try:
                texts = [record.text for record in group]
                encoded = await request.model.tokenizer.tokenize(texts, spans=request.evidence)
            except ServeError as error:
                # Its traceback holds this frame, and so the records: a reference cycle, for Python's collector.
                encoded = [error.with_traceback(None)] * len(group)
            for record, one in zip(group, encoded, strict=True):
                if isinstance(one, TokenizedText):
                    record.tokens = one
                else:
                    record.outcome = one

        groups = _grouped(records, lambda record: (record.request.model, record.request.evidence))
        await asyncio.gather(*map(tokenize, groups))


def _open(records: Sequence[_Record]) -> list[_Record]:
    """The records without an outcome."""
    return [record for record in records if record.outcome is None]


def _work(record: _Record) -> Work:
    request, tokens = record.request, record.tokens
    assert tokens is not None
    return Work(request.engine, tokens.ids, request.deadline, request.priority)


def _take_results(records: Sequence[_Record], futures: Sequence[Future[Scored]]) -> None:
    """Moves the futures' results and refusals into the records. Raises any other exception of a future."""
    for record, future in zip(records, futures, strict=True):
        if future.cancelled() or not future.done():
            record.outcome = DeadlineExceeded(
                "The deadline was too near when the text had not yet been run to its end."
            )
            continue
        error = future.exception()
        if error is None:
            record.scored = future.result()
        elif isinstance(error, ServeError):
            record.outcome = error
        else:
            raise error


def _decode(records: Sequence[_Record]) -> None:
    """Decodes scored texts into responses; texts of equal options together."""

    def options(record: _Record) -> tuple[Any, ...]:
        one = record.request
        return one.model, one.task.name, one.focus, one.top_k, one.threshold, one.evidence

    for group in _grouped(records, options):
        request = group[0].request
        answers = request.model.answers.answer(
            request.task,
            [record.tokens for record in group if record.tokens is not None],
            [record.scored for record in group if record.scored is not None],
            request.top_k,
            threshold=request.threshold,
            evidence=request.evidence,
            focus=request.focus,
        )
        for record, answer in zip(group, answers, strict=True):
            if isinstance(answer, pb.ClassifyResponse):
                answer.request_id = record.request.request_id
            record.outcome = answer


async def finished(futures: Sequence[Future[Any]], seconds: float | None) -> None:
    """Waits for futures of other threads, at most `seconds`, with one call into the event loop.

    When it returns, raises or is cancelled, it cancels the futures that are not done.
    """
    if not futures:
        return
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    # Futures keep their callbacks. A callback that refers to them would make a cycle (see `Scheduler._enqueue`).
    count, last = itertools.count(1), len(futures)  # the count's `next` is atomic

    def one_more(_: Future[Any]) -> None:
        if next(count) == last:
            with contextlib.suppress(RuntimeError):  # the event loop may have gone
                loop.call_soon_threadsafe(lambda: None if done.done() else done.set_result(None))

    for future in futures:
        future.add_done_callback(one_more)
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done, seconds)
    finally:
        for future in futures:
            future.cancel()  # one that is done or running stays so


def _grouped(records: Sequence[_Record], key: Callable[[_Record], Hashable]) -> list[list[_Record]]:
    """The records of equal keys together, in the order of their first."""
    groups: dict[Hashable, list[_Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())
