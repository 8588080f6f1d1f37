"""Examples as token ids and sparse targets; one task's, and all tasks' joined for training.

Axes: N texts, L labels of one task, V teachers' vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse import csr_array

from ..data.examples import Example
from ..data.pipeline import TrainExamples
from ..data.taxonomy import Task, Taxonomy
from ..data.tokenizer import WordPieceTokenizer
from .soften import soften


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
    """Examples of one task as the network takes them.

    Attributes:
      ids: N arrays of token ids.
      targets: sparse float32 (N, L), 1 where a label is given.
      truncated: how many texts were longer than the model reads.
      soft: sparse float32 (N, L), a teacher's probabilities; None where no example has any.
      has_soft_N: bool, which examples have them.
      vectors_NV: float16, teachers' pooled vectors; zeros for an example without one, None where no example has any.
    """

    ids: list[np.ndarray]
    targets: csr_array
    truncated: int = 0
    soft: csr_array | None = None
    has_soft_N: np.ndarray | None = None
    vectors_NV: np.ndarray | None = None

    @property
    def labelled_N(self) -> np.ndarray:
        """bool, which examples have labels of their own, and not only a teacher's answer."""
        if self.has_soft_N is None:
            return np.ones(len(self.ids), bool)
        return (self.targets.sum(axis=1) > 0) | ~self.has_soft_N

    @property
    def targets_NL(self) -> np.ndarray:
        """`targets` as an array."""
        return self.targets.toarray()

    def sample(self, count: int, seed: int = 0) -> TokenizedSplit:
        """At most `count` of the examples, drawn at random; `truncated` stays that of all. Labels alone."""
        rows = np.random.default_rng(seed).permutation(len(self.ids))[:count]
        return TokenizedSplit([self.ids[row] for row in rows], self.targets[rows], self.truncated)


def tokenize(task: Task, examples: Sequence[Example], tokenizer: WordPieceTokenizer, max_length: int) -> TokenizedSplit:
    """Token ids and targets, in the order of the examples."""
    tokenized = tokenizer.encode([example.text for example in examples], max_length)
    targets = _sparse(task, [dict.fromkeys(example.labels, 1.0) for example in examples])
    soft = has_soft_N = None
    if any(example.soft is not None for example in examples):
        soft = _sparse(task, [example.soft or {} for example in examples])
        has_soft_N = np.array([example.soft is not None for example in examples])
    vectors_NV = None
    if vectors := [example.vector for example in examples if example.vector is not None]:
        vectors_NV = np.zeros((len(examples), len(vectors[0])), np.float16)
        vectors_NV[[example.vector is not None for example in examples]] = vectors
    return TokenizedSplit(tokenized.ids, targets, int(tokenized.truncated.sum()), soft, has_soft_N, vectors_NV)


def _sparse(task: Task, rows: Sequence[Mapping[str, float]]) -> csr_array:
    """float32 (N, L) of numbers by label name."""
    ends = np.cumsum([0, *(len(row) for row in rows)])
    columns = [task.index[label] for row in rows for label in row]
    values = np.array([value for row in rows for value in row.values()], np.float32)
    return csr_array((values, np.array(columns, np.int64), ends), shape=(len(rows), len(task.labels)))


def join_tasks(
    taxonomy: Taxonomy, splits: Mapping[str, TokenizedSplit], *, soft_share: float = 0.0, temperature: float = 1.0
) -> TrainExamples:
    """All tasks' training examples in one, over the global label index.

    Args:
      taxonomy: whose tasks `splits` has.
      splits: by task name.
      soft_share: what a teacher's answer weighs beside a given label; where there is no label it has all the weight.
      temperature: softens the teacher's answers, see `soften`.
    """
    present = [(i, task, splits[task.name]) for i, task in enumerate(taxonomy.tasks) if task.name in splits]

    def spread(task: Task, targets: csr_array) -> csr_array:
        rows = targets.tocoo()
        offset = taxonomy.slice_of(task.name).start
        shape = (len(splits[task.name].ids), taxonomy.num_labels)
        return csr_array((rows.data, (rows.coords[0], rows.coords[1] + offset)), shape)

    soft = share_N = None
    if any(split.soft is not None for _, _, split in present):
        parts, shares = [], []
        for _, task, split in present:
            if split.soft is None or split.has_soft_N is None:
                parts.append(csr_array((len(split.ids), taxonomy.num_labels), dtype=np.float32))
                shares.append(np.zeros(len(split.ids), np.float32))
                continue
            parts.append(spread(task, soften(task, split.soft, temperature)))
            share_N = np.where(split.labelled_N, soft_share, 1.0)
            shares.append(np.where(split.has_soft_N, share_N, 0.0).astype(np.float32))
        soft, share_N = csr_array(sparse.vstack(parts)), np.concatenate(shares)
    return TrainExamples(
        ids=[ids for _, _, split in present for ids in split.ids],
        targets=csr_array(sparse.vstack([spread(task, split.targets) for _, task, split in present])),
        tasks_N=np.concatenate([np.full(len(split.ids), i, np.int32) for i, _, split in present]),
        soft=soft,
        soft_share_N=share_N,
        vectors_NV=_join_vectors([split for _, _, split in present]),
    )


def _join_vectors(splits: Sequence[TokenizedSplit]) -> np.ndarray | None:
    widths = [split.vectors_NV.shape[1] for split in splits if split.vectors_NV is not None]
    if not widths:
        return None
    none_NV = [np.zeros((len(split.ids), widths[0]), np.float16) for split in splits]
    return np.concatenate(
        [none if split.vectors_NV is None else split.vectors_NV for split, none in zip(splits, none_NV, strict=True)]
    )
