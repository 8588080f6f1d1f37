"""The stage before the device: texts to token ids, off the event loop, all that wait together.

Like the scheduler it has no timer: while the worker thread tokenises one batch the next one gathers. No gRPC.
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

from ...data.readers import MAX_TEXT_CHARS
from ..ops.log import log_failure
from ..wire.errors import InternalError, InvalidRequest, Overloaded, ServeError

# What may wait, and what is tokenised at once, in characters. A text also counts as one for itself, so that very
# many empty ones are not free.
MAX_WAITING_CHARS = 64_000_000
MAX_BATCH_CHARS = 1_000_000
# A refusal's hint: about what so many take, after which there is room again.
RETRY_SECONDS = 0.5


class Encoded(Protocol):
    """What `WordPieceTokenizer.encode` returns for N texts."""

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


class Tokenizer(Protocol):
    """What this stage needs of `data.tokenizer.WordPieceTokenizer`."""

    def encode(self, texts: Sequence[str], max_length: int) -> Encoded: ...

    def encode_with_offsets(self, texts: Sequence[str], max_length: int) -> Encoded: ...


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One text for the device.

    Attributes:
      ids: int32 (S,).
      truncated: whether the text had more than the model reads.
      spans: int32 (S, 2), the characters that each token covers; None unless asked for.
    """

    ids: np.ndarray
    truncated: bool
    spans: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class _Group:
    """The texts of one request, and where its caller waits for them."""

    texts: Sequence[str]
    chars: int
    spans: bool
    future: asyncio.Future[list[Tokens | ServeError]]


class TokenizerStage:
    """Tokenises texts in one worker thread. Use it from one event loop, and `close` it at the end."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, max_waiting_chars: int = MAX_WAITING_CHARS) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._max_waiting_chars = max_waiting_chars
        self._waiting: collections.deque[_Group] = collections.deque()
        self._waiting_chars = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="classer-tokenizer")
        self._worker: asyncio.Task[None] | None = None

    async def tokenize(self, texts: Sequence[str], *, spans: bool = False) -> list[Tokens | ServeError]:
        """The tokens of each text, with their `spans` if asked; or the InternalError of one that it failed on.

        Raises:
          Overloaded: too much waits already.
        """
        chars = sum(len(text) + 1 for text in texts)
        if self._waiting_chars + chars > self._max_waiting_chars:
            raise Overloaded(
                f"The server has {self._waiting_chars} characters waiting for the tokenizer and takes on "
                f"{self._max_waiting_chars} at most; try again in a moment.",
                retry_seconds=RETRY_SECONDS,
            )
        group = _Group(texts, chars, spans, asyncio.get_running_loop().create_future())
        self._waiting.append(group)
        self._waiting_chars += chars
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await group.future

    def close(self) -> None:
        """Ends the worker thread, once no request is in flight any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        """Empties the queue, then ends; the next text starts it anew."""
        loop = asyncio.get_running_loop()
        try:
            while groups := self._take():
                texts = [text for group in groups for text in group.texts]
                spans = any(group.spans for group in groups)
                encode = functools.partial(encode_texts, self._tokenizer, texts, self._max_length, spans=spans)
                outcomes = iter(await loop.run_in_executor(self._thread, encode))
                for group in groups:
                    own = list(itertools.islice(outcomes, len(group.texts)))
                    if not group.future.done():  # else its caller has gone
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
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, *, spans: bool = False
) -> list[Tokens | ServeError]:
    """The tokens of each text, with their `spans` if asked; an InternalError for a text that the tokenizer fails on."""
    try:
        encode = tokenizer.encode_with_offsets if spans else tokenizer.encode
        encoded = encode(texts, max_length)
        spans_N = encoded.spans or [None] * len(texts)
        rows = zip(encoded.ids, encoded.truncated, spans_N, strict=True)
        return [Tokens(ids, bool(cut), spans_S2) for ids, cut, spans_S2 in rows]
    except Exception as error:
        if len(texts) > 1:
            return [outcome for text in texts for outcome in encode_texts(tokenizer, [text], max_length, spans=spans)]
        log_failure("The tokenizer failed on a text", error)
        return [InternalError("The server could not tokenize this text; its log says why.")]


def check_length(text: str) -> None:
    """Raises InvalidRequest: the text has more than `MAX_TEXT_CHARS` characters."""
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidRequest(
            f"The text has {len(text)} characters; at most {MAX_TEXT_CHARS} are taken. Split or shorten it.",
            field="text",
        )
