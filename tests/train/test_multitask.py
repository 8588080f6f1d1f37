"""Several tasks in one model, end to end: folders in, a curriculum, soft labels, one bundle that answers all."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from classer.data.soft_labels import read_vectors, vectors_file
from classer.model.bundle import load_bundle, save_bundle
from classer.model.classifier import TextClassifier
from classer.model.quantize import unflatten
from classer.tests.helpers import (
    CURRICULUM,
    TOPICS,
    TREE,
    compiled,
    printed,
    rows_trained_on,
    write_encoder,
    write_task,
)
from classer.tools.cli.main import main
from classer.train.config import Recipe, TrainJob
from classer.train.datasets import load_dataset
from classer.train.run import TrainResult, train
from classer.train.trainer import Trainer


@pytest.fixture(scope="module")
def job(tiny_encoder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    recipe = Recipe(
        encoder=str(tiny_encoder), max_length=16, batch_size=16, learning_rate=1e-3, curriculum=CURRICULUM, patience=0
    )
    return TrainJob(data=tasks, out=tmp_path_factory.mktemp("multitask") / "run", recipe=recipe, baseline=True)


class Watched(NamedTuple):
    """The finished run, how many rows of each task its stages were trained on, and what was compiled."""

    result: TrainResult
    rows: dict[str, Counter[int]]
    programs: list[str]


@pytest.fixture(scope="module")
def watched(job: TrainJob) -> Watched:
    with rows_trained_on() as rows, compiled() as programs:
        return Watched(train(job), rows, programs)


@pytest.fixture(scope="module")
def finished(watched: Watched) -> TrainResult:
    return watched.result


def test_all_stages_share_one_compiled_step_for_each_bucket(watched: Watched) -> None:
    """Texts of 16 tokens at most have one bucket."""
    assert watched.programs.count("jit(step)") == 1


def test_one_model_learns_all_tasks_by_the_curriculum(job: TrainJob, finished: TrainResult, watched: Watched) -> None:
    assert [scores.task for scores in finished.tasks] == ["topic", "topics", "where"]
    for scores in finished.tasks:
        assert (scores.split, scores.float_metrics.n) == ("test", 40)
        assert scores.float_metrics.micro_f1 > 0.75, scores.task
        assert scores.baseline is not None
    bundle = load_bundle(job.out / "bundle")
    assert bundle.taxonomy.task("where") == TREE
    assert bundle.taxonomy.num_labels == 2 + 3 + 5
    assert set(bundle.calibration) == {"topic", "topics", "where"}
    for name in ("topic", "topics", "where"):
        assert (job.out / "results" / name / "report.md").is_file()
    counts = json.loads((job.out / "stages" / "curriculum.json").read_text())
    names = ("topic", "topics", "where")
    assert counts == {stage: {name: rows[i] for i, name in enumerate(names)} for stage, rows in watched.rows.items()}
    assert counts["first"]["topics"] == counts["first"]["where"] == 0
    share = counts["second"]["topic"] / sum(counts["second"].values())
    assert share == pytest.approx(0.2, abs=0.01)
    assert (job.out / "stages" / "curriculum.png").is_file()
    assert (job.out / "stages" / "second" / "metrics.jsonl").is_file()


def test_the_bundle_is_evaluated_by_task(
    job: TrainJob, finished: TrainResult, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(job.out / "bundle-float32")
    assert main(["evaluate", bundle, "--data", str(tasks / "where"), "--task", "where"]) == 0
    assert f"accuracy {finished.tasks[2].float_metrics.accuracy:.2%}" in capsys.readouterr().out
    # Nothing is so sure: every answer stops at the top of the tree, where no example was labelled.
    assert main(["evaluate", bundle, "--data", str(tasks / "where"), "--task", "where", "--threshold", "1.1"]) == 0
    assert "accuracy 0.00%" in capsys.readouterr().out
    assert main(["evaluate", bundle, "--data", str(tasks / "where")]) == 2
    assert "several tasks; name one with --task: topic, topics, where" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_stopped_between_stages_goes_on_to_the_same_weights(
    job: TrainJob, finished: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    again = dataclasses.replace(job, out=tmp_path / "run", baseline=False)
    with monkeypatch.context() as patched:
        real = Trainer.run

        def stop_after_first(trainer, phase, weights):
            if phase.folder.name == "second":
                raise Stopped
            return real(trainer, phase, weights)

        patched.setattr(Trainer, "run", stop_after_first)
        with pytest.raises(Stopped):
            train(again)
    resumed = train(dataclasses.replace(again, resume=True))
    for name, value in resumed.float_bundle.weights.items():
        np.testing.assert_array_equal(value, finished.float_bundle.weights[name], err_msg=name)
    drawn = "stages/curriculum.json"
    assert (again.out / drawn).read_text() == (job.out / drawn).read_text()


def test_a_bundle_teaches_and_its_answers_are_learnt_from(
    job: TrainJob, finished: TrainResult, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft = tmp_path / "soft.jsonl"
    bundle = str(job.out / "bundle-float32")
    sure = finished.float_bundle
    unsure = {name: 0.1 * value if name.startswith("head.") else value for name, value in sure.weights.items()}
    second = save_bundle(dataclasses.replace(sure, weights=unsure), tmp_path / "second")
    command = ["teach", "--teacher", bundle, str(second.path), "--weights", "3", "1", "--data", str(tasks / "where")]
    assert main([*command, "--out", str(soft)]) == 0
    rows = [json.loads(line) for line in soft.read_text().splitlines()]
    ids = sure.tokenizer.encode([row["text"] for row in rows], sure.max_length).ids
    one_NL, other_NL = (teacher.probabilities("where", teacher.predictor().logits(ids)) for teacher in (sure, second))
    assert np.abs(one_NL - other_NL).max() > 0.1
    for row, probs_L in zip(rows, 0.75 * one_NL + 0.25 * other_NL, strict=True):
        expected = {name: probs_L[TREE.index[name]] for name in row["probabilities"]}
        assert row["probabilities"] == pytest.approx(expected, abs=3e-4)
    assert len({row["text"] for row in rows}) == len(rows)
    assert all(set(row["probabilities"]) <= {"food", "sport", "weather"} for row in rows)
    assert main([*command, "--out", str(soft)]) == 2
    assert "exists already and was not touched" in capsys.readouterr().err

    # A student that is told nothing but what the teacher says: the labels of the training file are shifted by one.
    folder = tmp_path / "student"
    write_task(folder.parent, dataclasses.replace(TREE, name="student"), train=1, test=40, dev=40)
    names = ["food", "sport", "weather"]
    wrong = [{"text": row["text"], "label": names[(i + 1) % 3]} for i, row in enumerate(rows)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    told = [{key: value for key, value in row.items() if key != "task"} for row in rows]
    soft.write_text("".join(json.dumps(row) + "\n" for row in told))
    recipe = dataclasses.replace(
        job.recipe, curriculum=(), epochs=12, learning_rate=3e-3, soft_share=1.0, dev_fraction=0.1
    )
    student = TrainJob(data=folder, out=tmp_path / "run", recipe=recipe, soft_labels=soft)
    assert train(student).tasks[0].float_metrics.accuracy > 0.9
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    of_teacher = [step["teacher_loss"] for step in logged if "teacher_loss" in step]
    assert len(of_teacher) == sum("loss" in step for step in logged)
    assert min(of_teacher[-5:]) < of_teacher[0]


def test_teachers_of_two_kinds_teach_their_relations(
    job: TrainJob, finished: TrainResult, tasks: Path, tiny_encoder: Path, tmp_path: Path, capsys
) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig.from_pretrained(tiny_encoder, id2label=dict(enumerate(sorted(TOPICS))))
    model = transformers.BertForSequenceClassification(config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_encoder)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "bert")
    teachers = [str(job.out / "bundle-float32"), str(tmp_path / "bert")]
    data, soft, out = tasks / "where", tmp_path / "soft.jsonl", tmp_path / "run"
    teach = ["teach", "--teacher", *teachers, "--weights", "3", "1", "--data", str(data), "--out", str(soft)]
    assert main([*teach, "--relations"]) == 0

    # Inner products are the weighted mean of the teachers' cosine similarities, each text by itself.
    vectors = read_vectors(soft)
    texts = sorted(vectors, key=len)[:: len(vectors) // 5]
    bundle = finished.float_bundle
    classifier, pooled = TextClassifier(bundle.encoder, bundle.taxonomy.num_labels), []
    for text in texts:
        ids = bundle.tokenizer.encode([text], 16).ids[0]
        inputs = {"params": unflatten(bundle.weights)}, ids[None], np.array([len(ids)])
        with torch.no_grad():
            hidden_SD = model.bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        pooled.append((np.asarray(classifier.apply(*inputs, method="with_pooled")[1])[0], hidden_SD.mean(axis=0)))
    units = [np.array([x / np.linalg.norm(x) for x in of_teacher]) for of_teacher in zip(*pooled, strict=True)]
    cosines_NN = 0.75 * units[0] @ units[0].T + 0.25 * units[1] @ units[1].T
    found_NV = np.array([vectors[text] for text in texts], np.float32)
    np.testing.assert_allclose(found_NV @ found_NV.T, cosines_NN, atol=2e-3)

    # Not the encoder that its first teacher began as, whose relations it would all but have; and little else to learn.
    student = write_encoder(tmp_path / "student", seed=1)
    options = ["--data", str(data), "--encoder", str(student), "--max-length", "16", "--batch-size", "16"]
    train_command = ["train", *options, "--epochs", "5", "--learning-rate", "3e-3", "--relation-share", "200"]
    assert main([*train_command, "--out", str(out)]) == 2
    assert "relation_share needs teachers' vectors" in capsys.readouterr().err
    train_command += ["--soft-labels", str(soft)]
    assert main([*train_command, "--out", str(out)]) == 0
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [step["relation_loss"] for step in logged if "loss" in step]
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses
    said = capsys.readouterr().out
    who = json.loads((out / "job.json").read_text())["teachers"]
    assert [(teacher["name"], teacher["weight"]) for teacher in who] == [(teachers[0], 0.75), (teachers[1], 0.25)]
    for teacher in who:
        line = f"{teacher['name']}: a mean loss of {teacher['loss']:.3f} nats on the {len(vectors)} texts with labels."
        assert f"Teacher {line}" in said
    student, trees = load_bundle(out / "bundle-float32"), list(out.glob("checkpoints/*/state/_METADATA"))
    assert trees
    for tree in trees:
        kept = list(map(ast.literal_eval, json.loads(tree.read_text())["tree_metadata"]))
        assert {part for part, *_ in kept} == {"params", "opt_state", "step"}
        assert {".".join(name) for part, *name in kept if part == "params"} == set(student.weights)

    vectors_file(soft).write_bytes(b"PK")
    assert main([*train_command, "--out", str(tmp_path / "other")]) == 2
    assert f"{vectors_file(soft)} cannot be read as vectors" in capsys.readouterr().err
    vectors_file(soft).unlink()
    assert main([*train_command, "--out", str(tmp_path / "other")]) == 2
    assert f"{vectors_file(soft)} is not there" in (err := capsys.readouterr().err)
    assert f"`classer teach` makes it with --relations and --out {soft}." in err


def test_a_task_in_yaml_is_the_same_task(tasks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "where"
    folder.mkdir()
    (folder / "task.yaml").write_text(
        "name: where\nkind: hierarchical\nlabels:\n"
        "- name: inside\n- {name: food, parent: inside}\n- name: outside\n"
        "- {name: sport, parent: outside}\n- {name: weather, parent: outside}\n"
    )
    (folder / "train.jsonl").write_text((tasks / "where" / "train.jsonl").read_text())
    dataset = load_dataset(TrainJob(data=folder, out=tmp_path / "run"))
    assert dataset.taxonomy.tasks == (TREE,)


def test_folders_without_training_examples_are_left_out_and_named(tasks: Path, tmp_path: Path) -> None:
    job = TrainJob(data=tasks, out=tmp_path / "run", texts=50, held_out_texts=10)
    dataset, said = printed(lambda: load_dataset(job))
    assert [task.name for task in dataset.taxonomy.tasks] == ["topic", "topics", "where"]
    assert any("later has no split 'train' and is left out" in sentence for sentence in said)
    assert {name: len(examples) for name, examples in dataset.test.items()} == dict.fromkeys(dataset.test, 10)
    assert all(len(dataset.train[name]) + len(dataset.dev[name]) <= 50 for name in dataset.train)
