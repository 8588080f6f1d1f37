"""Several tasks in one model, end to end: folders in, a curriculum, soft labels, one bundle that answers all."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from classer.data.errors import InputError
from classer.data.examples import Example
from classer.data.soft_labels import read_soft_labels, read_vectors, vectors_file, write_soft_labels
from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.model.bundle import load_bundle, save_bundle
from classer.model.classifier import TextClassifier
from classer.model.decode import Calibration, probabilities
from classer.model.quantize import variables
from classer.tests.helpers import TOPICS, compiled, rows_trained_on, toy_text, write_encoder, write_toy_data
from classer.tests.strategies import trees
from classer.tools.cli import main
from classer.train.config import CurriculumStage, Recipe, TrainJob, read_curriculum
from classer.train.curriculum import plan_curriculum
from classer.train.datasets import load_dataset
from classer.train.evaluation import TokenizedSplit, join, soften, tokenize
from classer.train.losses import SoftTargets, classification_loss
from classer.train.presets import multitask
from classer.train.run import TrainResult, train

TREE = Task(
    "where",
    TaskKind.HIERARCHICAL,
    (
        Label("inside"),
        Label("food", parent="inside"),
        Label("outside"),
        Label("sport", parent="outside"),
        Label("weather", parent="outside"),
    ),
)
CURRICULUM = (
    CurriculumStage("first", kinds=("binary",), epochs=4),
    CurriculumStage(
        "second",
        kinds=("multilabel",),
        tasks=("where",),
        replay=0.2,
        weights={"topics": 3},
        epochs=30,
        learning_rate=3e-3,
    ),
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks and one that can only be evaluated."""
    folder = tmp_path_factory.mktemp("tasks")
    topics = tuple(map(Label, TOPICS))
    for task in (Task("topic", TaskKind.BINARY, topics[:2]), Task("topics", TaskKind.MULTILABEL, topics), TREE):
        write_task(folder, task, train=200, test=40)
    write_task(folder, Task("later", TaskKind.BINARY, topics[:2]), test=10)
    (folder / "notes").mkdir()
    return folder


def write_task(folder: Path, task: Task, **splits: int) -> None:
    (folder / task.name).mkdir()
    (folder / task.name / "task.json").write_text(json.dumps(task.to_json()))
    kind = TaskKind.MULTICLASS if task.kind is TaskKind.HIERARCHICAL else task.kind
    for seed, (split, count) in enumerate(splits.items()):
        write_toy_data(folder / task.name / f"{split}.jsonl", kind, count, seed=seed)


@pytest.fixture(scope="module")
def job(tiny_encoder: Path, tasks: Path) -> TrainJob:
    recipe = Recipe(
        encoder=str(tiny_encoder), max_length=16, batch_size=16, learning_rate=1e-3, curriculum=CURRICULUM, patience=0
    )
    return TrainJob(data=tasks, out=tasks.parent / "run", recipe=recipe, baseline=True)


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
    from classer.train import loop

    class Stopped(Exception):
        pass

    again = dataclasses.replace(job, out=tmp_path / "run", baseline=False)
    with monkeypatch.context() as patched:
        real = loop._fit_part

        def stop_after_first(part, *arguments):
            if part.folder.name == "second":
                raise Stopped
            return real(part, *arguments)

        patched.setattr(loop, "_fit_part", stop_after_first)
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
        inputs = variables(bundle.weights, "float32"), ids[None], np.array([len(ids)])
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


def test_texts_of_dev_and_test_are_no_soft_examples(tasks: Path, tmp_path: Path) -> None:
    test_text = json.loads((tasks / "topic" / "test.jsonl").read_text().splitlines()[0])["text"]
    train_text = json.loads((tasks / "topic" / "train.jsonl").read_text().splitlines()[0])["text"]
    soft = tmp_path / "soft.jsonl"
    answers = [(test_text, 0.5), ("a new text", 0.5), (train_text, 1.0)]
    soft.write_text(
        "".join(json.dumps({"text": text, "probabilities": {"food": p, "sport": 1 - p}}) + "\n" for text, p in answers)
    )
    said: list[str] = []
    job = TrainJob(data=tasks / "topic", out=tmp_path / "run", soft_labels=soft)
    dataset = load_dataset(job, said.append)
    assert said[-1].endswith("1 texts without other labels; 1 left out, which are to be measured on.")
    extra = [example for example in dataset.train["topic"] if not example.labels]
    assert [(example.text, example.soft) for example in extra] == [("a new text", {"food": 0.5, "sport": 0.5})]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"probabilities": {"food": 1}}, "'text' must be a text"),
        ({"text": "x", "probabilities": [1]}, "'probabilities' must be an object of numbers by label"),
        ({"text": "x", "probabilities": {"drink": 1}}, "the task 'where' has no label 'drink'"),
        ({"text": "x", "probabilities": {"food": 1.5}}, "the probability of 'food' must lie between 0 and 1"),
        ({"text": "x", "probabilities": {"food": True}}, "the probability of 'food' must lie between 0 and 1"),
        ({"text": "x", "probabilities": {"food": 0.5}}, r"sum to 0\.500; they must sum to 1 \(of hierarchical"),
        ({"text": "x", "task": "who", "probabilities": {"food": 1}}, "there is no task 'who', only where"),
    ],
)
def test_soft_labels_that_are_none_are_refused_with_their_row(tmp_path: Path, row: dict, message: str) -> None:
    file = tmp_path / "soft.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"soft\.jsonl, line 1: .*{message}"):
        read_soft_labels(file, Taxonomy((TREE,)))


def test_soft_labels_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "soft.jsonl"
    probs_NL = np.array([[0.7, 0.7, 0.3, 0.29999, 0.00001]], np.float32)  # inside, food, outside, sport, weather
    write_soft_labels(file, TREE, ["x"], probs_NL)
    ((key, answer),) = read_soft_labels(file, Taxonomy((TREE,))).items()
    assert key == ("where", "x")
    assert answer == pytest.approx({"food": 0.7, "sport": 0.3}, abs=1e-4)


def test_softening_is_dividing_the_teachers_logits(tiny_bundle) -> None:
    rng = np.random.default_rng(0)
    logits_NL = rng.normal(0, 3, (4, 3))
    for kind in (TaskKind.MULTICLASS, TaskKind.MULTILABEL):
        task = Task("t", kind, tuple(map(Label, "abc")))

        def answers(scale: float, exclusive: bool = kind.exclusive) -> np.ndarray:
            exp_NL = np.exp(logits_NL / scale)
            return exp_NL / exp_NL.sum(1, keepdims=True) if exclusive else exp_NL / (1 + exp_NL)

        rows = [Example("x", (), "t", soft=dict(zip("abc", row.tolist(), strict=True))) for row in answers(1.0)]
        split = tokenize(task, rows, tiny_bundle.tokenizer, 8)
        assert split.soft is not None
        np.testing.assert_allclose(soften(task, split.soft, 2.5).toarray(), answers(2.5), rtol=1e-4)


def test_of_very_many_labels_about_as_likely_as_each_other_some_are_written(tmp_path: Path) -> None:
    task = Task("t", TaskKind.MULTICLASS, tuple(Label(f"l{i}") for i in range(20_000)))
    probs_NL = np.full((1, 20_000), 1 / 20_000)
    probs_NL[0, 7], probs_NL[0, 8] = 9e-5, 1e-6
    file = tmp_path / "soft.jsonl"
    write_soft_labels(file, task, ["x"], probs_NL)
    (answer,) = read_soft_labels(file, Taxonomy((task,))).values()
    assert max(answer, key=lambda label: answer[label]) == "l7"
    assert len(answer) == 19_999
    assert answer["l0"] == pytest.approx(5e-5, rel=0.1)


flat = st.sampled_from(
    [Task("t", kind, tuple(map(Label, "abc"))) for kind in (TaskKind.MULTICLASS, TaskKind.MULTILABEL)]
)


@settings(deadline=None, max_examples=15)
@given(flat | trees(), st.integers(0, 99))
def test_a_student_with_its_teachers_logits_has_nothing_to_learn(task: Task, seed: int) -> None:
    logits_NL = np.random.default_rng(seed).normal(0, 2, (3, len(task.labels))).astype(np.float32)
    probs_NL = np.where(task.leaves_L, probabilities(task, logits_NL, Calibration()), 0)
    taxonomy, ones = Taxonomy((task,)), jnp.ones(3)
    split = TokenizedSplit([np.zeros(2, np.int32)] * 3, csr_array((3, len(task.labels)), dtype=np.float32))
    split = dataclasses.replace(split, soft=csr_array(probs_NL), has_soft_N=np.ones(3, bool))

    @jax.grad
    def gradient(logits_BL, soft_BL, temperature):
        soft = SoftTargets(soft_BL, ones)
        tasks_B, targets_BL = jnp.zeros(3, jnp.int32), jnp.zeros_like(logits_BL)
        return classification_loss(
            taxonomy.table, logits_BL, targets_BL, tasks_B, ones, soft=soft, temperature=temperature
        )

    for temperature in (1.0, 2.0):
        soft = join(taxonomy, {"t": split}, soft_share=1.0, temperature=temperature).soft
        assert soft is not None
        gradient_BL = gradient(jnp.asarray(logits_NL), jnp.asarray(soft.toarray()), temperature)
        np.testing.assert_allclose(gradient_BL, 0, atol=1e-5)


def test_what_lies_below_a_label_has_as_much_of_it_once_softened() -> None:
    """Also of answers that stop at inner labels."""
    probs_NL = np.array([[0.2, 0.5, 0.0, 0.1, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.9, 0.1]])
    soft_NL = soften(TREE, csr_array(probs_NL), 2.0).toarray()
    # inside 0.7 of which food 5/7, outside 0.3 of which all goes on to sport and weather, 1 to 2
    inside, sport = 0.7**0.5 / (0.7**0.5 + 0.3**0.5), 1 / (1 + 2**0.5)
    first = [inside * 2 / 7, inside * 5 / 7, 0, (1 - inside) * sport, (1 - inside) * (1 - sport)]
    np.testing.assert_allclose(soft_NL, [first, [0] * 5, [0, 0, 0, 0.75, 0.25]], rtol=1e-5)


def test_joined_examples_have_their_tasks_columns(tiny_bundle) -> None:
    taxonomy = tiny_bundle.taxonomy
    topic, tags = taxonomy.tasks

    def split(task: Task, *labels: tuple[str, ...]) -> TokenizedSplit:
        return tokenize(task, [Example("bread", of_row, task.name) for of_row in labels], tiny_bundle.tokenizer, 8)

    joined = join(taxonomy, {"topic": split(topic, ("topic 3",)), "tags": split(tags, (), ("angry", "spam"))})
    assert joined.tasks_N.tolist() == [0, 1, 1]
    assert joined.vectors_NV is None
    assert [np.flatnonzero(row).tolist() for row in joined.targets.toarray()] == [[3], [], [8, 9]]

    known = Example("soup", ("spam",), "tags", vector=np.array([0.5, 2], np.float16))
    tagged = tokenize(tags, [Example("bread", (), "tags"), known], tiny_bundle.tokenizer, 8)
    joined = join(taxonomy, {"topic": split(topic, ("topic 3",)), "tags": tagged})
    assert joined.vectors_NV is not None
    assert joined.vectors_NV.tolist() == [[0, 0], [0, 0], [0.5, 2]]


# Curricula


def planned(*stages: CurriculumStage, sizes: tuple[int, ...] = (100, 300, 100)):
    topics = tuple(map(Label, TOPICS))
    tasks = (Task("topic", TaskKind.BINARY, topics[:2]), Task("topics", TaskKind.MULTILABEL, topics), TREE)
    return plan_curriculum(stages, Taxonomy(tasks), sizes, 10)


def test_a_stage_is_as_long_as_its_epochs_and_replays_on_top() -> None:
    first, second = planned(*CURRICULUM)
    assert (first.tasks, first.new, first.seen) == (("topic",), ("topic",), ("topic",))
    assert (first.num_steps, first.looks) == (40, 4)
    assert second.new == ("topics", "where")
    assert second.seen == ("topic", "topics", "where")
    np.testing.assert_allclose(second.shares_T, [0.2, 0.72, 0.08])
    assert second.num_steps == pytest.approx(30 * 400 / 0.8 / 10, abs=30)


def test_a_stage_in_steps_without_names_is_for_all_tasks() -> None:
    (only,) = planned(CurriculumStage("all", steps=7, weights={"topic": 3}))
    assert (only.num_steps, only.looks) == (7, 1)
    np.testing.assert_allclose(only.shares_T, np.array([300, 300, 100]) / 700)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([CurriculumStage("a", tasks=("topix",))], "Stage 'a' names the task 'topix'; there are 'topic', 'topics'"),
        ([CurriculumStage("a", kinds=("multiclass",))], "for 'multiclass' tasks, but there is none"),
        ([CurriculumStage("a", replay=0.5)], "Stage 'a' replays tasks of earlier stages, but there are none"),
        ([CurriculumStage("a", kinds=("binary",))], "No stage of the curriculum trains 'topics', 'where'"),
    ],
)
def test_a_curriculum_that_does_not_fit_the_tasks_is_refused(stages: list[CurriculumStage], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(*stages)


def test_the_preset_trains_where_some_kinds_have_no_task(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("one", "two"):
        write_task(tmp_path / "data", Task(name, TaskKind.MULTICLASS, tuple(map(Label, TOPICS))), train=60, dev=20)
    recipe = dataclasses.replace(multitask.RECIPE, encoder=str(tiny_encoder), max_length=16)
    train(TrainJob(data=tmp_path / "data", out=tmp_path / "run", recipe=recipe))
    said = capsys.readouterr().out
    assert "Stage 'binary' is left out: there is no binary task." in said
    assert "Stage 'flat' replays nothing, for no task came before it." in said
    assert "Stage 'hierarchical' is left out: there is no hierarchical task." in said
    assert list(json.loads((tmp_path / "run/stages/curriculum.json").read_text())) == ["flat"]
    with pytest.raises(InputError, match="'binary' tasks, but there is none"):
        plan_curriculum(multitask.RECIPE.curriculum, Taxonomy((TREE,)), [10], 10)


YAML = """
- name: first
  kinds: [binary]
  epochs: 4
- {name: second, kinds: [multilabel], tasks: [where], replay: 0.2, weights: {topics: 3}, epochs: 30,
   learning_rate: 0.003}
"""


def test_a_curriculum_is_read_from_yaml_and_json(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(YAML)
    assert read_curriculum(tmp_path / "c.yaml") == CURRICULUM
    entries = [{"name": "first", "kinds": ["binary"], "epochs": 4}]
    (tmp_path / "c.json").write_text(json.dumps({"stages": entries}))
    assert read_curriculum(tmp_path / "c.json") == CURRICULUM[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a list of stages"),
        ('[{"name": "a", "speed": 1}]', r"stage 1: there is no field 'speed'; there are name, kinds"),
        ('[{"name": "a", "epochs": "2"}]', "stage 1: 'epochs' cannot be '2'"),
        ('[{"kinds": ["binary"]}]', "stage 1 has no name"),
        ('[{"name": "a", "kinds": ["tree"]}]', "there is no kind 'tree', only binary, multiclass"),
        ('[{"name": "a/b"}]', "A stage's name names a folder"),
        ('[{"name": "a", "replay": 1.0}]', "replay from 0 to 1"),
        ('[{"name": "a", "epochs": Infinity}]', "stage 1: Stage 'a': .* epochs finite"),
        ('[{"name": "a", "epochs": NaN}]', "epochs must be above 0"),
        ('[{"name": "a", "weights": {"b": Infinity}}]', "stage 1: Stage 'a': weights must be finite and above 0"),
        ('[{"name": "a", "weights": {"b": NaN}}]', "weights must be finite"),
        ('[{"name": "a", "temperature": NaN}]', "temperature and epochs must be above 0"),
        ('[{"name": "a", "learning_rate": Infinity}]', "learning_rate must be finite and at least 0; it is inf"),
        ("[", "is not valid JSON"),
    ],
)
def test_a_file_that_is_no_curriculum_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_curriculum(tmp_path / "c.json")


def test_a_task_in_yaml_is_the_same_task(tasks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "where"
    folder.mkdir()
    (folder / "task.yaml").write_text(
        "name: where\nkind: hierarchical\nlabels:\n"
        "- name: inside\n- {name: food, parent: inside}\n- name: outside\n"
        "- {name: sport, parent: outside}\n- {name: weather, parent: outside}\n"
    )
    (folder / "train.jsonl").write_text((tasks / "where" / "train.jsonl").read_text())
    dataset = load_dataset(TrainJob(data=folder, out=tmp_path / "run"), lambda _: None)
    assert dataset.taxonomy.tasks == (TREE,)


def test_folders_without_training_examples_are_left_out_and_named(tasks: Path, tmp_path: Path) -> None:
    said: list[str] = []
    dataset = load_dataset(TrainJob(data=tasks, out=tmp_path / "run", texts=50, held_out_texts=10), said.append)
    assert [task.name for task in dataset.taxonomy.tasks] == ["topic", "topics", "where"]
    assert any("later has no split 'train' and is left out" in sentence for sentence in said)
    assert {name: len(examples) for name, examples in dataset.test.items()} == dict.fromkeys(dataset.test, 10)
    assert all(len(dataset.train[name]) + len(dataset.dev[name]) <= 50 for name in dataset.train)


def test_two_teachers_of_transformers(
    tiny_encoder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sequence classifier's answers, averaged with a differently seeded one's, are what transformers itself gives."""
    import torch
    import transformers

    names = ["weather", "food", "sport"]  # another order than the task's
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_encoder)
    answers = []
    text = toy_text(["food"], np.random.default_rng(5))
    for seed in range(2):
        torch.manual_seed(seed)
        config = transformers.BertConfig.from_pretrained(tiny_encoder, id2label=dict(enumerate(names)))
        model = transformers.BertForSequenceClassification(config).eval()
        with torch.no_grad():
            answers.append(torch.softmax(model(**tokenizer(text, return_tensors="pt")).logits, -1)[0].numpy())
        model.save_pretrained(tmp_path / f"teacher{seed}")
        tokenizer.save_pretrained(tmp_path / f"teacher{seed}")
    folder = tmp_path / "where"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(TREE.to_json()))
    (folder / "train.jsonl").write_text(json.dumps({"text": text, "label": "food"}) + "\n")
    command = ["teach", "--teacher", str(tmp_path / "teacher0"), str(tmp_path / "teacher1"), "--data", str(folder)]
    assert main([*command, "--out", str(tmp_path / "soft.jsonl")]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "soft.jsonl").read_text().splitlines()]
    expected = dict(zip(names, np.mean(answers, axis=0).tolist(), strict=True))
    assert row["probabilities"] == pytest.approx(expected, abs=1e-5)
    said = capsys.readouterr().out
    for number, answer in enumerate(answers):
        assert f"teacher{number}: a mean loss of {-np.log(answer[1]):.3f} nats on the 1 texts with labels." in said


def test_what_a_teacher_says_within_the_task_counts_and_a_label_above_has_its_leaves(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_encoder)
    names = ["food", "sport", "weather", "another task's"]
    for teacher, probs in (("open", [0.1, 0.2, 0.1, 0.6]), ("closed", [0.6, 0.2, 0.1, 0.1])):
        config = transformers.BertConfig.from_pretrained(tiny_encoder, id2label=dict(enumerate(names)))
        model = transformers.BertForSequenceClassification(config)
        model.classifier.weight.data.zero_()  # it says the same of every text
        model.classifier.bias.data.copy_(model.classifier.bias.new_tensor(np.log(probs)))
        for saved in (model, tokenizer):
            saved.save_pretrained(tmp_path / teacher)
    folder = tmp_path / "where"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(TREE.to_json()))
    (folder / "train.jsonl").write_text(json.dumps({"text": "rain", "label": "outside"}) + "\n")
    command = ["teach", "--teacher", str(tmp_path / "open"), str(tmp_path / "closed"), "--data", str(folder)]
    assert main([*command, "--out", str(tmp_path / "soft.jsonl")]) == 0
    row = json.loads((tmp_path / "soft.jsonl").read_text())
    expected = {"food": (1 / 4 + 6 / 9) / 2, "sport": (2 / 4 + 2 / 9) / 2, "weather": (1 / 4 + 1 / 9) / 2}
    assert row["probabilities"] == pytest.approx(expected, abs=1e-5)
    said = capsys.readouterr().out
    for teacher, outside in (("open", 3 / 4), ("closed", 3 / 9)):
        assert f"{teacher}: a mean loss of {-np.log(outside):.3f} nats on the 1 texts with labels." in said


def test_a_teacher_of_other_labels_or_none_at_all_is_refused(
    tasks: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["teach", "--data", str(tasks / "where"), "--out", str(tmp_path / "soft.jsonl"), "--teacher"]
    assert main([*command, str(tmp_path / "nothing")]) == 2
    assert "is neither a bundle nor a sequence classifier" in capsys.readouterr().err
    assert main([*command, str(tiny_encoder)]) == 2
    assert "does not know the label 'food' (3 of 3 are missing)" in capsys.readouterr().err
    assert not list(tmp_path.glob("soft*"))
