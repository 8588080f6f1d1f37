"""The gRPC service `classer.v1.Classifier`: reads messages, calls the pipeline, writes messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import grpc
import grpc.aio

from ..core.models import Models
from ..core.pipeline import Pipeline, ResolvedRequest, ResponseOrError
from ..core.scheduler import Scheduler
from ..core.work import Priority
from ..proto import classifier_pb2 as pb
from ..proto.classifier_pb2_grpc import ClassifierServicer
from ..wire.errors import InvalidRequest, Overloaded, ServeError
from ..wire.limits import MAX_TEXTS
from ..wire.status import to_status
from .describe import model_message, task_message
from .lifecycle import Lifecycle

# How many messages of a stream are processed at a time: enough to keep the device busy.
STREAM_AHEAD = 2
T = TypeVar("T")
U = TypeVar("U")


class ClassifierService(ClassifierServicer):
    """`classer.v1.Classifier` over the models of a server, on one event loop.

    Attributes:
      calls: the calls that run; ready once the models are warm.
    """

    def __init__(self, models: Models, scheduler: Scheduler) -> None:
        self._models = models
        self._pipeline = Pipeline(models, scheduler)
        self.calls = Lifecycle(ready=False)

    async def Classify(self, request: pb.ClassifyRequest, context: grpc.aio.ServicerContext) -> pb.ClassifyResponse:
        with self.calls.call():
            resolved = self._pipeline.resolve(request.options, context.time_remaining())
            (outcome,) = await self._pipeline.classify([request.text], [resolved])
            if isinstance(outcome, ServeError):
                raise outcome
        return outcome

    async def ClassifyBatch(
        self, request: pb.ClassifyBatchRequest, context: grpc.aio.ServicerContext
    ) -> pb.ClassifyBatchResponse:
        with self.calls.call():
            outcomes = await self._batch(request, context.time_remaining(), Priority.INTERACTIVE)
        return _batch_response(outcomes)

    async def ClassifyStream(
        self, requests: AsyncIterator[pb.ClassifyBatchRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ClassifyBatchResponse]:
        with self.calls.call():
            answers = in_order(requests, lambda request: self._patient_batch(request, context), STREAM_AHEAD)
            async with contextlib.aclosing(answers):
                async for outcomes in answers:
                    yield _batch_response(outcomes)

    async def ListTasks(self, request: pb.ListTasksRequest, context: grpc.aio.ServicerContext) -> pb.ListTasksResponse:
        with self.calls.call():
            models = [self._models.find(request.model)] if request.model else self._models.defaults
        tasks = [(task, model) for model in models for task in model.bundle.taxonomy.tasks]
        return pb.ListTasksResponse(tasks=[task_message(task, model, labels=False) for task, model in tasks])

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        with self.calls.call():
            models = [model_message(model, self._models, labels=False) for model in self._models]
        return pb.ListModelsResponse(models=models)

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.Model:
        with self.calls.call():
            model = self._models.find(request.name, request.version)
        return model_message(model, self._models, labels=True)

    async def _batch(
        self, request: pb.ClassifyBatchRequest, seconds: float | None, priority: Priority
    ) -> list[ResponseOrError]:
        """One outcome a text or request. Raises errors that concern the whole batch."""
        kind = request.WhichOneof("batch")
        if kind is None:
            raise InvalidRequest("A batch needs `text_batch` or `request_batch`; it has neither.", field="batch")
        field, entries = (
            ("text_batch.texts", request.text_batch.texts)
            if kind == "text_batch"
            else ("request_batch.requests", request.request_batch.requests)
        )
        if not 1 <= len(entries) <= MAX_TEXTS:
            raise InvalidRequest(
                f"The field `{field}` has {len(entries)} entries; one call takes 1 to {MAX_TEXTS}.", field=field
            )
        if kind == "text_batch":
            resolved = self._pipeline.resolve(request.text_batch.options, seconds, priority)
            return await self._pipeline.classify(request.text_batch.texts, [resolved] * len(entries))
        requests = request.request_batch.requests
        outcomes: dict[int, ResponseOrError] = {}
        ready: dict[int, ResolvedRequest] = {}
        for i, one in enumerate(requests):
            try:
                ready[i] = self._pipeline.resolve(one.options, seconds, priority)
            except ServeError as error:
                outcomes[i] = error
        texts = [requests[i].text for i in ready]
        outcomes.update(zip(ready, await self._pipeline.classify(texts, list(ready.values())), strict=True))
        return [outcomes[i] for i in range(len(requests))]

    async def _patient_batch(
        self, request: pb.ClassifyBatchRequest, context: grpc.aio.ServicerContext
    ) -> list[ResponseOrError]:
        """A batch of a stream. Texts that are refused as Overloaded are retried until the call ends."""
        outcomes = await self._batch(request, context.time_remaining(), Priority.BULK)
        while refused := {i: one for i, one in enumerate(outcomes) if isinstance(one, Overloaded)}:
            await asyncio.sleep(max(one.retry_seconds or 0.0 for one in refused.values()) or 0.1)
            again = pb.ClassifyBatchRequest()
            again.CopyFrom(request)
            entries = again.text_batch.texts if request.HasField("text_batch") else again.request_batch.requests
            for i in range(len(outcomes) - 1, -1, -1):
                if i not in refused:
                    del entries[i]
            retried = await self._batch(again, context.time_remaining(), Priority.BULK)
            for i, outcome in zip(refused, retried, strict=True):
                outcomes[i] = outcome
        return outcomes


async def in_order(
    requests: AsyncIterable[T], work: Callable[[T], Awaitable[U]], ahead: int
) -> AsyncGenerator[U, None]:
    """The results of `work` on each request, in the order of the requests, each as soon as it can be given.

    Up to `ahead` requests are processed at a time, and no more are read meanwhile. An exception of `work` or `requests`
    is raised after the results before it.
    """
    room = asyncio.Semaphore(ahead)
    begun: asyncio.Queue[asyncio.Future[U] | None] = asyncio.Queue()

    async def read() -> None:
        try:
            await room.acquire()
            async for request in requests:
                begun.put_nowait(asyncio.ensure_future(work(request)))
                await room.acquire()
        finally:
            begun.put_nowait(None)

    reading = asyncio.create_task(read())
    try:
        while (working := await begun.get()) is not None:
            answer = await working
            room.release()
            yield answer
        await reading
    finally:
        left: list[asyncio.Future] = [reading]
        while not begun.empty():
            if (working := begun.get_nowait()) is not None:
                left.append(working)
        for one in left:
            one.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _batch_response(outcomes: Sequence[ResponseOrError]) -> pb.ClassifyBatchResponse:
    # Texts that are refused together share one error object, which is converted once.
    distinct = {id(one): one for one in outcomes if isinstance(one, ServeError)}
    errors = {key: to_status(one) for key, one in distinct.items()}
    return pb.ClassifyBatchResponse(
        items=[
            pb.ClassifyBatchItem(error=errors[id(one)])
            if isinstance(one, ServeError)
            else pb.ClassifyBatchItem(response=one)
            for one in outcomes
        ]
    )
