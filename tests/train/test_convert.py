"""`classer convert`: converting an encoder and healing it on texts; what it leaves, refuses, and resumes from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from classer.data.errors import InputError
from classer.data.taxonomy import TaskKind
from classer.model.pretrained import load_encoder
from classer.tests.helpers import printed, write_encoder, write_toy_data
from classer.train import convert as module
from classer.train.config import Recipe, TrainJob
from classer.train.convert import ConvertJob, run_convert
from classer.train.run import train


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ConvertJob:
    folder = tmp_path_factory.mktemp("convert")
    encoder = write_encoder(folder / "bert", hidden_size=32, intermediate_size=96)
    data = write_toy_data(folder / "texts.jsonl", TaskKind.MULTICLASS, 6_000)
    return ConvertJob((data,), folder / "native", str(encoder), tokens=60_000, max_length=16, learning_rate=1e-3)


@pytest.fixture(scope="module")
def said(job: ConvertJob) -> list[str]:
    return printed(lambda: run_convert(job))[1]


def cosine(line: str) -> float:
    return float(line.split("cosine to the teacher ")[1].split()[0])


def test_healing_brings_the_student_nearer_to_its_teacher(said: list[str]) -> None:
    fitted, healed = (line for line in said if "cosine" in line)
    assert cosine(healed) > cosine(fitted) > 0.5
    assert cosine(healed) > 0.9


@pytest.mark.slow
def test_what_is_left_is_an_encoder_to_train_from(job: ConvertJob, said: list[str], tmp_path: Path) -> None:
    config, _ = load_encoder(job.out)
    assert (config.norm, config.activation, config.pre_norm, config.biases) == ("rms", "swiglu", True, False)
    assert config.rope_base
    assert (job.out / "LICENSE").is_file()
    recipe = Recipe(encoder=str(job.out), max_length=16, epochs=8, learning_rate=1e-3, batch_size=16, patience=0)
    data = write_toy_data(tmp_path / "toy.jsonl", TaskKind.MULTICLASS, 400)
    result = train(TrainJob(data, tmp_path / "run", recipe))
    assert result.tasks[0].float_metrics.accuracy > 0.8
    assert result.bundle.encoder == config


def test_a_finished_encoder_is_left_alone(job: ConvertJob, said: list[str]) -> None:
    before = (job.out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a finished encoder; nothing in it was touched"):
        run_convert(dataclasses.replace(job, resume=True))
    assert (job.out / "model.safetensors").read_bytes() == before


def test_resuming_ends_as_an_uninterrupted_run(
    job: ConvertJob, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS_BETWEEN_CHECKPOINTS", 7)
    cut_off = dataclasses.replace(job, out=tmp_path / "again")
    step = module.RunLog.step

    def stop_at_12(self: module.RunLog, number: int, *rest: float) -> None:
        if number == 12:
            raise KeyboardInterrupt
        step(self, number, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module.RunLog, "step", stop_at_12)
    with pytest.raises(KeyboardInterrupt):
        run_convert(cut_off)
    with pytest.raises(InputError, match="is not empty; nothing in it was touched"):
        run_convert(cut_off)
    monkeypatch.setattr(module.RunLog, "step", step)
    run_convert(dataclasses.replace(cut_off, resume=True))
    for name, value in load_encoder(cut_off.out)[1].items():
        np.testing.assert_array_equal(value, load_encoder(job.out)[1][name])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": 10}, "tokens is 10; conversion needs 10,000 at least."),
        ({"max_length": 4}, "max_length is 4; it must be between 8 and 512."),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be above 0."),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1."),
    ],
)
def test_numbers_out_of_range_are_refused(job: ConvertJob, change: dict, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(job, **change)
    assert str(caught.value) == sentence


def test_too_few_texts_and_nothing_to_resume_are_refused(job: ConvertJob, tmp_path: Path) -> None:
    few = write_toy_data(tmp_path / "few.jsonl", TaskKind.MULTICLASS, 20)
    with pytest.raises(InputError, match="20 texts are too few; 256 are held out"):
        run_convert(dataclasses.replace(job, data=(few,), out=tmp_path / "out"))
    with pytest.raises(InputError, match=r"There is nothing to resume in .*: it holds no checkpoints"):
        run_convert(dataclasses.replace(job, out=tmp_path / "out", resume=True))
    with pytest.raises(InputError, match="no column 'body', only 'text', 'label'; see --text-column"):
        run_convert(dataclasses.replace(job, text_column="body", out=tmp_path / "out"))
