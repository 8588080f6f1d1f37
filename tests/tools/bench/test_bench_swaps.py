"""The benchmark of swaps: it verifies the versions of the answers and the absence of failures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from classer.model.bundle import Bundle, save_bundle
from classer.serve.client.results import Classification, ScoredLabel
from classer.tools.bench.swaps import Known, SwapsArguments, other_version, swap


@pytest.fixture
def path(tmp_path: Path, tiny_bundle: Bundle) -> Path:
    """The tiny bundle, limited to short texts to reduce compilation."""
    save_bundle(dataclasses.replace(tiny_bundle, max_length=16), tmp_path / "bundle")
    return tmp_path / "bundle"


def test_nothing_fails_while_two_versions_take_turns(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = swap(SwapsArguments(path, swaps=4, callers=2))
    assert (done.failed, done.wrong) == ([], [])
    assert len(set(done.answers)) == 2
    assert (len(done.seconds), len(done.megabytes)) == (4, 5)
    assert f"0 requests failed, 0 of {len(done.answers):,} answers were wrong" in capsys.readouterr().out


def test_the_other_version_s_answer_is_a_wrong_one(path: Path, tmp_path: Path) -> None:
    known = Known([path, other_version(path, tmp_path)])
    one, other = known.versions
    for text in known.texts:
        labels = tuple(ScoredLabel(name, score, False) for name, score in known.scores[one][text].items())
        answer = Classification(known.task, labels, False, 8, model_version=one)
        assert known.is_answer(text, answer)
        assert not known.is_answer(text, dataclasses.replace(answer, labels=labels[1:]))
        assert not known.is_answer(text, dataclasses.replace(answer, model_version=other))
