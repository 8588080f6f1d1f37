"""The tokenising stage on a tokenizer whose speed the test holds in its hand."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from classer.serve.core.tokenizing import ENCODING_RETRY_SECONDS, TokenizedText, TokenizerStage
from classer.serve.wire.errors import InternalError, Overloaded


@dataclasses.dataclass
class Encoded:
    ids: list[np.ndarray]
    truncated: np.ndarray
    spans: list[np.ndarray] | None = None


class Lengths:
    """A text's only token is its length. It waits for `go`, and fails on texts with "bad" in them."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.calls: list[list[str]] = []
        self.threads: set[int] = set()

    def encode(self, texts: Sequence[str], max_length: int) -> Encoded:
        self.calls.append(list(texts))
        self.threads.add(threading.get_ident())
        assert self.go.wait(30)
        if any("bad" in text for text in texts):
            raise ValueError("cannot")
        return Encoded(
            [np.array([len(text)], np.int32) for text in texts], np.array([len(text) > max_length for text in texts])
        )

    def encode_with_offsets(self, texts: Sequence[str], max_length: int) -> Encoded:
        encoded = self.encode(texts, max_length)
        return dataclasses.replace(encoded, spans=[np.array([[0, len(text)]], np.int32) for text in texts])


def read(outcomes: Sequence[object]) -> list[int]:
    return [int(one.ids[0]) for one in outcomes if isinstance(one, TokenizedText)]


def test_requests_that_wait_are_tokenised_together_off_the_loop() -> None:
    async def main() -> None:
        tokenizer = Lengths()
        stage = TokenizerStage(tokenizer, 3)
        tokenizer.go.clear()
        first = asyncio.create_task(stage.tokenize(["a"]))
        while not tokenizer.calls:
            await asyncio.sleep(0)
        rest = [asyncio.create_task(stage.tokenize(["b" * n, "cccc"])) for n in range(3)]
        await asyncio.sleep(0)
        tokenizer.go.set()
        assert read(await first) == [1]
        assert [read(await task) for task in rest] == [[0, 4], [1, 4], [2, 4]]
        assert tokenizer.calls == [["a"], ["", "cccc", "b", "cccc", "bb", "cccc"]]
        assert threading.get_ident() not in tokenizer.threads
        assert len(tokenizer.threads) == 1
        (outcome,) = await stage.tokenize(["dddd"])
        assert isinstance(outcome, TokenizedText)
        assert outcome.truncated
        stage.close()

    asyncio.run(main())


def test_one_bad_text_is_its_own_failure() -> None:
    async def main() -> None:
        stage = TokenizerStage(Lengths(), 3)
        outcomes = await stage.tokenize(["a", "bad", "ccc"])
        assert read(outcomes) == [1, 3]
        assert isinstance(outcomes[1], InternalError)
        assert "bad" not in str(outcomes[1])
        assert read(await stage.tokenize(["a"])) == [1]
        stage.close()

    asyncio.run(main())


def test_more_than_the_bound_is_refused_and_a_gone_caller_makes_room() -> None:
    async def main() -> None:
        tokenizer = Lengths()
        stage = TokenizerStage(tokenizer, 3, max_waiting_chars=10)
        tokenizer.go.clear()
        first = asyncio.create_task(stage.tokenize(["a"]))
        while not tokenizer.calls:
            await asyncio.sleep(0)
        waiting = asyncio.create_task(stage.tokenize(["b" * 9]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="takes on 10 at most") as refused:
            await stage.tokenize([""])
        assert refused.value.retry_seconds == ENCODING_RETRY_SECONDS
        waiting.cancel()
        tokenizer.go.set()
        await first
        assert read(await stage.tokenize(["ccc"])) == [3]
        assert tokenizer.calls == [["a"], ["ccc"]]
        stage.close()

    asyncio.run(main())


def test_spans_come_where_they_are_asked_for() -> None:
    async def main() -> None:
        stage = TokenizerStage(Lengths(), 3)
        (with_spans,) = await stage.tokenize(["abc"], spans=True)
        (without,) = await stage.tokenize(["abc"])
        assert isinstance(with_spans, TokenizedText)
        assert isinstance(without, TokenizedText)
        assert with_spans.spans is not None
        assert with_spans.spans.tolist() == [[0, 3]]
        assert without.spans is None
        stage.close()

    asyncio.run(main())
