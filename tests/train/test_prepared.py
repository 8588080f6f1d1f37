"""Training on what `classer prepare` made: tokenised shards, read as they are needed."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classer.data.errors import InputError
from classer.data.pipeline import Batches
from classer.data.prepare.local import prepare
from classer.data.prepare.plan import PrepareConfig, PreparePlan
from classer.data.shards import Shards
from classer.data.taxonomy import TaskKind
from classer.data.tokenizer import WordPieceTokenizer
from classer.model.bundle import load_bundle
from classer.model.decode import Calibration
from classer.model.focus import Focus
from classer.tests.helpers import TOY_LENGTH, VOCAB, no_progress, rows_trained_on, write_shards, write_toy_data
from classer.train.config import CurriculumStage, Recipe, TrainJob
from classer.train.evaluation import measure
from classer.train.prepared import decoded_text, is_prepared, load_splits
from classer.train.run import run_job, train

CURRICULUM = (
    CurriculumStage("flat", kinds=("multiclass",), epochs=4),
    CurriculumStage("many", kinds=("multilabel",), epochs=12, replay=0.4),
)


@pytest.fixture(scope="module")
def shards(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("prepared"), tiny_encoder)


def job_of(shards: Path, out: Path, tiny_encoder: Path, **recipe: Any) -> TrainJob:
    options = {
        "max_length": TOY_LENGTH,
        "epochs": 6,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "patience": 0,
        **recipe,
    }
    return TrainJob(data=shards, out=out, recipe=Recipe(encoder=str(tiny_encoder), **options))


def test_a_classifier_is_trained_on_shards(shards: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    result = train(job_of(shards, tmp_path / "run", tiny_encoder))
    assert [(scores.task, scores.split) for scores in result.tasks] == [("toy", "dev"), ("tags", "dev")]
    assert result.tasks[0].float_metrics.accuracy > 0.9
    assert result.tasks[1].float_metrics.micro_f1 > 0.7
    dev = Shards(shards, "dev")
    assert sum(scores.float_metrics.n for scores in result.tasks) == len(dev)
    bundle = load_bundle(tmp_path / "run" / "bundle")  # whose golden texts are answered as they were
    assert len(bundle.golden_texts) == 8
    assert f"on {len(Shards(shards)):,} examples" in bundle.card
    assert "toy" in (tmp_path / "run" / "results" / "toy" / "report.md").read_text()


def test_workers_make_the_same_batches(shards: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    jobs = [
        dataclasses.replace(job_of(shards, tmp_path / str(workers), tiny_encoder, epochs=1), input_workers=workers)
        for workers in (0, 2)
    ]
    alone, workers = (train(job).float_bundle.weights for job in jobs)
    assert all(np.array_equal(alone[name], workers[name]) for name in alone)
    text = tmp_path / "text.csv"
    text.write_text("text,label\n", encoding="utf-8")
    with pytest.raises(InputError, match="no prepared data"):
        train(dataclasses.replace(jobs[1], data=text, out=tmp_path / "none"))


def test_a_curriculum_is_trained_on_shards(shards: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    job = job_of(shards, tmp_path / "run", tiny_encoder, curriculum=CURRICULUM)
    with rows_trained_on() as rows:
        result = train(job)
    assert result.tasks[0].float_metrics.accuracy > 0.9
    assert result.tasks[1].float_metrics.micro_f1 > 0.7
    drawn = json.loads((job.out / "stages" / "curriculum.json").read_text())
    sizes = [len(numbers) for numbers in Shards(shards).numbers_T]
    assert drawn["flat"] == {"toy": pytest.approx(4 * sizes[0], abs=32), "tags": 0}
    assert drawn["many"]["tags"] == pytest.approx(12 * sizes[1], abs=200)
    assert drawn["many"]["toy"] == pytest.approx(0.4 * sum(drawn["many"].values()), rel=0.05)
    assert drawn == {stage: {"toy": of[0], "tags": of[1]} for stage, of in rows.items()}


def test_a_classifier_on_shards_learns_to_focus(shards: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    result = train(job_of(shards, tmp_path / "run", tiny_encoder, focus_epochs=6))
    assert (tmp_path / "run" / "focus" / "metrics.jsonl").is_file()
    checkpoints = [path for path in (tmp_path / "run" / "focus" / "checkpoints").iterdir() if path.is_dir()]
    for checkpoint in checkpoints:  # the dense classifier, which teaches, is in none
        tree = json.loads((checkpoint / "state" / "_METADATA").read_text())["tree_metadata"]
        tops = Counter(ast.literal_eval(path)[0] for path in tree)
        assert set(tops) == {"params", "opt_state", "step"}
        assert tops["params"] == len(result.float_bundle.weights)
        assert tops["opt_state"] - 2 * tops["params"] <= 4  # two moments each, and counts
    dev = load_splits(job_of(shards, tmp_path, tiny_encoder), Shards(shards))["dev"]["toy"]
    focus = Focus.pyramid(0.5, result.float_bundle.encoder.num_layers)
    taxonomy = result.float_bundle.taxonomy
    logits_NL = result.float_bundle.predictor(focus=focus).logits(dev.ids, columns=taxonomy.slice_of("toy"))
    assert measure(taxonomy.task("toy"), logits_NL, dev.targets_NL, Calibration()).accuracy > 0.85


def test_labels_weigh_the_same_in_all(shards: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    loaded = Shards(shards)
    assert loaded.rows_T.tolist() == [task["rows"] for task in manifest["tasks"]]
    assert loaded.rows_T.sum() == len(loaded) + len(Shards(shards, "dev"))
    assert loaded.label_counts_L[loaded.taxonomy.slice_of("toy")].sum() == loaded.rows_T[0]
    plain, balanced = (
        train(job_of(shards, tmp_path / weights, tiny_encoder, epochs=1, class_weights=weights)).float_bundle
        for weights in ("none", "balanced")
    )
    assert any((plain.weights[name] != balanced.weights[name]).any() for name in plain.weights)


@pytest.mark.parametrize(
    "recipe",
    [{"epochs": 2}, {"epochs": 1, "focus_epochs": 1}, {"curriculum": CURRICULUM}],
)
def test_a_run_that_was_stopped_goes_on_with_the_next_batch(
    shards: Path,
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: dict[str, Any],
) -> None:
    """Cut off after a checkpoint within an epoch: the weights are in the end those of a run that was not."""
    whole = train(job_of(shards, tmp_path / "whole", tiny_encoder, **recipe))
    job = dataclasses.replace(job_of(shards, tmp_path / "cut", tiny_encoder, **recipe), save_steps=5)
    real, steps = Batches.batch, []

    def batch(batches: Any, step: int) -> Any:
        steps.append(step)
        if len(steps) == 30:
            raise OSError("the disk is gone")
        return real(batches, step)

    monkeypatch.setattr(Batches, "batch", batch)
    with pytest.raises(OSError, match="the disk is gone"):
        run_job(job)
    monkeypatch.undo()
    resumed = train(dataclasses.replace(job, resume=True))
    for name, value in whole.float_bundle.weights.items():
        np.testing.assert_array_equal(resumed.float_bundle.weights[name], value, err_msg=name)
    if "curriculum" in recipe:
        drawn = "stages/curriculum.json"
        assert (job.out / drawn).read_text() == (tmp_path / "whole" / drawn).read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test": Path("x.csv")}, "no --test: measure the bundle afterwards"),
        ({"baseline": True}, "no --baseline: it needs texts"),
        ({"soft_labels": Path("x.jsonl")}, "no --soft-labels"),
        (
            {"recipe": Recipe(max_length=64)},
            f"prepared for texts of {TOY_LENGTH} tokens; train with --max-length {TOY_LENGTH}",
        ),
    ],
)
def test_what_needs_texts_is_refused(
    shards: Path, tiny_encoder: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    job = dataclasses.replace(job_of(shards, tmp_path / "run", tiny_encoder), **changes)
    with pytest.raises(InputError, match=says):
        train(job)
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    vocab = tmp_path / "other" / "vocab.txt"
    vocab.write_text("".join(f"{token}\n" for token in (*VOCAB, "another")))
    WordPieceTokenizer(vocab).save(tmp_path / "other")
    job = job_of(write_shards(tmp_path, tmp_path / "other"), tmp_path / "run", tiny_encoder)
    with pytest.raises(InputError, match="tokenised with another vocabulary"):
        train(job)


def test_a_task_without_texts_for_development_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    rare = [{"text": text, "label": text} for text in ("rain", "storm")]
    (tmp_path / "rare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rare))
    toy = write_toy_data(tmp_path / "toy.jsonl", TaskKind.MULTICLASS, 300)
    config = PrepareConfig(dev_fraction=0.05, near_duplicates=0, max_length=TOY_LENGTH)
    plan = PreparePlan.make(config, [toy, tmp_path / "rare.jsonl"], [], tiny_encoder, tmp_path / "shards")
    prepare(plan, progress=no_progress)
    with pytest.raises(InputError, match="no examples of the task 'rare' for development"):
        train(job_of(tmp_path / "shards", tmp_path / "run", tiny_encoder))


def test_a_tasks_folder_with_a_manifest_of_its_own_is_not_taken_for_shards(tmp_path: Path) -> None:
    job = TrainJob(data=tmp_path, out=tmp_path / "run")
    assert not is_prepared(job)
    (tmp_path / "manifest.json").write_text("{}")
    assert is_prepared(job)
    (tmp_path / "task.json").write_text("{}")
    assert not is_prepared(job)


def test_a_text_is_made_of_its_tokens(tiny_encoder: Path) -> None:
    tokenizer = WordPieceTokenizer.from_folder(tiny_encoder)
    (ids,) = tokenizer.encode(["my card has not arrived"], TOY_LENGTH).ids
    text = decoded_text(ids, tokenizer)
    assert tokenizer.encode([text], TOY_LENGTH).ids[0].tolist() == ids.tolist()
