"""The pipeline's tokenizer stage: texts to token ids, in batches, in a thread beside the event loop.

Like the scheduler it has no timer: while the worker thread tokenises one batch, the next one gathers. No gRPC.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from ...data.limits import MAX_TEXT_CHARS
from ..ops.log import log_failure
from ..wire.errors import InternalError, InvalidRequest, Overloaded, ServeError

# Characters that may be queued, and characters of a batch. Each text counts one more than it has, so that many empty
# texts are bounded too.
MAX_WAITING_CHARS = 64_000_000
MAX_BATCH_CHARS = 1_000_000
# The retry hint of a refusal: about the time that a full queue takes.
ENCODING_RETRY_SECONDS = 0.5


class EncodingProtocol(Protocol):
    """The part of `data.tokenizer.WordPieceTokenizer.encode`'s result that this stage uses, for N texts."""

    @property
    def ids(self) -> Sequence[np.ndarray]:
        """N arrays, int32 (S_i,)."""
        ...

    @property
    def truncated(self) -> np.ndarray:
        """bool (N,): whether a text had more tokens than were kept."""
        ...

    @property
    def spans(self) -> Sequence[np.ndarray] | None:
        """N arrays, int32 (S_i, 2), the characters that each token covers; None unless asked for."""
        ...


class TokenizerProtocol(Protocol):
    """The part of `data.tokenizer.WordPieceTokenizer` that this stage uses."""

    def encode(self, texts: Sequence[str], max_length: int) -> EncodingProtocol: ...

    def encode_with_offsets(self, texts: Sequence[str], max_length: int) -> EncodingProtocol: ...


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """The token ids of one text.

    Attributes:
      ids: int32 (S,).
      truncated: whether the text has more tokens than the model reads.
      spans: int32 (S, 2), the characters that each token covers; None unless asked for.
    """

    ids: np.ndarray
    truncated: bool
    spans: np.ndarray | None = None


def length_error(text: str) -> InvalidRequest | None:
    """The refusal of a text of more than `MAX_TEXT_CHARS` characters; None for a shorter one."""
    if len(text) <= MAX_TEXT_CHARS:
        return None
    return InvalidRequest(
        f"The text has {len(text)} characters; at most {MAX_TEXT_CHARS} are taken. Split or shorten it.", field="text"
    )


@dataclasses.dataclass(eq=False)
class _Group:
    """The texts of one call, and the future of their tokens."""

    texts: Sequence[str]
    chars: int
    spans: bool
    future: asyncio.Future[list[TokenizedText | ServeError]]


class TokenizerStage:
    """Tokenises texts in one worker thread. Used from one event loop; `close` ends the thread."""

    def __init__(
        self, tokenizer: TokenizerProtocol, max_length: int, *, max_waiting_chars: int = MAX_WAITING_CHARS
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._max_waiting_chars = max_waiting_chars
        self._waiting: collections.deque[_Group] = collections.deque()
        self._waiting_chars = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="classer-tokenizer")
        self._worker: asyncio.Task[None] | None = None

    async def tokenize(self, texts: Sequence[str], *, spans: bool = False) -> list[TokenizedText | ServeError]:
        """The tokens of each text, with spans if `spans`; an InternalError for a text that the tokenizer fails on.

        Raises:
          Overloaded: too many characters are queued already.
        """
        chars = sum(len(text) + 1 for text in texts)
        if self._waiting_chars + chars > self._max_waiting_chars:
            raise Overloaded(
                f"The server has {self._waiting_chars} characters waiting for the tokenizer and takes on "
                f"{self._max_waiting_chars} at most; try again in a moment.",
                retry_seconds=ENCODING_RETRY_SECONDS,
            )
        group = _Group(texts, chars, spans, asyncio.get_running_loop().create_future())
        self._waiting.append(group)
        self._waiting_chars += chars
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await group.future

    def close(self) -> None:
        """Ends the worker thread. No call may be in flight."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Runs until the queue is empty; the next call starts it again."""
        loop = asyncio.get_running_loop()
        try:
            while groups := self._take():
                texts = [text for group in groups for text in group.texts]
                spans = any(group.spans for group in groups)
                encode = functools.partial(encode_texts, self._tokenizer, texts, self._max_length, spans=spans)
                outcomes = iter(await loop.run_in_executor(self._thread, encode))
                for group in groups:
                    own = list(itertools.islice(outcomes, len(group.texts)))
                    if not group.future.done():  # else the call was cancelled
                        group.future.set_result(own)
        finally:
            self._worker = None

    def _take(self) -> list[_Group]:
        groups: list[_Group] = []
        chars = 0
        while self._waiting and (not groups or chars + self._waiting[0].chars <= MAX_BATCH_CHARS):
            group = self._waiting.popleft()
            self._waiting_chars -= group.chars
            if not group.future.done():
                groups.append(group)
                chars += group.chars
        return groups


def encode_texts(
    tokenizer: TokenizerProtocol, texts: Sequence[str], max_length: int, *, spans: bool = False
) -> list[TokenizedText | ServeError]:
    """The tokens of each text, with spans if `spans`; an InternalError for a text that the tokenizer fails on.

    After a failure texts are tried one by one, so that none fails another.
    """
    try:
        encode = tokenizer.encode_with_offsets if spans else tokenizer.encode
        encoded = encode(texts, max_length)
        spans_N = encoded.spans or [None] * len(texts)
        rows = zip(encoded.ids, encoded.truncated, spans_N, strict=True)
        return [TokenizedText(ids, bool(cut), spans_S2) for ids, cut, spans_S2 in rows]
    except Exception as error:
        if len(texts) > 1:
            return [outcome for text in texts for outcome in encode_texts(tokenizer, [text], max_length, spans=spans)]
        log_failure("The tokenizer failed on a text", error)
        return [InternalError("The server could not tokenize this text; its log says why.")]
