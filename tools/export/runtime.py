"""The interface of a loaded export: a function from texts to probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from classer.data.buckets import bucket_for, pad_batch
from classer.data.tokenizer import WordPieceTokenizer

from .folder import Export

# tokens_BS and lengths_B, int32 → probabilities_BL, float32.
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Runtime(Protocol):
    """Texts → probabilities_NL, float32 (texts, labels of the taxonomy), computed `batch_size` texts at a time."""

    def __call__(self, texts: Sequence[str], batch_size: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class TokenRuntime:
    """A runtime of a model that takes token ids; texts are tokenised by the export's own tokenizer.

    Attributes:
      tokenizer: the export's tokenizer.
      max_length: maximum tokens of a text.
      lengths: the sequence lengths that have a program, ascending; empty if any length is accepted.
      run: runs one padded batch.
      fixed_batch: the static batch size; 0 if any size is accepted.
    """

    tokenizer: WordPieceTokenizer
    max_length: int
    lengths: tuple[int, ...]
    run: Run
    fixed_batch: int = 0

    @classmethod
    def of(cls, export: Export, run: Run, fixed_batch: int = 0) -> TokenRuntime:
        return cls(export.tokenizer, export.max_length, export.lengths, run, fixed_batch)

    def __call__(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        ids = self.tokenizer.encode(texts, self.max_length).ids
        size = self.fixed_batch or batch_size
        rows = []
        for start in range(0, len(ids), size):
            batch = ids[start : start + size]
            longest = max(map(len, batch))
            length = bucket_for(longest, self.lengths) if self.lengths else longest
            tokens_BS, lengths_B = pad_batch(batch, self.fixed_batch or len(batch), length, self.tokenizer.pad_id)
            rows.append(self.run(tokens_BS, lengths_B)[: len(batch)])
        return np.concatenate(rows)
