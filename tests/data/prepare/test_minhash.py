"""MinHash's estimates compared with exact similarities, and the buckets of near-duplicates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classer.data.prepare.minhash import (
    MAX_LEADERS,
    NUM_PERMUTATIONS,
    SHINGLE,
    band_rows,
    bucket_links,
    similarity,
    sketch,
    window_hashes,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abcdé漢😀 ", min_size=9, max_size=40), min_size=1, max_size=6), st.integers(1, 9))
def test_hashes_are_those_of_each_texts_windows_and_of_no_others(texts: list[str], width: int) -> None:
    hashes, starts = window_hashes(texts, width)
    expected = [text[i : i + width] for text in texts for i in range(len(text) - width + 1)]
    assert len(hashes) == len(expected)
    assert list(starts) == list(np.cumsum([0] + [len(text) - width + 1 for text in texts[:-1]]))
    pairs = set(zip(expected, hashes.tolist(), strict=True))
    assert len(pairs) == len(set(expected)) == len(set(hashes.tolist()))


def random_pairs(count: int) -> tuple[list[str], list[str], np.ndarray]:
    """(texts, edited texts, the exact Jaccard similarities of their shingles)."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(500)]
    left, right, jaccard = [], [], []
    for _ in range(count):
        one = [str(word) for word in rng.choice(words, 30)]
        other = list(one)
        for _ in range(rng.integers(0, 12)):
            other[rng.integers(0, 30)] = str(rng.choice(words))
        texts = " ".join(one), " ".join(other)
        a, b = ({text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in texts)
        left.append(texts[0])
        right.append(texts[1])
        jaccard.append(len(a & b) / len(a | b))
    return left, right, np.array(jaccard)


def test_the_estimate_is_unbiased_and_as_sharp_as_theory_says() -> None:
    left, right, jaccard = random_pairs(1500)
    a, b = sketch(left, 8), sketch(right, 8)
    estimated = np.array([similarity(x[None], y)[0] for x, y in zip(a.bytes_NP, b.bytes_NP, strict=True)])
    error = estimated - jaccard
    # Nearly a mean of 128 draws of probability s: σ² = s(1 − s)/128.
    expected = np.sqrt((jaccard * (1 - jaccard) / NUM_PERMUTATIONS).mean())
    assert abs(error.mean()) < 4 * expected / np.sqrt(len(error))
    assert error.std() < 1.2 * expected


def test_pairs_meet_in_a_band_as_often_as_theory_says() -> None:
    left, right, jaccard = random_pairs(1500)
    rows = band_rows(0.8)
    meet = (sketch(left, rows).bands_NB == sketch(right, rows).bands_NB).any(axis=1)
    assert meet[jaccard >= 0.8].mean() >= 0.9
    assert meet.mean() == pytest.approx((1 - (1 - jaccard**rows) ** (NUM_PERMUTATIONS // rows)).mean(), abs=0.03)


def test_a_sketch_does_not_depend_on_the_texts_beside_it() -> None:
    texts = ["a", "a text of some length", "日本語のテキスト", "x" * 300_000, "and one more"]
    together = sketch(texts, 8)
    for i, text in enumerate(texts):
        alone = sketch([text], 8)
        assert np.array_equal(alone.bands_NB[0], together.bands_NB[i])
        assert np.array_equal(alone.bytes_NP[0], together.bytes_NP[i])


def test_in_a_bucket_each_text_is_linked_to_an_earlier_one_that_resembles_it() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, (2, NUM_PERMUTATIONS), dtype=np.uint8)
    links = list(bucket_links(np.array([3, 5, 8, 9]), kinds[[0, 1, 0, 1]], 0.8))
    assert links == [(8, 3, 1.0), (9, 5, 1.0)]
    many = rng.integers(0, 256, (MAX_LEADERS + 40, NUM_PERMUTATIONS), dtype=np.uint8)
    assert list(bucket_links(np.arange(len(many)), many, 0.8)) == []
