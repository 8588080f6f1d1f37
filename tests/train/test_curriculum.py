"""Curricula: files, what stages are planned from them, and the preset's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from classer.data.errors import InputError
from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.tests.helpers import CURRICULUM, TOPICS, TOY_TASKS, TREE, write_task
from classer.train.config import CurriculumStage, TrainJob, read_curriculum
from classer.train.curriculum import plan_curriculum
from classer.train.presets import multitask
from classer.train.run import train


def planned(*stages: CurriculumStage, sizes: tuple[int, ...] = (100, 300, 100)):
    return plan_curriculum(stages, Taxonomy(TOY_TASKS), sizes, 10)


def test_a_stage_is_as_long_as_its_epochs_and_replays_on_top() -> None:
    first, second = planned(*CURRICULUM)
    assert (first.tasks, first.new, first.seen) == (("topic",), ("topic",), ("topic",))
    assert (first.num_steps, first.num_evals) == (40, 4)
    assert second.new == ("topics", "where")
    assert second.seen == ("topic", "topics", "where")
    np.testing.assert_allclose(second.shares_T, [0.2, 0.72, 0.08])
    assert second.num_steps == pytest.approx(30 * 400 / 0.8 / 10, abs=30)


def test_a_stage_in_steps_without_names_is_for_all_tasks() -> None:
    (only,) = planned(CurriculumStage("all", steps=7, weights={"topic": 3}))
    assert (only.num_steps, only.num_evals) == (7, 1)
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
