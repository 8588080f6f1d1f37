"""`classer teach`: what teachers of transformers say, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from classer.tests.helpers import TREE, toy_text
from classer.tools.cli.main import main


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
