"""From requests to responses: resolve → check → tokenise → schedule → decode. On one event loop, without gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ...data.taxonomy import Task
from ..proto import classifier_pb2 as pb
from ..wire.errors import DeadlineExceeded, InvalidRequest, ServeError
from ..wire.limits import MAX_REQUEST_ID
from .answers import check_threshold
from .engine import Engine
from .models import Model, Models
from .scheduler import Scheduler
from .tokenizing import Tokens, check_length
from .work import Priority, Scored, Work

# How an answer's way from the device to its caller is foreseen, as TCP does with round trips (RFC 6298 §2): by a smooth
# mean and four times a smooth deviation. Also the part of a deadline that it may take at most: whatever it says, a
# text that finds the device free is run, and mends it. And so many seconds, or so much of a shorter deadline, at least:
# what an answer takes from here to its caller is not seen.
MEAN_RATE, SPREAD_RATE, SPREADS = 1 / 8, 1 / 4, 4
MAX_WAY_BACK_SHARE = 0.5
MIN_WAY_BACK, MIN_WAY_BACK_SHARE = 0.04, 0.1

Outcome = pb.ClassifyResponse | ServeError


@dataclasses.dataclass(frozen=True)
class ResolvedRequest:
    """What the options of a request come to. Texts of equal ones are decoded together.

    Attributes:
      deadline: when the device must be done with it: the caller's, less what the way back takes at most.
      give_up: when the call is answered without it: half of that way before the caller's deadline; without one, never.
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


@dataclasses.dataclass
class LatencyEstimate:
    """Seconds that vary: how many they will be at most, nearly always."""

    mean: float = 0.0
    spread: float = 0.0

    @property
    def most(self) -> float:
        return self.mean + SPREADS * self.spread

    def add(self, seconds: float) -> None:
        self.spread += SPREAD_RATE * (abs(seconds - self.mean) - self.spread)
        self.mean += MEAN_RATE * (seconds - self.mean)


class Pipeline:
    """Classifies texts with whatever models there are.

    Args:
      models: who answers.
      scheduler: runs them.
    """

    def __init__(self, models: Models, scheduler: Scheduler) -> None:
        self._models = models
        self._scheduler = scheduler
        self._way_back = LatencyEstimate()  # seconds from the device's answer until it can be sent

    def ask(
        self, options: pb.ClassifyOptions, seconds: float | None, priority: Priority = Priority.INTERACTIVE
    ) -> ResolvedRequest:
        """Checks the options of a request.

        Args:
          options: those of the request.
          seconds: how long the caller will wait; None for ever.
          priority: what it is if the request does not say.

        Raises:
          InvalidRequest, UnknownTask: what is wrong with them.
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
        deadline, give_up = None, math.inf
        if seconds is not None:
            least, most = min(MIN_WAY_BACK, MIN_WAY_BACK_SHARE * seconds), MAX_WAY_BACK_SHARE * seconds
            way_back = min(max(self._way_back.most, least), most)
            deadline = self._scheduler.clock() + seconds - way_back
            give_up = deadline + way_back / 2
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

    async def classify(self, texts: Sequence[str], asked: Sequence[ResolvedRequest]) -> list[Outcome]:
        """One outcome for each text, in order. Cancelling it takes the texts out of the device's queue."""
        with contextlib.ExitStack() as stack:
            for model in {id(one.model): one.model for one in asked}.values():
                stack.enter_context(model.using())
            outcomes: dict[int, Outcome] = {}
            for i, text in enumerate(texts):
                try:
                    check_length(text)
                except InvalidRequest as error:
                    outcomes[i] = error
            # What cannot be answered in time is refused before anything is spent on it.
            expected: list[int] = []
            announced: list[tuple[int, Priority]] = []
            rest = [i for i in range(len(texts)) if i not in outcomes]
            for _, group in _grouped(rest, [id(asked[i]) for i in rest]):
                one = asked[group[0]]
                fit, error = self._scheduler.reserve(len(group), one.deadline, one.priority)
                announced.append((fit, one.priority))
                expected += group[:fit]
                if error is not None:
                    outcomes.update(dict.fromkeys(group[fit:], error))
            tokens: dict[int, Tokens] = {}
            try:
                groups = _grouped(expected, [(asked[i].model, asked[i].evidence) for i in expected])
                await asyncio.gather(
                    *(self._tokenize(model, spans, group, texts, tokens, outcomes) for (model, spans), group in groups)
                )
                order = sorted(tokens)
                submitted = self._scheduler.clock()
                futures = self._scheduler.submit_all(
                    Work(asked[i].engine, tokens[i].ids, asked[i].deadline, asked[i].priority) for i in order
                )
            finally:
                for count, priority in announced:
                    self._scheduler.release(count, priority)
            # One batch that takes longer than was predicted does not take a call's other answers with it.
            latest = max((asked[i].give_up for i in order), default=math.inf)
            await finished(futures, latest - self._scheduler.clock() if latest < math.inf else None)
            scored = _sorted_out(order, futures, outcomes)
            # Where some are not, the time since includes the wait for these.
            if scored and len(scored) == len(order):
                on_device = max(one.queue_seconds + one.compute_seconds for one in scored.values())
                self._way_back.add(max(self._scheduler.clock() - submitted - on_device, 0.0))
            self._decode(asked, tokens, scored, outcomes)
            return [outcomes[i] for i in range(len(texts))]

    async def _tokenize(
        self,
        model: Model,
        spans: bool,
        group: list[int],
        texts: Sequence[str],
        tokens: dict[int, Tokens],
        outcomes: dict[int, Outcome],
    ) -> None:
        try:
            encoded = await model.tokenizer.tokenize([texts[i] for i in group], spans=spans)
        except ServeError as error:
            outcomes.update(dict.fromkeys(group, error))
            return
        for i, one in zip(group, encoded, strict=True):
            if isinstance(one, Tokens):
                tokens[i] = one
            else:
                outcomes[i] = one

    def _decode(
        self,
        asked: Sequence[ResolvedRequest],
        tokens: dict[int, Tokens],
        scored: dict[int, Scored],
        outcomes: dict[int, Outcome],
    ) -> None:
        done = list(scored)
        keys = [
            (one.model, one.task.name, one.focus, one.top_k, one.threshold, one.evidence)
            for one in (asked[i] for i in done)
        ]
        for (model, _, focus, top_k, threshold, evidence), group in _grouped(done, keys):
            answers = model.answers.answer(
                asked[group[0]].task,
                [tokens[i] for i in group],
                [scored[i] for i in group],
                top_k,
                threshold=threshold,
                evidence=evidence,
                focus=focus,
            )
            for i, answer in zip(group, answers, strict=True):
                if isinstance(answer, pb.ClassifyResponse):
                    answer.request_id = asked[i].request_id
                outcomes[i] = answer


def _sorted_out(
    order: Sequence[int], futures: Sequence[Future[Scored]], outcomes: dict[int, Outcome]
) -> dict[int, Scored]:
    """What the device said of each text; what kept it from others goes to `outcomes`. Raises what is nobody's fault."""
    scored: dict[int, Scored] = {}
    for i, future in zip(order, futures, strict=True):
        if future.cancelled() or not future.done():
            outcomes[i] = DeadlineExceeded("The deadline was too near when the text had not yet been run to its end.")
            continue
        error = future.exception()
        if error is None:
            scored[i] = future.result()
        elif isinstance(error, ServeError):
            outcomes[i] = error
        else:
            raise error
    return scored


async def finished(futures: Sequence[Future[Any]], seconds: float | None) -> None:
    """Waits for all futures, or so long, with one call into the event loop; then, or cancelled, it cancels the rest."""
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


K = TypeVar("K")


def _grouped(indices: Sequence[int], keys: Sequence[K]) -> list[tuple[K, list[int]]]:
    """The indices of equal keys together, in the order of their first."""
    groups: dict[K, list[int]] = {}
    for i, key in zip(indices, keys, strict=True):
        groups.setdefault(key, []).append(i)
    return list(groups.items())
