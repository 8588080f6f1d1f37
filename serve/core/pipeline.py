"""From requests to responses: resolve → check → tokenise → schedule → decode. On one event loop, without gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from ...data.taxonomy import Task
from ..proto import classifier_pb2 as pb
from ..wire.errors import DeadlineExceeded, InvalidRequest, ServeError
from ..wire.limits import MAX_REQUEST_ID
from .deadlines import LatencyEstimate, divide
from .engine import Engine
from .models import Model, Models
from .scheduler import Scheduler
from .tokenizing import TokenizedText, check_length
from .work import Priority, Scored, Work

ResponseOrError = pb.ClassifyResponse | ServeError


@dataclasses.dataclass(frozen=True)
class ResolvedRequest:
    """A request's options after validation and model lookup.

    Attributes:
      model: the model that answers.
      task: the task of the model.
      engine: the model's programs at the requested focus.
      focus: that focus, as responses name it.
      top_k: how many labels to return; 0 for the default.
      threshold: the score from which a label is chosen; None for the model's own.
      evidence: whether to return the tokens that the model kept.
      priority: of the device's queue.
      deadline: when the device must be done, on the scheduler's clock; None for never.
      give_up: when the call is answered without the text; infinite if there is no deadline.
      request_id: the caller's name for the request, returned with the response.
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

    @property
    def decoding(self) -> Hashable:
        """Equal for requests whose texts are decoded together."""
        return self.model, self.task.name, self.focus, self.top_k, self.threshold, self.evidence


@dataclasses.dataclass(eq=False, slots=True)
class _Item:
    """One text on its way through the pipeline, which ends with its `outcome`."""

    text: str
    request: ResolvedRequest
    tokens: TokenizedText | None = None
    scored: Scored | None = None
    outcome: ResponseOrError | None = None


class Pipeline:
    """Classifies texts, each with the model that its request names.

    Args:
      models: the models that are served.
      scheduler: runs texts on the device.
    """

    def __init__(self, models: Models, scheduler: Scheduler) -> None:
        self._models = models
        self._scheduler = scheduler
        self._way_back = LatencyEstimate()  # seconds from the device's result until the response can be sent

    def resolve(
        self, options: pb.ClassifyOptions, seconds: float | None, priority: Priority = Priority.INTERACTIVE
    ) -> ResolvedRequest:
        """Checks the options of a request and finds its model.

        Args:
          options: the request's options.
          seconds: until the caller's deadline; None if there is none.
          priority: used if the options name none.

        Raises:
          InvalidRequest: an option is out of range, or the model cannot be told.
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
        if threshold is not None and not 0 <= threshold <= 1:  # also when NaN
            raise InvalidRequest("The field `threshold` must lie between 0 and 1.", field="threshold")
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
        deadline, give_up = divide(self._scheduler.clock(), seconds, self._way_back)
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
        """The outcome of each text, in order. Cancelling the call takes its texts out of the device's queue.

        Args:
          texts: N texts.
          requests: the request of each text.
        """
        items = [_Item(text, request) for text, request in zip(texts, requests, strict=True)]
        with contextlib.ExitStack() as stack:
            for model in {id(request.model): request.model for request in requests}.values():
                stack.enter_context(model.using())
            for item in items:
                try:
                    check_length(item.text)
                except InvalidRequest as error:
                    item.outcome = error.with_traceback(None)
            # What cannot be answered in time is refused before anything is spent on it.
            with self._reserved([item for item in items if item.outcome is None]) as accepted:
                groups = _grouped(accepted, lambda item: (item.request.model, item.request.evidence))
                await asyncio.gather(*map(self._tokenize, groups))
                submitted = self._scheduler.clock()
                pending = list(self._submit(items))
            latest = max((item.request.give_up for item, _ in pending), default=math.inf)
            # A batch that takes longer than predicted must not hold up the call's other answers.
            await finished(
                [future for _, future in pending], latest - self._scheduler.clock() if latest < math.inf else None
            )
            _collect(pending)
            # Only where all texts were run: else the time includes the wait for those that were not.
            if pending and all(item.scored is not None for item, _ in pending):
                on_device = max(
                    item.scored.queue_seconds + item.scored.compute_seconds for item, _ in pending if item.scored
                )
                self._way_back.add(max(self._scheduler.clock() - submitted - on_device, 0.0))
            for group in _grouped((item for item in items if item.scored is not None), lambda it: it.request.decoding):
                _decode(group)
        outcomes = [item.outcome for item in items if item.outcome is not None]
        if len(outcomes) < len(items):
            raise RuntimeError("A text left the pipeline without an outcome.")
        return outcomes

    @contextlib.contextmanager
    def _reserved(self, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        """Reserves device time; yields the texts that have it, and gives the others their error."""
        reserved: list[tuple[int, Priority]] = []
        accepted: list[_Item] = []
        try:
            for group in _grouped(items, lambda item: id(item.request)):
                request = group[0].request
                count, error = self._scheduler.reserve(len(group), request.deadline, request.priority)
                reserved.append((count, request.priority))
                accepted += group[:count]
                for item in group[count:]:
                    item.outcome = error
            yield accepted
        finally:
            for count, priority in reserved:
                self._scheduler.release(count, priority)

    async def _tokenize(self, group: Sequence[_Item]) -> None:
        """Gives texts of one model their tokens, or their error."""
        request = group[0].request
        try:
            results = await request.model.tokenizer.tokenize([item.text for item in group], spans=request.evidence)
        except ServeError as error:
            results = [error.with_traceback(None)] * len(group)  # whose frames hold the items
        for item, result in zip(group, results, strict=True):
            if isinstance(result, TokenizedText):
                item.tokens = result
            else:
                item.outcome = result

    def _submit(self, items: Sequence[_Item]) -> Iterator[tuple[_Item, Future[Scored]]]:
        """Queues the texts that have tokens, all together."""
        ready = [(item, item.tokens) for item in items if item.tokens is not None]
        futures = self._scheduler.submit_all(
            Work(item.request.engine, tokens.ids, item.request.deadline, item.request.priority)
            for item, tokens in ready
        )
        return zip((item for item, _ in ready), futures, strict=True)


def _collect(pending: Sequence[tuple[_Item, Future[Scored]]]) -> None:
    """Gives each text its scores or its error. Re-raises unexpected exceptions."""
    for item, future in pending:
        if future.cancelled() or not future.done():
            item.outcome = DeadlineExceeded("The deadline was too near when the text had not yet been run to its end.")
            continue
        error = future.exception()
        if error is None:
            item.scored = future.result()
        elif isinstance(error, ServeError):
            item.outcome = error
        else:
            raise error


def _decode(group: Sequence[_Item]) -> None:
    """Gives texts of equal `ResolvedRequest.decoding` their responses."""
    request = group[0].request
    responses = request.model.answers.answer(
        request.task,
        [item.tokens for item in group if item.tokens is not None],
        [item.scored for item in group if item.scored is not None],
        request.top_k,
        threshold=request.threshold,
        evidence=request.evidence,
        focus=request.focus,
    )
    for item, response in zip(group, responses, strict=True):
        if isinstance(response, pb.ClassifyResponse):
            response.request_id = item.request.request_id
        item.outcome = response


async def finished(futures: Sequence[Future[Any]], seconds: float | None) -> None:
    """Waits for all futures, with one call into the event loop; when it ends, it cancels those that are not done.

    Args:
      futures: futures of other threads.
      seconds: how long to wait at most; None for as long as it takes.
    """
    if not futures:
        return
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    # The callbacks, which a future keeps, do not hold the futures (see `Scheduler._enqueue`).
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


def _grouped(items: Iterable[_Item], key: Callable[[_Item], Hashable]) -> list[list[_Item]]:
    """The items of equal keys together, in the order of the first of each."""
    groups: dict[Hashable, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
