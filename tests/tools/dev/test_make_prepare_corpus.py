"""The corpus with planted duplicates for the benchmark of `classer prepare`."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from classer.tools.bench import input as bench_input
from classer.tools.dev import make_prepare_corpus

SENTENCE = "This is the sentence of number {} and it is long enough to be a piece of a row. "


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    folder = tmp_path / "datasets" / "one"
    folder.mkdir(parents=True)
    for split, first in (("train", 0), ("test", 1000)):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(
                json.dumps({"text": SENTENCE.format(i) + SENTENCE.format(i + 200)}) + "\n"
                for i in range(first, first + 50)
            )

    def run(*arguments: object, module: ModuleType = make_prepare_corpus) -> int:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        return module.main()

    return run


def test_what_is_planted_is_written_down(run: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    assert run("--datasets", tmp_path / "datasets", "--rows", 400, "--out", out) == 0
    rows = [json.loads(line) for line in (out / "train" / "part-000.jsonl").read_text().splitlines()]
    planted = [json.loads(line) for line in (out / "planted.jsonl").read_text().splitlines()]
    assert len(rows) == 400
    held_out = {json.loads(line)["text"] for line in (out / "evaluation.jsonl").read_text().splitlines()}
    copies = [rows[one["row"] - 1]["text"] for one in planted if one["kind"] == "evaluation"]
    assert copies
    assert {" ".join(copy.lower().split()) for copy in copies} <= {" ".join(text.lower().split()) for text in held_out}


def test_what_it_cannot_use_is_said_and_nothing_is_made(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for arguments, module, sentence in (
        (("--datasets", there, "--out", tmp_path / "out"), make_prepare_corpus, "holds no data sets"),
        (("--datasets", tmp_path / "datasets", "--out", there), make_prepare_corpus, "exists already"),
        (("--out", tmp_path / "out", "--check", there), make_prepare_corpus, "There is no"),
        ((there,), bench_input, "holds no prepared data"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments, module=module)
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(there.iterdir())
