"""A focused server, and the evidence that it gives: words of the text as it was sent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from classer.data.errors import InputError
from classer.model.bundle import Bundle, save_bundle
from classer.model.evidence import Kept, Span, evidence_spans
from classer.model.focus import Focus
from classer.serve.client.client import AsyncClient, Classification, Client, InvalidRequest
from classer.tests.helpers import with_gates

TEXT = "My  CARD has not\narrived — naïve 😀, and the money's gone! " * 2


@pytest.fixture(scope="module")
def gated_path(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Path:
    path = tmp_path_factory.mktemp("gated") / "bundle"
    save_bundle(with_gates(tiny_bundle), path)
    return path


@pytest.fixture(scope="module")
def focused(start_server, gated_path: Path):
    with start_server(gated_path, focus=("0.6",)) as running:
        yield running


def test_evidence_is_words_of_the_text_in_order(focused) -> None:
    with Client(focused.address) as client:
        answer = client.classify(TEXT, "topic", evidence=True)
        plain = client.classify(TEXT, "topic")
    assert plain.evidence == ()
    assert {label.label: label.score for label in plain.labels} == pytest.approx(
        {label.label: label.score for label in answer.labels}
    )
    assert sum(span.score for span in answer.evidence) == pytest.approx(1)
    ends = [0]
    for span in answer.evidence:
        assert ends[-1] <= span.start < span.end <= len(TEXT)
        assert not TEXT[span.start : span.end].isspace()
        ends.append(span.end)
    assert 3 <= len(answer.evidence) < answer.tokens - 2


def test_a_batch_and_the_async_client_give_it_too(focused) -> None:
    async def main() -> list:
        async with AsyncClient(focused.address) as client:
            one = await client.classify(TEXT, "topic", evidence=True)
            return [one, *await client.classify_batch([TEXT, ""], "topic", evidence=True)]

    one, in_batch, empty = asyncio.run(main())
    assert isinstance(in_batch, Classification)
    assert [(s.start, s.end) for s in one.evidence] == [(s.start, s.end) for s in in_batch.evidence]
    assert empty.evidence == ()


def test_a_server_that_reads_everything_has_none(start_server, gated_path: Path) -> None:
    with (
        start_server(gated_path) as running,
        Client(running.address) as client,
        pytest.raises(
            InvalidRequest, match=r"none stands out; ask for a focus below 1 .*or start it with a focus below 1"
        ),
    ):
        client.classify(TEXT, "topic", evidence=True)


@pytest.mark.parametrize("focus", ["0", "1.5", "half", "1,0.5,0.4,0.3,0.2,0.1,0.1,0.1"])
def test_a_focus_that_is_none_is_refused(start_server, gated_path: Path, focus: str) -> None:
    with pytest.raises(InputError, match="A focus is"), start_server(gated_path, focus=(focus,)):
        pass


def test_a_bundle_without_gates_cannot_be_focused(start_server, bundle_path: Path) -> None:
    with pytest.raises(InputError, match="not trained for focus"), start_server(bundle_path, focus=("0.6",)):
        pass


def test_what_is_written_is_what_is_read() -> None:
    for focus in (Focus.pyramid(0.35, 6), Focus.pyramid(1, 6), Focus.from_shares([0.9, 0.3, 0.01])):
        assert Focus.parse(str(focus), len(focus.units)) == focus


def test_touching_pieces_become_one_span_and_special_tokens_none() -> None:
    spans_S2 = np.array([[0, 0], [0, 4], [5, 8], [8, 11], [12, 13], [0, 0]])
    kept = Kept(np.array([0, 2, 3, 4, 5]), np.array([9.0, 0.0, 0.0, 0.0, 9.0], np.float32))
    first, second = evidence_spans(kept, spans_S2)
    assert first == Span(5, 11, first.score)
    assert second == Span(12, 13, second.score)
    assert (first.score, second.score) == pytest.approx((2 / 3, 1 / 3))
    assert evidence_spans(Kept(np.array([0, 5]), np.zeros(2)), spans_S2) == []
