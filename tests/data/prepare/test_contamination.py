"""Training texts that count as contaminated."""

from __future__ import annotations

from pathlib import Path

import pytest

from classer.data.prepare.contamination import WINDOW_CHARS, EvaluationIndex
from classer.data.prepare.minhash import sketch
from classer.data.prepare.steps import SourceRow, hash_text
from classer.data.splits import comparable

LONG = "The committee said on Tuesday that it would not publish the figures before the second reading of the bill."
SHORT = "where is my card"
CJK = "明日の天気は晴れのち曇りで、最高気温は二十度を超える見込みです。" * 3
OTHER = "A wholly different sentence about rivers, bridges, and the price of bread in the town where she was born."


def find(index: EvaluationIndex, *texts: str) -> list[tuple[int, float] | None]:
    plain = [comparable(text) for text in texts]
    rows = [SourceRow(i, 0, text, (), hash_text(p)) for i, (text, p) in enumerate(zip(texts, plain, strict=True))]
    found = index.find(rows, plain, sketch(plain, 8))
    return [None if drop is None else (drop.of, drop.similarity) for drop in found]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> EvaluationIndex:
    file: Path = tmp_path_factory.mktemp("index") / "index.npz"
    EvaluationIndex.build([SHORT, LONG, CJK, LONG.upper()], 8, 0.8).save(file)
    return EvaluationIndex.load(file)


def test_equal_texts_are_found_whatever_their_case_and_white_space(index: EvaluationIndex) -> None:
    assert find(index, SHORT, "  Where IS my\ncard ", LONG.lower(), CJK) == [(0, 1.0), (0, 1.0), (1, 1.0), (2, 1.0)]


def test_near_copies_are_found(index: EvaluationIndex) -> None:
    ((of, alike),) = [drop for drop in find(index, LONG.replace("Tuesday", "Monday")) if drop]
    assert of == 1
    assert 0.8 <= alike < 1


def test_a_text_that_contains_an_evaluation_text_is_found(index: EvaluationIndex) -> None:
    half = LONG[: 20 + WINDOW_CHARS + 8]
    assert find(index, f"{OTHER} {LONG} {OTHER}") == [(1, 1.0)]
    assert find(index, OTHER + CJK + OTHER)[0] is not None
    (drop,) = find(index, f"{OTHER} {half} {OTHER}")
    assert drop is not None
    assert 0.5 <= drop[1] < 1


def test_others_are_left_alone(index: EvaluationIndex) -> None:
    assert (
        find(index, OTHER, "where was his car", f"{OTHER} {SHORT} {OTHER}", LONG[:40], OTHER + LONG[:50]) == [None] * 5
    )


def test_without_evaluation_sets_nothing_is_contaminated() -> None:
    assert find(EvaluationIndex.build([], 8, 0.8), SHORT, LONG) == [None, None]


def test_a_threshold_of_0_looks_for_no_near_copies() -> None:
    index = EvaluationIndex.build([SHORT], 128, 0.0)
    plain = comparable("where is my card?")
    row = SourceRow(0, 0, plain, (), hash_text(plain))
    assert index.find([row], [plain], sketch([plain], 128)) == [None]
