"""Data that `classer prepare` made: tokenised already, and read from disk as they are needed.

Held in memory are the examples for development, and a sample of each task's training examples, for the first head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from ..data.errors import InputError
from ..data.prepare.plan import read_manifest
from ..data.readers import TASK_FILES
from ..data.records import Record
from ..data.shards import Shards
from ..data.taxonomy import Task
from ..data.tokenizer import WordPieceTokenizer
from .config import TrainJob
from .distributed import say
from .probe import MAX_EXAMPLES
from .tokenized import TokenizedSplit

# Examples for development that are held of each task, unless `held_out_texts` says less.
MAX_DEV = 20_000
# Records that are read at once.
_READ = 4096


def is_prepared(job: TrainJob) -> bool:
    """A task's own folder may hold a file of that name too."""
    return (job.data / "manifest.json").is_file() and not any((job.data / file).is_file() for file in TASK_FILES)


def open_prepared(job: TrainJob) -> Shards:
    """The training shards of a prepared folder.

    Raises:
      InputError: they cannot be read, or the job asks for what can only be done with texts.
    """
    for option, given, why in (
        ("--dev", job.dev, "a prepared folder brings its own"),
        ("--test", job.test, "measure the bundle afterwards, with `classer evaluate`"),
        ("--soft-labels", job.soft_labels, "they belong to texts"),
        ("--texts", job.texts, "prepare fewer"),
        ("--baseline", job.baseline, "it needs texts"),
    ):
        if given:
            raise InputError(f"{job.data} holds prepared data, for which there is no {option}: {why}.")
    shards = Shards(job.data, workers=job.input_workers)
    length = read_manifest(job.data)["inputs"]["config"]["max_length"]
    if length != job.recipe.max_length:
        raise InputError(f"{job.data} was prepared for texts of {length} tokens; train with --max-length {length}.")
    return shards


def check_tokenizer(job: TrainJob, tokenizer: WordPieceTokenizer) -> None:
    """Raises InputError where the data were tokenised for another encoder."""
    theirs = WordPieceTokenizer.from_folder(job.data / "tokenizer")
    if (theirs.vocab, theirs.lowercase) != (tokenizer.vocab, tokenizer.lowercase):
        raise InputError(
            f"{job.data} was tokenised with another vocabulary than that of {job.recipe.encoder}; prepare it with "
            "that encoder's (--tokenizer)."
        )


def load_splits(job: TrainJob, train: Shards) -> dict[str, dict[str, TokenizedSplit]]:
    """Split → task → examples: for development, and a sample of those to train on.

    Raises:
      InputError: a task has no examples for development, or nothing to learn from.
    """
    dev = Shards(job.data, "dev")
    most = min(job.held_out_texts or MAX_DEV, MAX_DEV)
    splits = {
        "train": _drawn(train, MAX_EXAMPLES, job.recipe.seed, MAX_EXAMPLES * len(train.taxonomy.tasks)),
        "dev": _drawn(dev, most, job.recipe.seed, len(dev)),
        "test": {},
    }
    for task in train.taxonomy.tasks:
        if task.name not in splits["dev"]:
            raise InputError(
                f"{job.data} has no examples of the task '{task.name}' for development; prepare it with a larger "
                "--dev-fraction."
            )
    held = sum(len(split.ids) for split in splits["dev"].values())
    say(
        f"{job.data}: {len(train.taxonomy.tasks)} tasks, {train.taxonomy.num_labels:,} labels, {len(train):,} examples "
        f"to train on, {held:,} of {len(dev):,} for development."
    )
    return splits


def _drawn(shards: Shards, most: int, seed: int, reads: int) -> dict[str, TokenizedSplit]:
    """At most `most` examples of each task that is met, after at most about `reads` of all."""
    tasks = shards.taxonomy.tasks
    found: list[list[Record]] = [[] for _ in tasks]
    order = np.random.default_rng(seed).permutation(len(shards))[:reads]
    for start in range(0, len(order), _READ):
        for record in shards.read(np.sort(order[start : start + _READ])):
            if len(found[record.task]) < most:
                found[record.task].append(record)
        if all(len(records) == most for records in found):
            break
    return {task.name: _split(task, records) for task, records in zip(tasks, found, strict=True) if records}


def _split(task: Task, records: Sequence[Record]) -> TokenizedSplit:
    ends = np.cumsum([0, *(len(record.labels) for record in records)])
    columns = np.concatenate([record.labels for record in records])
    targets = csr_array((np.ones(ends[-1], np.float32), columns, ends), shape=(len(records), len(task.labels)))
    return TokenizedSplit([record.ids for record in records], targets)


def decoded_text(ids: np.ndarray, tokenizer: WordPieceTokenizer) -> str:
    """The approximate text of token ids, without the special tokens at its start and end."""
    pieces = " ".join(tokenizer.vocab[i] for i in ids if i not in (tokenizer.cls_id, tokenizer.sep_id))
    return pieces.replace(" ##", "")
