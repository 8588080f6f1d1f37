import json
import re
import struct
import warnings
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classer.data.taxonomy import Label, Task, TaskKind
from classer.model.decode import Calibration, choose_all, probabilities
from classer.train.metrics import evaluate
from classer.train.pictures import GRID_LABELS, most_confused
from classer.train.report import confusion_counts, worst_confusions, write_report

HOSTILE = (r"$\frac{$", "a|b", "two\nlines", "*bold*", "卡片", "x" * 300, "_under_", "<b>", "back\\slash", "[link](x)")


def names(count: int) -> tuple[str, ...]:
    return (HOSTILE + tuple(f"a_label_of_some_length_{i}" for i in range(count)))[:count]


def report(folder: Path, kind: TaskKind, label_names: tuple[str, ...], n: int, sharpness: float = 4.0) -> str:
    """Writes a report of made-up predictions, warnings being errors; gives report.md."""
    task = Task("t", kind, tuple(map(Label, label_names)))
    rng, count = np.random.default_rng(0), len(label_names)
    if kind.exclusive:
        targets = np.eye(count, dtype=np.float32)[rng.integers(0, count, n)]
    else:
        targets = (rng.uniform(size=(n, count)) < 0.2).astype(np.float32)
    logits = (targets - 0.5) * sharpness + rng.normal(size=(n, count))
    probs = probabilities(task, logits, Calibration())
    chosen = choose_all(task, probs, Calibration(thresholds=(0.5,) * count))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(folder, task, evaluate(task, probs, targets, chosen), probs, targets, chosen, "made up, test")
    return (folder / "report.md").read_text(encoding="utf-8")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize("count", [2, 5, 30, 150])
@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_report_of_any_number_of_labels(tmp_path, kind, count):
    text = report(tmp_path / "new" / "folder", kind, names(count), 200)
    picture = "confusion_matrix.png" if kind.exclusive else "label_f1.png"
    files = {"metrics.json", "report.md", "reliability.png", picture}
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == files
    for file in re.findall(r"\]\((\w+\.png)\)", text):
        width, height = png_size(tmp_path / "new" / "folder" / file)
        assert 400 < width < 2400
        assert 200 < height < 2600
    facts = json.loads((tmp_path / "new" / "folder" / "metrics.json").read_text(encoding="utf-8"))
    assert (facts["task"], facts["kind"], len(facts["labels"])) == ("t", kind.value, count)


@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_names_cannot_break_a_table(tmp_path, kind):
    text = report(tmp_path, kind, HOSTILE, 300, sharpness=1.0)
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        bars = {len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().split("\n")}
        assert len(bars) == 1
    assert r"\[link\](x)" in text


@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_no_texts_and_no_errors_are_reported_too(tmp_path, kind):
    empty = report(tmp_path / "empty", kind, names(30), 0)
    faultless = report(tmp_path / "faultless", kind, names(30), 50, sharpness=100.0)
    said = "No text was given a wrong label." if kind.exclusive else "No decision was wrong."
    assert said in empty
    assert said in faultless
    assert "100.00%" in faultless


def test_report_holds_the_numbers(tmp_path):
    task = Task("pets", TaskKind.BINARY, (Label("cat"), Label("dog")))
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]], np.float32)
    targets = np.eye(2)[[0, 0, 1, 1]]
    chosen = choose_all(task, probs, Calibration())
    write_report(tmp_path, task, evaluate(task, probs, targets, chosen), probs, targets, chosen, "pets, test")
    text = (tmp_path / "report.md").read_text()
    assert "| accuracy | 75.00% |" in text
    assert "| dog | cat | 1 | 50.0% |" in text
    assert text.index("| dog | 66.7% | 100.0% | 50.0% | 2 | 1 |") < text.index(
        "| cat | 80.0% | 66.7% | 100.0% | 2 | 3 |"
    )


def test_multilabel_report_counts_missed_and_wrongly_chosen(tmp_path):
    task = Task("t", TaskKind.MULTILABEL, (Label("a"), Label("b")))
    targets = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    probs = np.array([[0.9, 0.9], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9]], np.float32)
    chosen = choose_all(task, probs, Calibration(thresholds=(0.5, 0.5)))
    write_report(tmp_path, task, evaluate(task, probs, targets, chosen), probs, targets, chosen, "x")
    text = (tmp_path / "report.md").read_text()
    assert text.index("| b | 0 | 2 |") < text.index("| a | 1 | 0 |")


counts = st.integers(1, 40).flatmap(lambda n: hnp.arrays(np.int64, (n, n), elements=st.integers(0, 5)))


@given(counts)
def test_most_confused_labels_are_different_and_hold_the_worst_pair(counts_LL):
    chosen = most_confused(counts_LL, GRID_LABELS)
    assert len(chosen) == len(set(chosen)) == min(GRID_LABELS, len(counts_LL))
    both = counts_LL + counts_LL.T
    np.fill_diagonal(both, 0)
    inside = both[np.ix_(chosen, chosen)]
    assert inside.max() == both.max()


def test_confused_partners_stand_side_by_side():
    counts = np.diag([9] * 40)
    counts[3, 31] = counts[12, 7] = 5
    counts[31, 20] = 2
    assert most_confused(counts, 6)[:3] in ([3, 31, 20], [7, 12, 3])
    chain = most_confused(counts, 6)
    for a, b in ((3, 31), (31, 20), (7, 12)):
        assert abs(chain.index(a) - chain.index(b)) == 1


def test_confusion_counts_and_worst_confusions():
    targets, said = np.eye(3)[[0, 0, 0, 1, 2, 2]], np.eye(3)[[0, 1, 1, 1, 0, 2]]
    counted = confusion_counts(targets, said.astype(bool))
    np.testing.assert_array_equal(counted, [[1, 2, 0], [0, 1, 0], [1, 0, 1]])
    assert worst_confusions(counted, 10) == [(0, 1, 2), (2, 0, 1)]
    assert worst_confusions(counted, 1) == [(0, 1, 2)]


def test_of_very_many_labels_those_with_most_errors_are_counted(tmp_path: Path) -> None:
    count = 1200
    task = Task("many", TaskKind.MULTICLASS, tuple(Label(f"label {i}") for i in range(count)))
    true_N = np.arange(count)
    said_N = np.where(true_N % 10 == 7, (true_N + 1) % count, true_N)
    targets_NL, chosen_NL = np.eye(count, dtype=np.float32)[true_N], np.eye(count)[said_N] > 0
    probs_NL = chosen_NL.astype(np.float32)
    metrics = evaluate(task, probs_NL, targets_NL, chosen_NL)
    write_report(tmp_path, task, metrics, probs_NL, targets_NL, chosen_NL, "many")
    said = (tmp_path / "report.md").read_text()
    assert "120 texts were given a wrong label" in said
    assert "| label 7 | label 8 | 1 | 100.0% |" in said
