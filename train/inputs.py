"""The tokenised examples of a run, from texts or from prepared data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..data.errors import InputError
from ..data.examples import Example
from ..data.shards import Shards
from ..data.taxonomy import Task, Taxonomy
from ..data.tokenizer import WordPieceTokenizer
from .config import TrainJob
from .datasets import Dataset, load_dataset
from .distributed import say
from .prepared import check_tokenizer, decoded_text, is_prepared, load_splits, open_prepared
from .tokenized import TokenizedSplit, tokenize

GOLDEN_TEXTS = 8


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The tokenised examples of a run.

    Attributes:
      taxonomy: the tasks.
      splits: split ("train", "dev", "test") → task → tokenised examples; of prepared data a sample of "train".
      golden_texts: some texts of each task.
      num_train: examples to train on.
      dataset: the examples with their texts; None of prepared data.
      shards: the training examples of prepared data.
    """

    taxonomy: Taxonomy
    splits: dict[str, dict[str, TokenizedSplit]]
    golden_texts: list[str]
    num_train: int
    dataset: Dataset | None = None
    shards: Shards | None = None

    def measured(self, task: str) -> str:
        """The split that the finished model is measured on: "test", or "dev" where there is none."""
        return "test" if task in self.splits["test"] else "dev"


def open_data(
    job: TrainJob,
    examples: Mapping[str, Sequence[Example]] | None = None,
    task: Task | None = None,
) -> Dataset | Shards:
    """A job's examples, or the shards to read them from. Raises as `load_dataset` and `open_prepared`."""
    if examples is None and is_prepared(job):
        return open_prepared(job)
    if job.input_workers:
        raise InputError(f"{job.data} is no prepared data, of which alone workers make batches; see `classer prepare`.")
    return load_dataset(job, examples, task)


def load_inputs(job: TrainJob, data: Dataset | Shards, tokenizer: WordPieceTokenizer) -> Inputs:
    """Tokenises texts, or samples prepared data.

    Raises:
      InputError: prepared data were made for another encoder, or lack examples for development.
    """
    if isinstance(data, Dataset):
        splits = _tokenize(job, data, tokenizer)
        count = sum(len(split) for split in data.train.values())
        return Inputs(data.taxonomy, splits, _golden_texts(data), count, dataset=data)
    check_tokenizer(job, tokenizer)
    splits = load_splits(job, data)
    dev = splits["dev"].values()
    turns = [split.ids[turn] for turn in range(GOLDEN_TEXTS) for split in dev if turn < len(split.ids)]
    golden = [decoded_text(ids, tokenizer) for ids in turns[:GOLDEN_TEXTS]]
    return Inputs(data.taxonomy, splits, golden, len(data), shards=data)


def _tokenize(job: TrainJob, dataset: Dataset, tokenizer: WordPieceTokenizer) -> dict[str, dict[str, TokenizedSplit]]:
    """Split → task → examples."""
    tasks, length = dataset.taxonomy.tasks, job.recipe.max_length
    splits = {
        split: {
            task.name: tokenize(task, by_task[task.name], tokenizer, length) for task in tasks if task.name in by_task
        }
        for split, by_task in (("train", dataset.train), ("dev", dataset.dev), ("test", dataset.test))
    }
    if cut := sum(split.truncated for split in splits["train"].values()):
        share = cut / sum(len(split.ids) for split in splits["train"].values())
        say(f"{cut:,} training texts ({share:.0%}) are longer than {length} tokens and are cut there.")
    return splits


def _golden_texts(dataset: Dataset) -> list[str]:
    """A few texts of every task, `GOLDEN_TEXTS` in all."""
    tasks = dataset.taxonomy.tasks
    turns = [dataset.dev[task.name][turn : turn + 1] for turn in range(GOLDEN_TEXTS) for task in tasks]
    return [example.text for examples in turns for example in examples][:GOLDEN_TEXTS]
