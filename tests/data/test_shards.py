"""Batches from shards: complete, deterministic, the same for any number of processes and workers, resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classer.data.curriculum import WINDOW, CurriculumPlan
from classer.data.errors import InputError
from classer.data.pipeline import Batch, Batches, epoch_batches, stage_batches
from classer.data.plans import ShufflePlan
from classer.data.prepare.local import prepare
from classer.data.prepare.plan import PrepareConfig, PreparePlan
from classer.data.shards import Shards
from classer.data.tokenizer import WordPieceTokenizer
from classer.tests.helpers import VOCAB, no_progress

NUM_TEXTS = 230
WORDS = [word for word in VOCAB if word.isalpha()]
SETTINGS: dict[str, Any] = {"batch_size": 12, "seed": 3, "pad_id": 0, "num_epochs": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared tasks in several shards; each text's first token ids tell it apart."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 5 + i % 37)) for i in range(NUM_TEXTS)]
    rows = [{"text": text, "labels": ["a", "b", "c"][: 1 + i % 3]} for i, text in enumerate(texts)]
    (folder / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:150]))
    rows = [{"text": row["text"], "label": f"kind {i % 4}"} for i, row in enumerate(rows)]
    (folder / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[150:]))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    WordPieceTokenizer(folder / "vocab.txt").save(folder / "tokenizer")
    config = PrepareConfig(dev_fraction=0, near_duplicates=0, records_per_shard=60)
    inputs = [folder / "tags.jsonl", folder / "kinds.jsonl"]
    prepare(PreparePlan.make(config, inputs, [], folder / "tokenizer", folder / "out"), progress=no_progress)
    return folder / "out"


def batches_of(folder: Path, *, window: Any = 70, **changes: Any) -> Batches[ShufflePlan]:
    return epoch_batches(Shards(folder, window=window), **(SETTINGS | changes))


def stage_of(folder: Path, **changes: Any) -> Batches[CurriculumPlan]:
    """The same number of batches, of a stage that draws the second task more often than in proportion to its size."""
    settings: dict[str, Any] = {name: SETTINGS[name] for name in ("batch_size", "seed", "pad_id")}
    shares_T = changes.pop("shares_T", np.array([0.4, 0.6]))
    return stage_batches(Shards(folder), shares_T, 40, **({"stage": 1, **settings, **changes}))


Make = Callable[..., Batches[Any]]
both = pytest.mark.parametrize("make", [batches_of, stage_of])


def part_of(make: Make, folder: Path, process: int, num_processes: int) -> Batches[Any]:
    """The batches of one of several processes."""
    return make(folder, rows=np.array_split(np.arange(SETTINGS["batch_size"]), num_processes)[process])


def rows_of(batches: list[Batch]) -> list[tuple[bytes, bytes]]:
    """(token ids, targets) of the rows that are not padding."""
    return [
        (batch.tokens_BS[i, : batch.lengths_B[i]].tobytes(), batch.targets_BL[i].tobytes())
        for batch in batches
        for i in range(len(batch.lengths_B))
        if batch.weights_B[i]
    ]


# The fields of every batch; batches from shards have no soft labels.
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.default is dataclasses.MISSING]


def assert_equal(left: Batch, right: Batch) -> None:
    for field in dataclasses.fields(Batch):
        assert np.array_equal(getattr(left, field.name), getattr(right, field.name)), field.name


def test_each_record_comes_once_an_epoch_with_its_labels(folder: Path) -> None:
    batches = batches_of(folder)
    assert batches.plan.steps_per_epoch == -(-NUM_TEXTS // 12)
    made = list(batches.iterate())
    assert len(made) == batches.num_steps == 2 * batches.plan.steps_per_epoch
    first, second = rows_of(made[: batches.plan.steps_per_epoch]), rows_of(made[batches.plan.steps_per_epoch :])
    assert len(first) == len(set(first)) == NUM_TEXTS
    assert first != second
    assert sorted(first) == sorted(second)
    taxonomy = Shards(folder).taxonomy
    tags, kinds = taxonomy.slice_of("tags"), taxonomy.slice_of("kinds")
    targets = np.array([np.frombuffer(row[1], np.float32) for row in first])
    assert sorted(targets[:, tags].sum(axis=1)) == [0] * 80 + [1] * 50 + [2] * 50 + [3] * 50
    assert targets[:, kinds].sum() == 80
    for batch in made:
        held = batch.targets_BL[:, kinds].sum(axis=1)
        assert np.array_equal(held[batch.weights_B > 0], batch.tasks_B[batch.weights_B > 0])  # kinds is task 1


def test_batches_are_full_but_one_and_no_longer_than_their_bucket(folder: Path) -> None:
    batches = batches_of(folder)
    for step in range(batches.num_steps):
        batch = batches.batch(step)
        assert batch.tokens_BS.shape == (12, batches.plan.planned(step).length)
    sizes = [len(batches.plan.planned(step).rows) for step in range(batches.plan.steps_per_epoch)]
    assert sorted(sizes)[1:] == [12] * (len(sizes) - 1)
    lengths = [batches.plan.planned(step).length for step in range(batches.plan.steps_per_epoch)]
    assert sum(lengths) < 0.75 * len(lengths) * max(lengths)  # more than one bucket is used


def test_a_stage_draws_its_tasks_in_their_shares(folder: Path) -> None:
    stage = stage_of(folder)
    made = list(stage.iterate())
    assert len(made) == stage.num_steps == 40
    assert all(batch.weights_B.all() for batch in made)
    rows = rows_of([stage.batch(step) for step in range(WINDOW)])
    kinds = [
        bool(np.frombuffer(targets, np.float32)[Shards(folder).taxonomy.slice_of("kinds")].any()) for _, targets in rows
    ]
    assert sum(kinds) == pytest.approx(0.6 * len(rows), abs=1)
    assert stage.plan.drawn(WINDOW).tolist() == [len(rows) - sum(kinds), sum(kinds)]
    counts = Counter(rows)
    assert len(counts) == NUM_TEXTS  # every record is drawn, and about equally often within its task
    for kind in (False, True):
        of_kind = [counts[row] for row, its in zip(rows, kinds, strict=True) if its is kind]
        assert max(of_kind) - min(of_kind) <= 1


@both
@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_processes_share_each_batch(folder: Path, make: Make, num_processes: int) -> None:
    whole = make(folder)
    parts = [part_of(make, folder, i, num_processes) for i in range(num_processes)]
    assert {part.fingerprint for part in parts} == {whole.fingerprint}
    for step in range(whole.num_steps):
        made = [part.batch(step) for part in parts]
        joined = [np.concatenate([getattr(b, name) for b in made]) for name in FIELDS]
        assert_equal(Batch(*joined), whole.batch(step))


def test_the_seed_decides_the_order(folder: Path) -> None:
    assert_equal(batches_of(folder).batch(5), batches_of(folder).batch(5))
    assert rows_of([batches_of(folder, seed=4).batch(5)]) != rows_of([batches_of(folder).batch(5)])


@both
def test_going_on_after_any_step_is_as_if_nothing_had_been(folder: Path, make: Make) -> None:
    expected = list(make(folder).iterate())
    for step in (0, 1, 11, 20, 39, 40):
        iterator = make(folder).iterate()
        list(itertools.islice(iterator, step))
        state = json.loads(json.dumps(iterator.get_state()))
        iterator.close()
        resumed = make(folder).iterate()
        next(resumed)  # a position may be set after iteration has begun
        resumed.set_state(state)
        rest = list(resumed)
        assert len(rest) == len(expected) - step
        for left, right in zip(rest, expected[step:], strict=True):
            assert_equal(left, right)


@both
def test_a_position_goes_over_to_another_number_of_processes(folder: Path, make: Make) -> None:
    expected = list(make(folder).iterate())
    two = [part_of(make, folder, i, 2).iterate() for i in range(2)]
    for _ in range(7):
        states = [next(iterator) and iterator.get_state() for iterator in two]
    assert states[0] == states[1]
    three = [part_of(make, folder, i, 3).iterate() for i in range(3)]
    for iterator in three:
        iterator.set_state(states[0])
    for step in range(7, len(expected)):
        assert rows_of([next(iterator) for iterator in three]) == rows_of([expected[step]])


@both
def test_workers_lose_and_double_nothing(folder: Path, make: Make) -> None:
    expected = list(make(folder).iterate())
    iterator = make(folder).iterate(num_workers=2, ahead=3)
    with contextlib.closing(iterator):
        for batch in expected[:9]:
            assert_equal(next(iterator), batch)
        state = iterator.get_state()  # by now the workers have prefetched several batches
    resumed = part_of(make, folder, 1, 2).iterate(num_workers=1)
    resumed.set_state(state)
    with contextlib.closing(resumed):
        for batch in expected[9:13]:
            half = Batch(*(getattr(batch, name)[6:] for name in FIELDS))
            assert_equal(next(resumed), half)


def test_a_position_in_other_data_is_refused(folder: Path) -> None:
    state = batches_of(folder).iterate().get_state()
    for changes in ({"seed": 4}, {"batch_size": 24}, {"window": 140}, {"buckets": (64,)}):
        with pytest.raises(InputError, match="other examples, labels, tokens, seed"):
            batches_of(folder, **changes).iterate().set_state(state)
    state_of_stage = stage_of(folder).iterate().get_state()
    for changes in ({"seed": 4}, {"stage": 0}, {"shares_T": np.array([0.5, 0.5])}, {"buckets": (64,)}):
        with pytest.raises(InputError, match="other examples, labels, tokens, seed"):
            stage_of(folder, **changes).iterate().set_state(state_of_stage)
    batches_of(folder, num_epochs=5).iterate().set_state(state)
    with pytest.raises(InputError, match="ends after 40"):
        batches_of(folder).iterate().set_state(state | {"next_step": 41})


def test_what_cannot_be_read_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest.json"):
        Shards(tmp_path)
    with pytest.raises(InputError, match="no texts in the split 'dev'"):
        Shards(folder, "dev")
    for make in (batches_of, stage_of):
        with pytest.raises(InputError, match="the largest bucket holds 32"):
            make(folder, buckets=(16, 32))


def test_shards_that_do_not_say_their_records_tasks_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "old")
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]["shards"]:
        del shard["tasks"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="by an older Classer; remove it and prepare the data anew"):
        Shards(tmp_path / "old")
