"""The gRPC service: validate → tokenise → schedule → decode → respond. What it rests on knows no gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from ..data.readers import MAX_TEXT_CHARS
from .answers import Answers
from .errors import ClasserError, InternalError, InvalidRequest, Unavailable
from .limits import MAX_TEXTS
from .log import log_failure
from .proto import classifier_pb2 as pb
from .proto.classifier_pb2_grpc import ClassifierServicer
from .scheduler import Scheduler
from .status import code_of, to_status
from .tokenizing import TokenizerStage, Tokens


class ClassifierService(ClassifierServicer):
    """`classer.v1.Classifier` over one model, on one event loop.

    Attributes:
      ready: False until the engine is warm; every call is then UNAVAILABLE.
      idle: set while no call is in flight.
    """

    def __init__(self, tokenizer: TokenizerStage, scheduler: Scheduler, answers: Answers, *, focused: bool) -> None:
        """`focused` says whether the model leaves tokens out, so that there is evidence to show."""
        self._focused = focused
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._answers = answers
        self.ready = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._in_flight = 0

    async def Classify(self, request: pb.ClassifyRequest, context: grpc.aio.ServicerContext) -> pb.ClassifyResponse:
        async with self._call(context):
            (outcome,) = await self._classify([request.text], request, context.time_remaining())
            if isinstance(outcome, ClasserError):
                raise outcome
        return outcome

    async def ClassifyBatch(
        self, request: pb.ClassifyBatchRequest, context: grpc.aio.ServicerContext
    ) -> pb.ClassifyBatchResponse:
        async with self._call(context):
            count = len(request.texts)
            if not 1 <= count <= MAX_TEXTS:
                raise InvalidRequest(f"The field `texts` holds {count} texts; one call takes 1 to {MAX_TEXTS}.")
            outcomes = await self._classify(request.texts, request, context.time_remaining())
        return pb.ClassifyBatchResponse(items=[_item(outcome) for outcome in outcomes])

    @contextlib.asynccontextmanager
    async def _call(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Counts a call as in flight, and ends it with the status of whatever it raises; no text gets into that."""
        self._in_flight += 1
        self.idle.clear()
        try:
            yield
        except ClasserError as error:
            await context.abort(code_of(error), str(error))
        except Exception as error:
            log_failure("A request failed", error)
            failure = InternalError("The server failed on this request; its log says why.")
            await context.abort(code_of(failure), str(failure))
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self.idle.set()

    async def _classify(
        self,
        texts: Sequence[str],
        request: pb.ClassifyRequest | pb.ClassifyBatchRequest,
        seconds: float | None,
    ) -> list[pb.ClassifyResponse | ClasserError]:
        """One outcome a text; raises what is wrong with all of them. `seconds` is how long the caller will wait."""
        if not self.ready:
            raise Unavailable("The server is still compiling its programs; wait until its health says SERVING.")
        task = self._answers.task(request.task)
        if request.evidence and not self._focused:
            raise InvalidRequest(
                "The field `evidence` is set, but this server reads every token, so that none stands out; start it "
                "with a focus below 1."
            )
        deadline = None if seconds is None else self._scheduler.clock() + seconds
        outcomes: dict[int, pb.ClassifyResponse | ClasserError] = {}

        for i, text in enumerate(texts):
            if len(text) > MAX_TEXT_CHARS:
                outcomes[i] = InvalidRequest(
                    f"The text has {len(text)} characters; at most {MAX_TEXT_CHARS} are taken. Split or shorten it."
                )
        rest = [i for i in range(len(texts)) if i not in outcomes]

        tokens: dict[int, Tokens] = {}
        encoded_texts = await self._tokenizer.tokenize([texts[i] for i in rest], spans=request.evidence)
        for i, encoded in zip(rest, encoded_texts, strict=True):
            if isinstance(encoded, Tokens):
                tokens[i] = encoded
            else:
                outcomes[i] = encoded

        futures = self._scheduler.submit_all([one.ids for one in tokens.values()], deadline=deadline)
        # Cancelling this coroutine (the caller has gone, or its deadline has passed) cancels all of them.
        results = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        scored = {}
        for i, result in zip(tokens, results, strict=True):
            if isinstance(result, ClasserError):
                outcomes[i] = result
            elif isinstance(result, BaseException):
                raise result
            else:
                scored[i] = result

        read = [tokens[i] for i in scored]
        answers = self._answers.answer(task, read, list(scored.values()), request.top_k, request.evidence)
        outcomes.update(zip(scored, answers, strict=True))
        return [outcomes[i] for i in range(len(texts))]


def _item(outcome: pb.ClassifyResponse | ClasserError) -> pb.ClassifyBatchItem:
    if isinstance(outcome, ClasserError):
        return pb.ClassifyBatchItem(error=to_status(outcome))
    return pb.ClassifyBatchItem(response=outcome)
