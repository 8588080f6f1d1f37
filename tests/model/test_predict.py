"""Prediction of many texts with programs of static shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from classer.data.errors import InputError
from classer.model import predict
from classer.model.bundle import Bundle
from classer.model.precision import Precision
from classer.model.predict import Predictor


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Bundle) -> Predictor:
    return tiny_bundle.predictor()


@pytest.fixture(scope="module")
def ids(tiny_bundle: Bundle) -> list[np.ndarray]:
    """Nine rows, alternately long and short, so that they are not sorted by length."""
    rng = np.random.default_rng(0)
    lengths = [48, 1, 33, 20, 9, 33, 1, 48, 9]
    return [rng.integers(4, tiny_bundle.encoder.vocab_size, n, dtype=np.int32) for n in lengths]


@pytest.fixture(scope="module")
def one_by_one_NL(predictor: Predictor, ids: list[np.ndarray]) -> np.ndarray:
    """Logits (N, L), with each row run alone by a program of exactly its length."""
    rows = [predictor.compile(1, len(row))(row[None], np.array([len(row)], np.int32)) for row in ids]
    return np.concatenate(rows)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_logits_come_in_the_order_of_the_texts_whatever_the_batches(
    predictor: Predictor, ids: list[np.ndarray], one_by_one_NL: np.ndarray, batch_size: int
) -> None:
    logits_NL = predictor.logits(ids, batch_size=batch_size)
    assert logits_NL.shape == (9, 10)
    assert logits_NL.dtype == np.float32
    np.testing.assert_allclose(logits_NL, one_by_one_NL, atol=1e-5)
    spread = np.abs(one_by_one_NL[:, None] - one_by_one_NL[None]).max(axis=-1) + np.eye(9)
    assert spread.min() > 1e-3, "rows that differ less than this could be swapped unnoticed"


def test_no_texts_give_no_logits_and_compile_nothing(tiny_bundle: Bundle, monkeypatch) -> None:
    predictor = tiny_bundle.predictor()
    monkeypatch.setattr(predictor, "compile", lambda *shape: pytest.fail(f"compiled {shape}"))
    assert predictor.logits([]).shape == (0, 10)


def test_filler_rows_change_nothing_and_are_finite(predictor: Predictor, ids: list[np.ndarray]) -> None:
    program = predictor.compile(4, 48)
    tokens_BS = np.zeros((4, 48), np.int32)
    tokens_BS[0] = ids[0]
    logits_BL = program(tokens_BS, np.array([48, 0, 0, 0], np.int32))
    tokens_BS[1:] = 7  # the tokens of a filler row are ignored
    np.testing.assert_array_equal(program(tokens_BS, np.array([48, 0, 0, 0], np.int32))[0], logits_BL[0])
    assert np.isfinite(logits_BL).all()


def test_progress_counts_every_text_once(predictor: Predictor, ids: list[np.ndarray]) -> None:
    seen: list[int] = []
    predictor.logits(ids, batch_size=4, progress=seen.append)
    assert sum(seen) == len(ids)
    assert max(seen) <= 4


def test_a_shape_is_compiled_once(predictor: Predictor) -> None:
    first, second = predictor.compile(2, 16), predictor.compile(2, 16)
    assert first._executable is second._executable
    assert (first.batch_size, first.length) == (2, 16)
    assert predictor.compile(2, 24)._executable is not first._executable


def test_a_program_beyond_what_the_system_allows_is_refused(tiny_bundle: Bundle, monkeypatch, tmp_path: Path) -> None:
    """Without the check, LLVM would abort the process."""
    predictor = tiny_bundle.predictor()
    known = predictor.compile(3, 16)
    limit = tmp_path / "max_map_count"
    limit.write_text(f"{predict.SPARE_MAPPINGS}\n")
    monkeypatch.setattr(predict, "_MAX_MAPPINGS", limit)
    with pytest.raises(InputError, match=r"memory mappings of the 4,096 .*vm\.max_map_count=262144"):
        predictor.compile(3, 24)
    assert predictor.compile(3, 16)._executable is known._executable  # existing programs remain usable
    limit.write_text("1000000000\n")
    assert predictor.compile(3, 24).length == 24
    monkeypatch.setattr(predict, "_MAX_MAPPINGS", tmp_path / "missing")  # not Linux
    assert predictor.compile(3, 32).length == 32


def test_a_text_longer_than_the_largest_bucket_is_refused(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="A text of 33 tokens fits no bucket"):
        predictor.logits([np.ones(33, np.int32)], buckets=(16, 32))


def test_other_weights_share_what_is_compiled(predictor: Predictor, tiny_bundle: Bundle, ids, one_by_one_NL) -> None:
    other = predictor.with_weights({name: value + 0.01 for name, value in tiny_bundle.weights.items()})
    assert other.compile(1, 48)._executable is predictor.compile(1, 48)._executable
    assert np.abs(other.logits(ids[:1], batch_size=1) - one_by_one_NL[:1]).max() > 1e-4
    np.testing.assert_allclose(predictor.logits(ids[:1], batch_size=1), one_by_one_NL[:1], atol=1e-5)


def test_bfloat16_stays_near_float32(tiny_bundle: Bundle, ids: list[np.ndarray], one_by_one_NL: np.ndarray) -> None:
    rough_NL = tiny_bundle.predictor(Precision.bfloat16).logits(ids, batch_size=4)
    assert rough_NL.dtype == np.float32
    assert 1e-6 < np.abs(rough_NL - one_by_one_NL).max() < 0.05 * np.abs(one_by_one_NL).max()
