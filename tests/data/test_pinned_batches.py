"""The batches of a seed are the same in every version, so that a run resumed after an upgrade sees the same data."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from classer.data.pipeline import Batch, TrainExamples, epoch_batches, stage_batches
from classer.data.prepare.local import prepare
from classer.data.prepare.plan import PrepareConfig, PreparePlan
from classer.data.shards import Shards
from classer.data.tokenizer import WordPieceTokenizer
from classer.tests.helpers import no_progress

WORDS = ["the", "is", "a", "my", "has", "not", "where", "card", "arrived", "money"]
WORDS += ["bread", "cheese", "soup", "apple", "goal", "match", "team", "race", "rain", "storm"]
FIELDS = ("tokens_BS", "lengths_B", "targets_BL", "weights_B", "tasks_B", "soft_BL", "soft_share_B", "vectors_BV")
OPTIONS: dict[str, Any] = {"batch_size": 12, "seed": 3, "pad_id": 0}


@pytest.fixture(scope="module")
def examples() -> TrainExamples:
    count = 97
    targets = csr_array(np.eye(count, dtype=np.float32))
    return TrainExamples(
        [np.full(5 + 13 * (n % 9), n + 1, np.int32) for n in range(count)],
        targets,
        np.repeat(np.arange(3, dtype=np.int32), [60, 30, 7]),
        csr_array(0.5 * targets),
        np.linspace(0, 1, count, dtype=np.float32),
        np.arange(2 * count, dtype=np.float16).reshape(count, 2),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards")
    for task, labels, rows in (("kinds", "xyz", range(150)), ("tags", "ab", range(150, 230))):
        lines = [
            {"text": " ".join(WORDS[(i // 20**j if j < 3 else i + j) % 20] for j in range(3 + i % 37)), "label": label}
            for i, label in zip(rows, itertools.cycle(labels), strict=False)
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)))
    WordPieceTokenizer(folder / "vocab.txt").save(folder / "tokenizer")
    config = PrepareConfig(dev_fraction=0, near_duplicates=0, records_per_shard=60)
    inputs = [folder / "kinds.jsonl", folder / "tags.jsonl"]
    prepare(PreparePlan.make(config, inputs, [], folder / "tokenizer", folder / "out"), progress=no_progress)
    made = Shards(folder / "out")
    assert len(made) == 230
    return made


def digest(batches: Iterable[Batch]) -> str:
    """A hash of shapes, types and bytes of all fields."""
    found = hashlib.sha256()
    for batch in batches:
        for name in FIELDS:
            value = getattr(batch, name)
            found.update(name.encode())
            if value is not None:
                found.update(repr((value.shape, value.dtype.str)).encode() + np.ascontiguousarray(value).tobytes())
    return found.hexdigest()[:16]


def of_arrays(examples: TrainExamples, _: Shards) -> Any:
    return epoch_batches(examples, num_epochs=4, **OPTIONS)


def stage_of_arrays(examples: TrainExamples, _: Shards) -> Any:
    return stage_batches(examples, np.array([0.5, 0.3, 0.2]), 300, stage=1, **OPTIONS)


def of_shards(_: TrainExamples, shards: Shards) -> Any:
    return epoch_batches(Shards(shards.folder, window=70), num_epochs=3, **OPTIONS)


def stage_of_shards(_: TrainExamples, shards: Shards) -> Any:
    return stage_batches(shards, np.array([0.4, 0.6]), 300, stage=1, **OPTIONS)


def half_of_shards(_: TrainExamples, shards: Shards) -> Any:
    return epoch_batches(shards, num_epochs=3, rows=range(6, 12), **OPTIONS)


# The kind of batches, the number of steps skipped first, and the hash of the next 20.
PINNED = [
    (of_arrays, 0, "4e920d594e5d4c3a"),
    (of_arrays, 15, "94b5016838dc201c"),
    (stage_of_arrays, 0, "34d4d7715f8be769"),
    (stage_of_arrays, 250, "eadfdf4de96451ff"),  # across a window's end
    (of_shards, 0, "89340251e6b39803"),
    (of_shards, 30, "0d462e04fbdee106"),
    (half_of_shards, 0, "471c4df1bee919fb"),
    (stage_of_shards, 0, "e3f6cfea11ba0242"),
    (stage_of_shards, 250, "99014586ff14ba25"),
]


@pytest.mark.parametrize(("make", "taken", "expected"), PINNED)
def test_the_batches_of_a_seed_are_those_of_every_version(
    examples: TrainExamples, shards: Shards, make: Callable[..., Any], taken: int, expected: str
) -> None:
    batches = make(examples, shards)
    iterator = iter(batches)
    before = list(islice(iterator, taken))
    state = json.loads(json.dumps(iterator.get_state()))
    assert digest(islice(iterator, 20)) == expected
    iterator.close()
    assert digest(map(batches.batch, range(taken, taken + 20))) == expected
    assert digest(before) == digest(map(batches.batch, range(taken)))
    resumed = iter(make(examples, shards))
    resumed.set_state(state)
    assert digest(islice(resumed, 20)) == expected
    resumed.close()
