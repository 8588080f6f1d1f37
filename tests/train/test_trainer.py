"""The loop: it learns, goes on after a stop as if there had been none, and keeps the best epoch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import csr_array

from classer.data.errors import InputError
from classer.data.taxonomy import Label, LabelTable, Task, TaskKind, Taxonomy
from classer.model.config import EncoderConfig
from classer.model.focus import is_gate
from classer.model.precision import Precision
from classer.model.pretrained import load_encoder
from classer.model.quantize import Weights
from classer.train import dev_evaluator, focus, trainer
from classer.train.config import Recipe
from classer.train.dev_evaluator import DevEvaluator
from classer.train.fit import fit
from classer.train.focus import SOFT_SHARE, distilled, draw_focus
from classer.train.phases import FitResult, TrainContext
from classer.train.probe import probe_head
from classer.train.runlog import RunLog, open_log
from classer.train.tokenized import TokenizedSplit

MULTICLASS = Task("toy", TaskKind.MULTICLASS, tuple(Label(name) for name in "abc"))
BINARY = Task("toy", TaskKind.BINARY, tuple(Label(name) for name in "ab"))
MULTILABEL = Task("toy", TaskKind.MULTILABEL, tuple(Label(name) for name in "abc"))
RECIPE = Recipe(
    epochs=4,
    batch_size=8,
    learning_rate=3e-3,
    dropout=0.2,
    patience=0,
    compute_dtype=Precision.float32,
    label_smoothing=0.1,
)
FIRST_WORD = 4  # ids below are special tokens
CLS, SEP = 2, 3


def toy_split(task: Task, count: int, seed: int) -> TokenizedSplit:
    """Texts of three to twenty words, of which one a label is the label's own (its id follows from the label)."""
    rng = np.random.default_rng(seed)
    num_labels = len(task.labels)
    targets_NL = np.zeros((count, num_labels), np.float32)
    ids = []
    for row in range(count):
        labels = [row % num_labels] if task.kind.exclusive else np.flatnonzero(rng.random(num_labels) < 0.4)
        targets_NL[row, labels] = 1
        words = rng.integers(FIRST_WORD + num_labels, 20, rng.integers(3, 10)).tolist()
        words += [FIRST_WORD + int(label) for label in labels]
        rng.shuffle(words)
        ids.append(np.array([CLS, *words, SEP], np.int32))
    return TokenizedSplit(ids, csr_array(targets_NL))


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> tuple[EncoderConfig, Weights]:
    return load_encoder(tiny_encoder)


def run(
    encoder: tuple[EncoderConfig, Weights],
    out: Path,
    recipe: Recipe = RECIPE,
    task: Task = MULTICLASS,
    *,
    count: int = 45,
) -> FitResult:
    train, dev = toy_split(task, count, seed=0), toy_split(task, 20, seed=1)
    config, weights = encoder
    return fit(TrainContext(recipe, Taxonomy((task,)), config, {"toy": train}, {"toy": dev}, 0, out), weights)


@pytest.fixture(scope="module")
def uninterrupted(encoder, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """With dropout, and without early stopping. The pretrained weights stay as they are."""
    before = {name: value.copy() for name, value in encoder[1].items()}
    fitted = run(encoder, tmp_path_factory.mktemp("uninterrupted"))
    for name, value in encoder[1].items():
        np.testing.assert_array_equal(value, before[name])
    return fitted


def assert_same(one: FitResult, other: FitResult) -> None:
    """Bit for bit."""
    assert dataclasses.replace(one, weights={}) == dataclasses.replace(other, weights={})
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        np.testing.assert_array_equal(value, other.weights[name], err_msg=name, strict=True)


def differ(one: FitResult, other: FitResult) -> bool:
    return any((value != other.weights[name]).any() for name, value in one.weights.items())


@pytest.mark.parametrize("task", [MULTICLASS, BINARY, MULTILABEL], ids=["multiclass", "binary", "multilabel"])
def test_a_tiny_encoder_learns_a_toy_task(encoder, tmp_path: Path, monkeypatch, task: Task) -> None:
    monkeypatch.setattr(trainer, "probe_head", lambda *_: {})  # it knows this task before the first step
    recipe = dataclasses.replace(RECIPE, epochs=8, dropout=0.0, learning_rate=1e-2, label_smoothing=0.0)
    fitted = run(encoder, tmp_path, recipe, task, count=150)
    assert fitted.score >= 0.95
    losses = [record["loss"] for record in log_of(tmp_path) if "loss" in record]
    assert len(losses) == 8 * 19
    assert np.mean(losses[-19:]) < 0.5 * np.mean(losses[:5])


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Makes the log raise after `steps` steps of this process, as a Ctrl-C between them would."""
    log_step, seen = RunLog.step, 0

    def step(self: RunLog, *arguments: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > steps:
            raise Stopped
        log_step(self, *arguments)

    monkeypatch.setattr(RunLog, "step", step)


@pytest.mark.parametrize("stops", [(3,), (6, 9)], ids=["in the first epoch", "in the second and in the fourth"])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    encoder, tmp_path: Path, monkeypatch, uninterrupted: FitResult, stops: tuple[int, ...]
) -> None:
    for steps in stops:
        with monkeypatch.context() as patched:
            stop_after(patched, steps)
            with pytest.raises(Stopped):
                run(encoder, tmp_path)
    assert_same(run(encoder, tmp_path), uninterrupted)
    steps_logged = [record["step"] for record in log_of(tmp_path) if "loss" in record]
    assert steps_logged == list(range(1, 4 * 6 + 1)), "each step stands once in the log"


def test_relations_to_teachers_vectors_are_learnt_and_go_on_after_a_stop(encoder, tmp_path: Path, monkeypatch) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=2, relation_share=2.0)
    vectors_NV = np.random.default_rng(0).normal(size=(45, 6)).astype(np.float16)
    vectors_NV[::5] = 0  # texts without one
    train = dataclasses.replace(toy_split(MULTICLASS, 45, seed=0), vectors_NV=vectors_NV)

    def fitted(out: Path, train: TokenizedSplit = train) -> FitResult:
        dev = toy_split(MULTICLASS, 20, seed=1)
        return fit(
            TrainContext(recipe, Taxonomy((MULTICLASS,)), encoder[0], {"toy": train}, {"toy": dev}, 0, out), encoder[1]
        )

    def relation_losses(out: Path) -> list[float]:
        return [record["relation_loss"] for record in log_of(out) if "loss" in record]

    whole = fitted(tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(patched, 8)
        with pytest.raises(Stopped):
            fitted(tmp_path / "stopped")
    others = dataclasses.replace(train, vectors_NV=vectors_NV[::-1])
    with pytest.raises(InputError, match="other examples"):
        fitted(tmp_path / "stopped", others)
    assert_same(fitted(tmp_path / "stopped"), whole)
    assert relation_losses(tmp_path / "stopped") == relation_losses(tmp_path / "whole")
    assert np.mean(relation_losses(tmp_path / "whole")[-3:]) < np.mean(relation_losses(tmp_path / "whole")[:3])


def with_soft_only(split: TokenizedSplit, count: int) -> TokenizedSplit:
    """And as many examples that only a teacher has answered, with [0.6, 0.4, 0]."""
    N = len(split.ids)
    targets_NL = np.concatenate([split.targets_NL, np.zeros((count, 3), np.float32)])
    soft_NL = np.concatenate([np.zeros((N, 3)), np.tile([0.6, 0.4, 0.0], (count, 1))]).astype(np.float32)
    ids = [*split.ids, *toy_split(MULTICLASS, count, seed=7).ids]
    return TokenizedSplit(ids, csr_array(targets_NL), 0, csr_array(soft_NL), np.arange(N + count) >= N)


def test_examples_that_only_a_teacher_answered_are_no_negatives(encoder, tmp_path: Path) -> None:
    config, weights = encoder
    split, dev = toy_split(MULTILABEL, 40, seed=0), toy_split(MULTILABEL, 20, seed=1)
    counts, heads = [], []
    for train in (split, with_soft_only(split, 30)):
        context = TrainContext(RECIPE, Taxonomy((MULTILABEL,)), config, {"toy": train}, {"toy": dev}, 0, tmp_path)
        counts.append(context.label_counts)
        heads.append(probe_head(RECIPE, context.taxonomy, config, weights, {"toy": train}, {"toy": dev}, ["toy"]))
    np.testing.assert_array_equal(counts[0][0], counts[1][0])
    assert counts[0][1].tolist() == counts[1][1].tolist() == [40]
    for name, value in heads[0].items():
        np.testing.assert_allclose(value, heads[1][name], rtol=1e-3, atol=1e-4)


def test_learning_to_focus_takes_a_teachers_answer_where_there_is_no_label(
    encoder, tmp_path: Path, monkeypatch
) -> None:
    answers_NL = np.random.default_rng(0).dirichlet(np.ones(3), 9).astype(np.float32)
    monkeypatch.setattr(focus, "_answers", lambda *_: csr_array(answers_NL))
    split = with_soft_only(toy_split(MULTICLASS, 6, seed=0), 3)
    weights = {**encoder[1], "head.kernel": np.zeros((32, 3), np.float32), "head.bias": np.zeros(3, np.float32)}
    mixed = distilled(RECIPE, Taxonomy((MULTICLASS,)), encoder[0], weights, {"toy": split}, tmp_path)["toy"]
    known_NL = np.concatenate([split.targets_NL[:6], np.tile([0.6, 0.4, 0.0], (3, 1))])
    np.testing.assert_allclose(mixed.targets_NL, 0.7 * answers_NL + 0.3 * known_NL, rtol=1e-5)
    np.testing.assert_allclose(mixed.targets_NL.sum(axis=1), 1, rtol=1e-5)


FOCUSED = dataclasses.replace(RECIPE, epochs=2, focus_epochs=3)


@pytest.fixture(scope="module")
def gated(encoder) -> tuple[EncoderConfig, Weights]:
    return dataclasses.replace(encoder[0], gated=True), encoder[1]


@pytest.fixture(scope="module")
def uninterrupted_focus(gated, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    return run(gated, tmp_path_factory.mktemp("focus"), FOCUSED)


def test_training_to_focus_moves_the_gates_and_is_measured_at_both_ends(gated, tmp_path: Path, capsys) -> None:
    dense = run(gated, tmp_path / "dense", dataclasses.replace(FOCUSED, focus_epochs=0))
    fitted = run(gated, tmp_path / "focused", FOCUSED)
    gates = [name for name in fitted.weights if is_gate(name)]
    assert len(gates) == gated[0].num_layers
    for name in gates:
        assert not dense.weights[name].any()
    assert any(fitted.weights[name].any() for name in gates)
    assert fitted.epochs == 3
    last = [
        record for record in log_of(tmp_path / "focused" / "focus") if "dev/accuracy" in record or "dev" in str(record)
    ]
    assert {"dev/accuracy", "dev/focus_0.35/accuracy"} <= {name for record in last for name in record}
    assert "at focus 0.35" in capsys.readouterr().err


def test_gates_that_were_taught_before_begin_with_hard_rows(
    gated, tmp_path: Path, monkeypatch, uninterrupted_focus: FitResult
) -> None:
    seen: list[float] = []

    def draw(key, num_rows, num_layers, done):
        jax.debug.callback(lambda value: seen.append(float(value)), done)
        return draw_focus(key, num_rows, num_layers, done)

    monkeypatch.setattr(trainer, "draw_focus", draw)
    recipe = dataclasses.replace(FOCUSED, epochs=0, focus_epochs=1)
    trained = uninterrupted_focus.weights
    for name, weights, start in (
        ("untaught", {name: value for name, value in trained.items() if not is_gate(name)}, 0.0),
        ("taught", trained, SOFT_SHARE),
    ):
        seen.clear()
        run((gated[0], weights), tmp_path / name, recipe)
        jax.effects_barrier()
        assert min(seen) == pytest.approx(start)
        assert start < max(seen) < 1


def test_half_of_the_rows_stay_soft_once_others_drop_tokens() -> None:
    assert not draw_focus(jax.random.key(0), 1000, 6, jnp.float32(SOFT_SHARE - 0.01)).hard_B.any()
    hard_B = draw_focus(jax.random.key(0), 1000, 6, jnp.float32(SOFT_SHARE)).hard_B
    assert 0.45 < hard_B.mean() < 0.55


@pytest.mark.parametrize("stops", [(3, 14, 8)], ids=["both, twice"])
def test_a_run_that_was_stopped_in_either_stage_ends_as_if_it_had_not_been(
    gated, tmp_path: Path, monkeypatch, uninterrupted_focus: FitResult, stops: tuple[int, ...]
) -> None:
    for steps in stops:
        with monkeypatch.context() as patched:
            stop_after(patched, steps)
            with pytest.raises(Stopped):
                run(gated, tmp_path, FOCUSED)
    assert_same(run(gated, tmp_path, FOCUSED), uninterrupted_focus)


def test_going_on_with_a_finished_run_gives_it_again(encoder, tmp_path: Path, uninterrupted: FitResult) -> None:
    assert_same(run(encoder, tmp_path), uninterrupted)
    assert_same(run(encoder, tmp_path), uninterrupted)


def test_the_seed_and_dropout_change_the_outcome(encoder, tmp_path: Path, uninterrupted: FitResult) -> None:
    for change in ({"seed": 1}, {"dropout": 0.0}):
        other = run(encoder, tmp_path / str(change), dataclasses.replace(RECIPE, **change))
        assert differ(other, uninterrupted), change


def test_going_on_with_other_examples_is_refused(encoder, tmp_path: Path) -> None:
    run(encoder, tmp_path)
    with pytest.raises(InputError, match="was taken with other examples, labels, tokens, seed or batch size"):
        run(encoder, tmp_path, count=46)


def test_a_multilabel_dev_set_is_scored_at_the_thresholds_that_it_gives(monkeypatch, tmp_path: Path) -> None:
    """Every label is told apart without an error, but below a half."""
    targets_NL = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]

    class Unsure:
        def __init__(self, *_: object) -> None: ...

        def with_weights(self, _: Weights) -> Unsure:
            return self

        def logits(self, *_: object, **__: object) -> np.ndarray:
            return targets_NL - 3

    monkeypatch.setattr(dev_evaluator, "Predictor", Unsure)
    dev = {"toy": TokenizedSplit([np.array([CLS, SEP], np.int32)] * 4, csr_array(targets_NL))}
    config = EncoderConfig(20, num_layers=2, d_model=8, num_heads=2, d_ff=16, max_positions=16)
    look = DevEvaluator(Taxonomy((MULTILABEL,)), config, {}, Precision.float32, dev, [1.0])
    with open_log(tmp_path, 1) as log:
        assert look({}, 1, log) == 1
    assert look.sentence == "accuracy 100.00% · macro-F1 1.000"


def scripted_scores(monkeypatch: pytest.MonkeyPatch, *scores: float) -> list[Weights]:
    """Makes the dev scores of the epochs to come these; notes the weights of each epoch."""
    seen: list[Weights] = []
    look = DevEvaluator.__call__

    def scripted(self, weights, step, log) -> float:
        look(self, weights, step, log)
        seen.append({name: np.array(value) for name, value in weights.items()})
        return scores[len(seen) - 1]

    monkeypatch.setattr(DevEvaluator, "__call__", scripted)
    return seen


@pytest.mark.parametrize(
    ("scores", "patience", "kept", "epochs"),
    [  # a standard error at 0.7 of 20 examples is 0.102
        ((0.5, 0.7, 0.6, 0.61), 0, 4, 4),
        ((0.5, 0.7, 0.6, 0.59), 0, 2, 4),
        ((0.7, 0.7, 0.6, 0.5), 0, 1, 4),  # of equals the first
        ((0.5, 0.7, 0.6, 0.8), 2, 4, 4),
        ((0.5, 0.7, 0.6, 0.7), 2, 4, 4),
        ((0.7, 0.6, 0.5, 0.9), 2, 1, 3),
        ((0.0, 0.0, 0.0, 0.0), 1, 1, 2),
    ],
)
def test_the_last_epoch_is_kept_unless_one_was_better_and_patience_ends_the_run(
    encoder, tmp_path: Path, monkeypatch, capsys, scores, patience: int, kept: int, epochs: int
) -> None:
    seen = scripted_scores(monkeypatch, *scores)
    fitted = run(encoder, tmp_path, dataclasses.replace(RECIPE, patience=patience))
    assert (fitted.kept_epoch, fitted.epochs, fitted.score) == (kept, epochs, scores[kept - 1])
    assert len(seen) == epochs
    for name, value in seen[kept - 1].items():
        np.testing.assert_array_equal(fitted.weights[name], value)
    assert ("Stopped early" in capsys.readouterr().err) == (epochs < 4)


def test_early_stopping_counts_on_after_a_stop(encoder, tmp_path: Path, monkeypatch) -> None:
    recipe = dataclasses.replace(RECIPE, patience=2)
    with monkeypatch.context() as patched:
        scripted_scores(patched, 0.7, 0.6)
        stop_after(patched, 2 * 6 + 3)
        with pytest.raises(Stopped):
            run(encoder, tmp_path, recipe)
    scripted_scores(monkeypatch, 0.5)
    fitted = run(encoder, tmp_path, recipe)
    assert (fitted.kept_epoch, fitted.epochs, fitted.score) == (1, 3, 0.7)


def test_only_the_last_two_and_the_best_checkpoint_are_kept(encoder, tmp_path: Path, monkeypatch) -> None:
    scripted_scores(monkeypatch, 0.5, 0.7, 0.6, 0.65)
    run(encoder, tmp_path)
    steps = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir() if folder.name.isdigit())
    assert steps == [2 * 6, 3 * 6, 4 * 6]


def test_a_run_that_diverges_says_so(encoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"The loss of step \d+ is nan: training diverged.* lower learning_rate"):
        run(encoder, tmp_path, dataclasses.replace(RECIPE, learning_rate=1e30, warmup=0.0))


def test_class_weights_are_used_where_asked_for(encoder, tmp_path: Path, monkeypatch, uninterrupted: FitResult) -> None:
    asked = []

    def weights(table: LabelTable, positives_L: np.ndarray, examples_T: np.ndarray) -> np.ndarray:
        asked.append((len(table.task_L), positives_L.sum(), examples_T.tolist()))
        return np.array([1.0, 1.0, 3.0], np.float32)

    monkeypatch.setattr(trainer, "balanced_class_weights", weights)
    fitted = run(encoder, tmp_path, dataclasses.replace(RECIPE, class_weights="balanced"))
    assert asked == [(3, 45, [45])]
    assert differ(fitted, uninterrupted)


@pytest.mark.slow
def test_scanned_layers_train_the_same_weights(gated, tmp_path: Path) -> None:
    """To rounding; and with one name a layer, as bundles have them."""
    recipe = dataclasses.replace(FOCUSED, dropout=0.0)
    plain = run(gated, tmp_path / "plain", recipe)
    scanned = run(gated, tmp_path / "scanned", dataclasses.replace(recipe, scan=True, remat=True))
    assert scanned.weights.keys() == plain.weights.keys()
    for name, value in plain.weights.items():
        np.testing.assert_allclose(scanned.weights[name], value, atol=5e-3, err_msg=name)
