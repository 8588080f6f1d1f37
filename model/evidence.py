"""Evidence: the parts of a text that a focused classifier kept, as character spans with scores. NumPy only.

Axes: S tokens of a text, K kept tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Kept(NamedTuple):
    """The tokens of one text that the last layer read.

    Attributes:
      positions_K: int32 places among the text's tokens, ascending.
      scores_K: float32, by the last gate that dropped tokens; meaningless for special tokens, which always stay.
    """

    positions_K: np.ndarray
    scores_K: np.ndarray


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text, and their share of its evidence."""

    start: int
    end: int
    score: float


def evidence_spans(kept: Kept, spans_S2: np.ndarray) -> list[Span]:
    """The words, or parts of words, that were kept, in the order of the text.

    The scores are a softmax over the kept tokens, special ones left out, and sum to one over the spans; pieces of a
    word that touch become one span with the sum of their scores.

    Args:
      kept: the tokens.
      spans_S2: the characters that each token of the text covers (`TokenizedTexts.spans`).
    """
    characters_K2 = spans_S2[kept.positions_K]
    words = characters_K2[:, 1] > characters_K2[:, 0]  # special tokens cover none
    if not words.any():
        return []
    scores_K = kept.scores_K[words].astype(np.float64)
    shares_K = np.exp(scores_K - scores_K.max())
    shares_K /= shares_K.sum()
    spans: list[Span] = []
    for (start, end), share in zip(characters_K2[words].tolist(), shares_K.tolist(), strict=True):
        if spans and spans[-1].end == start:
            spans[-1] = Span(spans[-1].start, end, spans[-1].score + share)
        else:
            spans.append(Span(start, end, share))
    return spans
