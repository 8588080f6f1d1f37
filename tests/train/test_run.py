"""A whole run: from a file of texts and a pretrained encoder to bundles and reports; and runs that were cut off."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from classer.data.errors import InputError
from classer.data.taxonomy import TaskKind, Taxonomy
from classer.model.bundle import load_bundle, save_bundle
from classer.model.focus import is_gate
from classer.tests.helpers import write_encoder, write_toy_data
from classer.train import run as run_module
from classer.train.config import Recipe, TrainJob
from classer.train.run import TrainResult, train
from classer.train.start import choose_start

TIMEOUT = 120.0


def make_job(tiny_encoder: Path, folder: Path, kind: TaskKind = TaskKind.MULTICLASS, **recipe: object) -> TrainJob:
    """Toy texts, a test file of them, and a recipe of a few epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"max_length": 16, "epochs": 8, "batch_size": 16, "learning_rate": 3e-3, "dropout": 0.05}
    options = {"encoder": str(tiny_encoder), **options, **recipe}
    return TrainJob(
        data=write_toy_data(folder / "toy.jsonl", kind, 200),
        test=write_toy_data(folder / "held_out.jsonl", kind, 40, seed=1),
        out=folder / "run",
        recipe=Recipe(**options),  # pyright: ignore[reportArgumentType]
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, TrainResult]:
    job = make_job(tiny_encoder, tmp_path_factory.mktemp("finished"))
    return job, train(dataclasses.replace(job, baseline=True))


def check_run(job: TrainJob, result: TrainResult, kind: TaskKind) -> None:
    """What every finished run has left behind."""
    for suffix, precision, metrics in (
        ("", "int8", result.tasks[0].int8_metrics),
        ("-float32", "float32", result.tasks[0].float_metrics),
    ):
        bundle = load_bundle(job.out / f"bundle{suffix}")
        assert bundle.precision == precision
        assert bundle.taxonomy.tasks[0].kind is kind
        assert bundle.max_length == job.recipe.max_length
        assert len(bundle.golden_texts) == (8 if precision == "int8" else 9)
        assert ("" in bundle.golden_texts) == (precision == "float32")
        assert [file.name for file in bundle.licences] == ["LICENSE"]
        assert f"- {kind.capitalize()}, " in bundle.card
        assert f"accuracy {metrics.accuracy:.2%}" in bundle.card
        assert (bundle.calibration["toy"].thresholds is not None) == (kind is TaskKind.MULTILABEL)
        report = json.loads((job.out / f"results{suffix}" / "metrics.json").read_text())
        assert report["accuracy"] == pytest.approx(metrics.accuracy)
        assert report["title"] == f"toy, test, {precision}"
        assert (job.out / f"results{suffix}" / "report.md").is_file()
        assert list((job.out / f"results{suffix}").glob("*.png"))
        assert metrics.n == 40
        assert metrics.accuracy >= 0.9
    assert result.tasks[0].split == "test"
    assert (job.out / "metrics.jsonl").is_file()
    assert json.loads((job.out / "job.json").read_text())["recipe"] == json.loads(
        json.dumps(dataclasses.asdict(job.recipe))
    )
    assert not list(job.out.glob("*.part"))


def test_a_multiclass_run_leaves_bundles_and_reports(finished: tuple[TrainJob, TrainResult]) -> None:
    job, result = finished
    check_run(job, result, TaskKind.MULTICLASS)
    assert result.tasks[0].baseline is not None
    assert result.tasks[0].baseline.accuracy > 0.9


@pytest.mark.parametrize("kind", [TaskKind.BINARY, TaskKind.MULTILABEL])
def test_the_other_kinds_do_too(tiny_encoder: Path, tmp_path: Path, kind: TaskKind) -> None:
    options = {"epochs": 20} if kind is TaskKind.MULTILABEL else {"learning_rate": 1e-3}
    job = make_job(tiny_encoder, tmp_path, kind, patience=0, **options)
    check_run(job, train(job), kind)


def test_without_a_test_file_the_dev_share_is_measured(tiny_encoder: Path, tmp_path: Path) -> None:
    job = dataclasses.replace(make_job(tiny_encoder, tmp_path, epochs=1), test=None)
    result = train(job)
    assert (result.tasks[0].split, result.tasks[0].float_metrics.n) == ("dev", 20)
    assert result.tasks[0].baseline is None


def test_the_bundle_answers_as_it_was_measured(finished: tuple[TrainJob, TrainResult]) -> None:
    job, result = finished
    bundle = load_bundle(job.out / "bundle-float32")
    assert job.test is not None
    rows = [json.loads(line) for line in job.test.read_text().splitlines()]
    ids = bundle.tokenizer.encode([row["text"] for row in rows], bundle.max_length).ids
    probs_NL = bundle.probabilities("toy", bundle.predictor().logits(ids))
    names = bundle.taxonomy.tasks[0].label_names
    right = [names[best] == row["label"] for best, row in zip(probs_NL.argmax(axis=1), rows, strict=True)]
    assert np.mean(right) == pytest.approx(result.tasks[0].float_metrics.accuracy)


# Folders that hold something, and jobs that do not fit


def test_a_folder_that_holds_a_run_is_refused_untouched(finished: tuple[TrainJob, TrainResult]) -> None:
    job, _ = finished
    before = snapshot(job.out)
    with pytest.raises(InputError, match=r"run exists and is not empty; nothing in it was touched\. .*--resume"):
        train(job)
    assert snapshot(job.out) == before


def test_a_finished_run_is_not_resumed(finished: tuple[TrainJob, TrainResult]) -> None:
    job, _ = finished
    before = snapshot(job.out)
    with pytest.raises(InputError, match=r"run is finished; its bundle is .*bundle"):
        train(dataclasses.replace(job, resume=True))
    assert snapshot(job.out) == before


def test_a_folder_with_anything_in_it_or_a_file_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    job = make_job(tiny_encoder, tmp_path)
    job.out.mkdir()
    (job.out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty; nothing in it was touched"):
        train(job)
    assert snapshot(job.out) == {"thesis.txt": b"mine"}
    with pytest.raises(InputError, match="is not empty; nothing in it was touched"):
        train(dataclasses.replace(job, out=job.data))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": 0.5}, r"began with learning_rate = 0\.003, not 0\.5; resume it with that"),
        ({"epochs": 9}, r"began with epochs = 8, not 9"),
        ({"seed": 1}, r"began with seed = 0, not 1"),
    ],
)
def test_resuming_with_another_recipe_names_the_field(finished, change: dict, says: str) -> None:
    job, _ = finished
    with pytest.raises(InputError, match=says):
        train(dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, **change), resume=True))


def test_resuming_with_other_data_names_the_field(finished, tmp_path: Path) -> None:
    job, _ = finished
    other = Path(shutil.copy(job.data, tmp_path / "other.jsonl"))
    with pytest.raises(InputError, match=r"began with data = '.*toy\.jsonl', not '.*other\.jsonl'"):
        train(dataclasses.replace(job, data=other, resume=True))


def test_a_run_that_knew_no_such_option_began_with_its_default(tiny_encoder: Path, tmp_path: Path) -> None:
    job = make_job(tiny_encoder, tmp_path)
    run_module._write_job(job)
    told = json.loads((job.out / "job.json").read_text())
    del told["recipe"]["relation_share"], told["recipe"]["curriculum"], told["job"]["soft_labels"]
    (job.out / "job.json").write_text(json.dumps(told))
    run_module._check_same_job(job)
    del told["recipe"]["dropout"]
    (job.out / "job.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"began with dropout = 0\.0, not 0\.05"):
        run_module._check_same_job(job)


def test_there_must_be_a_run_to_resume(tiny_encoder: Path, tmp_path: Path) -> None:
    job = dataclasses.replace(make_job(tiny_encoder, tmp_path), resume=True)
    with pytest.raises(InputError, match=r"no run to resume in .*run: it holds no job\.json"):
        train(job)
    assert not job.out.exists()
    job.out.mkdir()
    (job.out / "job.json").write_text('{"recipe":')
    with pytest.raises(InputError, match=r"job\.json is damaged"):
        train(job)


def test_what_cannot_be_trained_leaves_no_folder(tiny_encoder: Path, tmp_path: Path) -> None:
    job = make_job(tiny_encoder, tmp_path)
    with pytest.raises(InputError, match="max_length is 64, but the encoder has only 48 positions"):
        train(dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, max_length=64)))
    with pytest.raises(InputError, match="nowhere"):
        train(dataclasses.replace(job, data=tmp_path / "nowhere.csv"))
    assert not job.out.exists()


def test_a_vocabulary_that_is_not_the_encoders_is_refused(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", vocab_size=20)
    with pytest.raises(InputError, match=r"vocab\.txt has 28 tokens, but the encoder only 20; they do not belong"):
        train(make_job(encoder, tmp_path))


# Runs that were cut off


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("bundle", "bundle-float32"):
        ours, theirs = load_bundle(one / name).weights, load_bundle(other / name).weights
        assert ours.keys() == theirs.keys()
        for tensor, value in ours.items():
            np.testing.assert_array_equal(value, theirs[tensor], err_msg=tensor, strict=True)


def test_a_run_stopped_between_its_bundles_can_be_resumed(
    tiny_encoder: Path, tmp_path: Path, monkeypatch, finished: tuple[TrainJob, TrainResult]
) -> None:
    job = make_job(tiny_encoder, tmp_path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "quantize_bundle", stop)
        with pytest.raises(KeyboardInterrupt):
            train(job)
    assert (job.out / "bundle-float32").is_dir()
    assert not (job.out / "bundle").exists()
    train(dataclasses.replace(job, resume=True))
    assert_same_weights(job.out, finished[0].out)


@pytest.mark.parametrize("restartable", [False, True])
def test_a_run_stopped_before_its_job_file_was_whole_begins_anew(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restartable: bool
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    job = dataclasses.replace(make_job(tiny_encoder, tmp_path, epochs=1), restartable=restartable)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop)
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # as a killed process removes nothing
        with pytest.raises(KeyboardInterrupt):
            train(job)
    assert list(snapshot(job.out)) == ["job.json.part"]
    monkeypatch.setattr(run_module, "fit", stop)  # it comes so far
    with pytest.raises(KeyboardInterrupt):
        train(job)
    assert list(snapshot(job.out)) == ["job.json"]


@pytest.mark.slow
def test_a_killed_process_is_resumed_to_the_same_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of training, then `--resume`, by the command line; against a run in this process."""
    job = make_job(tiny_encoder, tmp_path, epochs=40, patience=0)
    uninterrupted = dataclasses.replace(job, out=tmp_path / "uninterrupted")
    train(uninterrupted)

    command = [sys.executable, "-m", "classer.tools.cli.main", "train"]
    command += ["--data", job.data, "--test", job.test, "--out", job.out]
    for field in ("encoder", "max_length", "epochs", "batch_size", "learning_rate", "dropout", "patience"):
        command += [f"--{field.replace('_', '-')}", getattr(job.recipe, field)]
    command = [str(word) for word in command]
    environment = os.environ | {"GLIBC_TUNABLES": ""}  # or the command would start itself anew
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            until = time.monotonic() + TIMEOUT
            while len(epochs_logged(job.out)) < 5:
                assert process.poll() is None, (tmp_path / "output").read_text()
                assert time.monotonic() < until
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert len(epochs_logged(job.out)) < 40, "it was killed too late to show anything"
    assert not (job.out / "bundle-float32").exists()

    resumed = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=environment, timeout=TIMEOUT, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "Going on after epoch" in resumed.stderr
    assert_same_weights(job.out, uninterrupted.out)
    assert epochs_logged(job.out) == sorted(set(epochs_logged(job.out)))


def epochs_logged(out: Path) -> list[int]:
    """Steps after which the dev set was measured."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if "dev/accuracy" in line and line.endswith("}")]


def test_labels_that_no_dev_example_has_are_said_before_training(
    tiny_encoder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    job = make_job(tiny_encoder, tmp_path, TaskKind.MULTILABEL)
    (tmp_path / "dev.jsonl").write_text('{"text": "bread", "labels": ["food"]}\n{"text": "rain", "labels": []}\n')

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(job, dev=tmp_path / "dev.jsonl"))
    said = capsys.readouterr().out
    assert said.count("Task 'toy': no example for development has 'sport', 'weather' (of 3 labels), by which to ") == 1


@pytest.mark.slow
def test_a_native_size_is_trained_from_nothing(minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = make_job(minilm, tmp_path, epochs=6, learning_rate=1e-3, patience=0, encoder="classer-5m")
    result = train(job)
    assert "classer-5m begins with random weights" in capsys.readouterr().out
    encoder = result.bundle.encoder
    assert (encoder.num_layers, encoder.d_model, encoder.norm, encoder.gated) == (6, 128, "rms", False)
    assert result.tasks[0].float_metrics.accuracy > 0.9
    assert load_bundle(job.out / "bundle").encoder == encoder


def test_a_bundle_goes_on_being_trained_and_keeps_its_head(tiny_encoder: Path, tmp_path: Path, finished) -> None:
    job, result = finished
    trained = job.out / "bundle-float32"
    start = choose_start(str(trained))
    recipe = dataclasses.replace(job.recipe, encoder=str(trained), epochs=1, learning_rate=0.0)
    again = train(dataclasses.replace(job, out=tmp_path / "run", recipe=recipe))
    for name, value in start.weights.items():
        np.testing.assert_array_equal(again.float_bundle.weights[name], value, err_msg=name)
    assert again.tasks[0].float_metrics.accuracy == result.tasks[0].float_metrics.accuracy


def test_a_run_begins_with_the_mean_of_several(tiny_encoder: Path, tmp_path: Path, finished) -> None:
    job, _ = finished
    first = job.out / "bundle-float32"
    bundle = load_bundle(first)
    other = dataclasses.replace(bundle, weights={name: 3 * value for name, value in bundle.weights.items()})
    save_bundle(other, tmp_path / "other")
    recipe = dataclasses.replace(job.recipe, encoder=f"{first}, {tmp_path / 'other'}", epochs=0)
    mean = train(dataclasses.replace(job, out=tmp_path / "run", recipe=recipe)).float_bundle
    for name, value in bundle.weights.items():
        np.testing.assert_allclose(mean.weights[name], 2 * value, rtol=1e-6, err_msg=name)
    assert not (tmp_path / "run" / "checkpoints").exists(), "no training"
    assert "their mean; nothing was trained" in mean.card

    deeper = dataclasses.replace(bundle, encoder=dataclasses.replace(bundle.encoder, norm_eps=1e-5))
    save_bundle(deeper, tmp_path / "deeper")
    renamed = dataclasses.replace(bundle.taxonomy.tasks[0], name="renamed")
    calibration = {"renamed": bundle.calibration[bundle.taxonomy.tasks[0].name]}
    save_bundle(
        dataclasses.replace(bundle, taxonomy=Taxonomy((renamed,)), calibration=calibration), tmp_path / "renamed"
    )
    for name, sentence in (
        (tmp_path / "deeper", "deeper has no mean with .*: it has a different encoder"),
        (tmp_path / "renamed", "renamed has no mean with .*: it has other tasks or labels"),
        (tiny_encoder, "is no bundle; only trained classifiers have a mean"),
        ("", "has a comma with nothing on one side"),
    ):
        with pytest.raises(InputError, match=sentence):
            choose_start(f"{first},{name}")


def test_a_dense_bundle_is_taught_to_focus_and_then_a_little_more(tmp_path: Path, finished) -> None:
    job, _ = finished
    recipe = dataclasses.replace(job.recipe, encoder=str(job.out / "bundle-float32"), epochs=0, focus_epochs=2)
    first = train(dataclasses.replace(job, out=tmp_path / "first", recipe=recipe)).float_bundle
    assert first.encoder.gated
    assert not (tmp_path / "first" / "checkpoints").exists(), "no dense training"
    gates = [name for name in first.weights if is_gate(name)]
    assert any(first.weights[name].any() for name in gates)

    recipe = dataclasses.replace(recipe, encoder=str(first.path), focus_epochs=1)
    second = train(dataclasses.replace(job, out=tmp_path / "second", recipe=recipe)).float_bundle
    assert any((second.weights[name] != first.weights[name]).any() for name in gates)

    recipe = dataclasses.replace(recipe, epochs=1, focus_epochs=0)
    dense = train(dataclasses.replace(job, out=tmp_path / "dense", recipe=recipe)).float_bundle
    assert not dense.encoder.gated
    assert not any(map(is_gate, dense.weights))


def test_a_bundle_of_other_labels_gives_its_encoder_alone(tmp_path: Path, finished, capsys) -> None:
    job, _ = finished
    data = write_toy_data(tmp_path / "other.jsonl", TaskKind.BINARY, 60)
    recipe = dataclasses.replace(job.recipe, encoder=str(job.out / "bundle-float32"), epochs=1)
    other = dataclasses.replace(job, data=data, test=None, out=tmp_path / "run", recipe=recipe)
    assert train(other).float_bundle.taxonomy.num_labels != load_bundle(job.out / "bundle").taxonomy.num_labels
    assert "has other tasks or labels; training begins with its encoder alone" in capsys.readouterr().out
    bad = dataclasses.replace(other, out=tmp_path / "bad", recipe=dataclasses.replace(recipe, epochs=0, focus_epochs=1))
    with pytest.raises(InputError, match="epochs is 0, which only a trained classifier can begin with"):
        train(bad)
    assert not bad.out.exists()


def test_what_cannot_be_trained_is_refused(tiny_encoder: Path, tmp_path: Path, finished) -> None:
    job, _ = finished
    with pytest.raises(InputError, match="is an INT8 bundle, which cannot be trained; name the float32 one"):
        choose_start(str(job.out / "bundle"))
    for focus_epochs in (0, 1):
        nothing = make_job(tiny_encoder, tmp_path, epochs=0, focus_epochs=focus_epochs)
        with pytest.raises(InputError, match="epochs is 0, which only a trained classifier can begin with"):
            train(nothing)
