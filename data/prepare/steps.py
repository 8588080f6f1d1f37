"""The steps of preparation as pure functions of rows: clean, hash, split, tokenise, count.

The order of the steps: `clean_row` (or a reject with its reason), exact duplicates by `exact_key`, `contamination`,
near-duplicates by `minhash`, `split_of`, `tokenize_rows`, shards.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..examples import Example
from ..readers import check_labels
from ..records import HASH_BYTES, encode_record
from ..splits import comparable
from ..taxonomy import Label, Task, TaskKind
from ..tokenizer import WordPieceTokenizer

_ROW_BITS = 40
_TASK_BYTES = 2


class SourceRow(NamedTuple):
    """A valid row.

    Attributes:
      rank: its position among all rows (see `rank_of`); of two duplicates the one of lower rank is kept.
      task: the position of its task among the inputs' tasks.
      text: the cleaned text.
      labels: label names.
      text_hash: hash of the text's `comparable` form; equal for texts that count as equal.
    """

    rank: int
    task: int
    text: str
    labels: tuple[str, ...]
    text_hash: bytes

    def to_json(self) -> bytes:
        """The row as one line of JSON."""
        fields = [self.rank, self.task, self.text, self.labels, self.text_hash.hex()]
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> SourceRow:
        rank, task, text, labels, text_hash = json.loads(line)
        return cls(rank, task, text, tuple(labels), bytes.fromhex(text_hash))


class Dropped(NamedTuple):
    """A row that is dropped as a duplicate or as contaminated.

    Attributes:
      rank: the row's rank.
      reason: "duplicate", "near-duplicate" or "contaminated".
      of: the rank of the row that is kept, or the position of the evaluation text.
      similarity: 1 for duplicates, the estimated Jaccard similarity for near-duplicates; for contamination the
        similarity, or the share of the evaluation text that the row contains (see `contamination`).
    """

    rank: int
    reason: str
    of: int
    similarity: float


def rank_of(file: int, row: int) -> int:
    """The rank of a row (counted from 1 in its file): ordered by file, then by row."""
    return file << _ROW_BITS | row


def place_of(rank: int) -> tuple[int, int]:
    """The (file, row) of a rank; the inverse of `rank_of`."""
    return rank >> _ROW_BITS, rank & ((1 << _ROW_BITS) - 1)


def clean_row(example: Example, rank: int, task: int, known: Task | None) -> SourceRow:
    """Normalises a row's text (NFC, no NUL, no white space around it) and checks its labels.

    Args:
      example: the example as read.
      rank, task: see `SourceRow`.
      known: the task, if a task.json describes it.

    Raises:
      InputError: the cleaned text is empty, or the labels do not fit the task.
    """
    text = unicodedata.normalize("NFC", example.text.replace("\0", "")).strip()
    if not text:
        raise InputError(f"{example.source}: nothing but white space and NUL; give it a text.")
    if known is not None:
        check_labels(known, [example])
    return SourceRow(rank, task, text, example.labels, hash_text(comparable(text)))


def hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def exact_key(row: SourceRow) -> bytes:
    """A key that is equal for exact duplicates, which are equal texts of one task."""
    return row.text_hash + row.task.to_bytes(_TASK_BYTES, "big")


def split_of(text_hash: bytes, dev_fraction: float) -> str:
    """ "train" or "dev", by the hash of the text alone, so that equal texts of several tasks are in the same split."""
    return "dev" if int.from_bytes(text_hash[:8], "big") < dev_fraction * 2**64 else "train"


def shard_number(text_hash: bytes, num_shards: int) -> int:
    """The number of a text's shard, from other bits of the hash than `split_of` uses."""
    return int.from_bytes(text_hash[8:16], "big") % num_shards


def num_shards_for(records: int, records_per_shard: int) -> int:
    return max(1, -(-records // records_per_shard))


class TokenizedRow(NamedTuple):
    """A tokenised row, ready for its shard.

    Attributes:
      split: "train" or "dev".
      key: the sort key within a shard: `exact_key`, which gives a random but reproducible order.
      record: the encoded record (see `records`).
      length: the number of tokens.
      truncated: whether tokens were cut off.
    """

    split: str
    key: bytes
    record: bytes
    length: int
    truncated: bool

    @property
    def task(self) -> int:
        """The position of the row's task among the inputs' tasks."""
        return int.from_bytes(self.key[-_TASK_BYTES:], "big")


def tokenize_rows(
    rows: Sequence[SourceRow],
    tasks: Sequence[Task],
    tokenizer: WordPieceTokenizer,
    max_length: int,
    dev_fraction: float,
) -> list[TokenizedRow]:
    """Tokenises rows, and encodes their label positions and splits."""
    tokenized = tokenizer.encode([row.text for row in rows], max_length)
    done = []
    for row, ids, truncated in zip(rows, tokenized.ids, tokenized.truncated, strict=True):
        labels = [tasks[row.task].index[label] for label in row.labels]
        record = encode_record(row.task, labels, ids, row.text_hash, tokenizer.vocab_size)
        split = split_of(row.text_hash, dev_fraction)
        done.append(TokenizedRow(split, exact_key(row), record, len(ids), bool(truncated)))
    return done


@dataclasses.dataclass
class LabelCounts:
    """Label statistics of a task's kept rows; those of parts can be merged."""

    rows: int = 0
    least: int = 1 << 30
    most: int = 0
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, labels: Iterable[str]) -> None:
        labels = list(labels)
        self.rows += 1
        self.least, self.most = min(self.least, len(labels)), max(self.most, len(labels))
        self.counts.update(labels)

    def merge(self, other: LabelCounts) -> LabelCounts:
        self.rows += other.rows
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.counts.update(other.counts)
        return self


def task_from_counts(name: str, known: Task | None, counts: LabelCounts) -> Task:
    """The task of a task.json, or the one inferred from the labels as in `readers.infer_task`.

    Raises:
      InputError: no row is left, no row has a label, or all rows have the same single label.
    """
    if not counts.rows:
        raise InputError(f"No usable row is left of the task '{name}'; rejects.jsonl has the reasons.")
    if known is not None:
        return known
    labels = tuple(Label(label) for label in sorted(counts.counts))
    if counts.least == counts.most == 1:
        if len(labels) < 2:
            raise InputError(
                f"All {counts.rows:,} rows of '{name}' have the same label; give at least two to tell apart."
            )
        return Task(name, TaskKind.BINARY if len(labels) == 2 else TaskKind.MULTICLASS, labels)
    if not labels:
        raise InputError(f"None of the {counts.rows:,} rows of '{name}' has a label.")
    return Task(name, TaskKind.MULTILABEL, labels)


def length_stats(lengths_N: np.ndarray, truncated: int, buckets: Sequence[int]) -> dict[str, Any]:
    """Length statistics of a split: tokens, quantiles, and the number of records in each length bucket."""
    if not len(lengths_N):
        return {"records": 0, "tokens": 0, "truncated": 0}
    bucket_N = np.searchsorted(buckets, lengths_N)
    counts = np.bincount(bucket_N, minlength=len(buckets))
    padded = int((counts * np.asarray(buckets)).sum())
    quantiles = np.quantile(lengths_N, (0.5, 0.9, 0.99), method="nearest")
    return {
        "records": len(lengths_N),
        "tokens": int(lengths_N.sum()),
        "padded_tokens": padded,
        "truncated": truncated,
        "mean": round(float(lengths_N.mean()), 2),
        "median": int(quantiles[0]),
        "p90": int(quantiles[1]),
        "p99": int(quantiles[2]),
        "longest": int(lengths_N.max()),
        "buckets": {str(bucket): int(n) for bucket, n in zip(buckets, counts, strict=True) if n},
    }
