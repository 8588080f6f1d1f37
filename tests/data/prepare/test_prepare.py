"""Complete preparations: rows kept and dropped, reasons, and equal bytes on each run, in this process and on Beam."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from classer.data.errors import InputError
from classer.data.prepare.local import prepare
from classer.data.prepare.plan import PrepareConfig, PreparePlan, read_manifest
from classer.data.prepare.steps import split_of
from classer.data.records import decode_record
from classer.data.tokenizer import WordPieceTokenizer
from classer.tests.helpers import VOCAB

WORDS = [word for word in VOCAB if word.isalpha()]


@contextlib.contextmanager
def silent(stage: str, unit: str, total: int | None) -> Iterator[Any]:
    yield SimpleNamespace(update=lambda n: None)


def text_of(rng: np.random.Generator) -> str:
    return " ".join(str(word) for word in rng.choice(WORDS, rng.integers(12, 30)))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files of one task with rejects, duplicates and contamination, an evaluation set, and a tokenizer."""
    rng = np.random.default_rng(0)
    texts = [text_of(rng) for _ in range(300)]
    rows: list[Any] = [{"text": text, "label": f"label {i % 3}"} for i, text in enumerate(texts)]
    rows[50] = {"text": f"  {texts[10].upper()}  ", "label": "label 0"}
    rows[200] = {"text": f"{texts[20]} card", "label": "label 0"}
    rows[201] = {"text": texts[5], "label": "label 1"}
    held_out = [text_of(rng), f"{texts[30]} money"]
    rows[100] = {"text": held_out[0].title(), "label": "label 0"}
    (tmp_path / "in").mkdir()
    lines = [json.dumps(row) for row in rows]
    lines[60], lines[61], lines[62] = "{", json.dumps({"text": "x"}), json.dumps({"text": " \0 ", "label": "a"})
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines[:150]) + "\n")
    (tmp_path / "in" / "b.jsonl").write_bytes(b'{"text": "\xff"}\n' + "\n".join(lines[150:]).encode())
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    WordPieceTokenizer(tmp_path / "vocab.txt").save(tmp_path / "tokenizer")
    return tmp_path


def plan_of(corpus: Path, out: str = "out", **settings: Any) -> PreparePlan:
    config = PrepareConfig(**({"dev_fraction": 0.2, "records_per_shard": 50, "max_length": 24} | settings))
    return PreparePlan.make(config, [corpus / "in"], [corpus / "held_out.jsonl"], corpus / "tokenizer", corpus / out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_row_is_kept_or_has_a_reason(corpus: Path) -> None:
    manifest, new = prepare(plan_of(corpus), progress=silent)
    assert new
    assert manifest["counts"] == {
        "read": 301,
        "rejected": 4,
        "duplicates": 2,
        "contaminated": 2,
        "near_duplicates": 1,
        "kept": 292,
    }
    lines = [json.loads(line) for line in (corpus / "out" / "rejects.jsonl").open()]
    assert [(Path(line["file"]).name, line["row"]) for line in lines] == [
        *(("a.jsonl", row) for row in (61, 62, 63)),
        ("b.jsonl", 1),
    ]
    rejects = [line["reason"] for line in lines]
    places = [f"{corpus}/in/a.jsonl, line {n}" for n in (61, 62, 63)] + [f"{corpus}/in/b.jsonl, line 1"]
    assert [reason[: len(place)] for reason, place in zip(rejects, places, strict=True)] == places
    dropped = [json.loads(line) for line in (corpus / "out" / "dropped.jsonl").open()]
    found = {
        (Path(d["file"]).name, d["row"]): (d["reason"], d.get("of_row", d.get("evaluation_text"))) for d in dropped
    }
    assert found == {
        ("a.jsonl", 31): ("contaminated", 1),
        ("a.jsonl", 51): ("duplicate", 11),
        ("a.jsonl", 101): ("contaminated", 0),
        ("b.jsonl", 52): ("near-duplicate", 21),
        ("b.jsonl", 53): ("duplicate", 6),
    }


def test_shards_hold_the_texts_tokens_and_labels(corpus: Path) -> None:
    manifest, _ = prepare(plan_of(corpus), progress=silent)
    tokenizer = WordPieceTokenizer.from_folder(corpus / "tokenizer")
    rows = [json.loads(line) for line in (corpus / "in" / "a.jsonl").read_text().splitlines() if line != "{"]
    expected = {tuple(tokenizer.encode([row["text"]], 24).ids[0]): row.get("label") for row in reversed(rows)}
    labels = [label["name"] for label in manifest["tasks"][0]["labels"]]
    met = 0
    for split, found in manifest["splits"].items():
        hashes = []
        for shard in found["shards"]:
            data = ArrayRecordReader(str(corpus / "out" / shard["file"]))
            records = [decode_record(record, manifest["vocab_size"]) for record in data.read_all()]
            assert len(records) == shard["records"]
            assert [len(r.ids) for r in records] == np.load(corpus / "out" / shard["lengths"]).tolist()
            for record in records:
                assert split_of(record.text_hash, 0.2) == split
                if tuple(record.ids) in expected:
                    met += 1
                    assert [labels[i] for i in record.labels] == [expected[tuple(record.ids)]]
            hashes += [record.text_hash for record in records]
        assert len(set(hashes)) == found["lengths"]["records"]
    assert len(manifest["splits"]["train"]["shards"]) > 2
    assert met == 150 - 3 - 3  # of the first file: three rejected, three dropped


def test_a_second_run_makes_the_same_bytes_and_a_third_does_nothing(corpus: Path) -> None:
    prepare(plan_of(corpus), progress=silent)
    prepare(plan_of(corpus, "again"), workers=2, progress=silent)
    assert contents(corpus / "out") == contents(corpus / "again")
    before = contents(corpus / "out")
    _, new = prepare(plan_of(corpus), progress=silent)
    assert not new
    assert contents(corpus / "out") == before


def test_beam_makes_the_same_bytes(corpus: Path) -> None:
    from classer.data.prepare import on_beam

    prepare(plan_of(corpus), progress=silent)
    on_beam.prepare(plan_of(corpus, "beam"), runner="DirectRunner", progress=silent)
    assert contents(corpus / "out") == contents(corpus / "beam")


def test_a_run_that_was_broken_off_is_made_anew(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(plan_of(corpus, "whole"), progress=silent)
    with monkeypatch.context() as patch:
        patch.setattr("classer.data.prepare.local.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(plan_of(corpus), progress=silent)
    (corpus / "out" / "train-00099-of-00100.array_record").touch()
    prepare(plan_of(corpus), progress=silent)
    assert contents(corpus / "out") == contents(corpus / "whole")


def test_a_run_that_is_killed_while_it_clears_up_is_made_anew(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(plan_of(corpus, "whole"), progress=silent)
    for name in ("classer.data.prepare.local.finish", "pathlib.Path.mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prepare(plan_of(corpus), progress=silent)
        (corpus / "out").mkdir(exist_ok=True)
        (corpus / "out" / "rejects.jsonl").touch()
    prepare(plan_of(corpus), progress=silent)
    assert contents(corpus / "out") == contents(corpus / "whole")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.csv", b'text,label\nrain,a\n"snow,b\nstorm,c\n', r"c\.csv, row 2 \(line 3\): not valid CSV"),
        (
            "c.csv.gz",
            gzip.compress(b"text,label\n" + b"rain,a\n" * 20)[:-9],
            r"c\.csv\.gz is no complete gzip file; after line \d+:",
        ),
    ],
    # Explicit, because gzip bytes contain the time: ids made from them would differ between pytest workers.
    ids=["open quotation", "cut gzip"],
)
def test_a_file_that_cannot_be_read_to_its_end_ends_the_run(corpus: Path, name: str, content: bytes, said: str) -> None:
    """The number of lost rows would be unknown. Once the file is repaired, the same command succeeds."""
    (corpus / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        prepare(plan_of(corpus), progress=silent)
    (corpus / "in" / name).unlink()
    manifest, _ = prepare(plan_of(corpus), progress=silent)
    assert manifest["counts"]["kept"] == 292


def test_what_another_plan_made_or_somebody_changed_is_not_touched(corpus: Path) -> None:
    manifest, _ = prepare(plan_of(corpus), progress=silent)
    with pytest.raises(InputError, match="max_length 24 → 32"):
        prepare(plan_of(corpus, max_length=32), progress=silent)
    (corpus / "out" / manifest["files"][0]["file"]).write_bytes(b"")
    with pytest.raises(InputError, match="has changed since it was made"):
        prepare(plan_of(corpus), progress=silent)
    (corpus / "mine").mkdir()
    (corpus / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"holds other files \(thesis.txt\)"):
        prepare(plan_of(corpus, "mine"), progress=silent)
    with pytest.raises(InputError, match="no manifest"):
        read_manifest(corpus / "mine")


def test_task_folders_bring_their_evaluation_sets_and_their_labels(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "topics"
    folder.mkdir()
    task = {"name": "topic", "kind": "multiclass", "labels": [{"name": "b"}, {"name": "a"}, {"name": "never"}]}
    (folder / "task.json").write_text(json.dumps(task))
    rows = [{"text": f"rain and snow {i} {'goal ' * i}", "labels": ["ab"[i % 2]]} for i in range(9)]
    (folder / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "labels": ["c"]}])
    )
    (folder / "test.jsonl").write_text(json.dumps(rows[3]) + "\n")
    config = PrepareConfig(dev_fraction=0, near_duplicates=0)
    plan = PreparePlan.make(config, [folder, corpus / "in"], [], corpus / "tokenizer", tmp_path / "out")
    manifest, _ = prepare(plan, progress=silent)
    topic, other = manifest["tasks"]
    assert [label["name"] for label in topic["labels"]] == ["b", "a", "never"]
    assert (topic["rows"], topic["label_counts"], other["name"]) == (8, [3, 5, 0], "in")
    assert manifest["counts"]["contaminated"] == 1
    reasons = (tmp_path / "out" / "rejects.jsonl").read_text()
    assert "the task 'topic' has no label 'c'" in reasons


def test_datasets_saved_by_hugging_face(tmp_path: Path, corpus: Path) -> None:
    import pyarrow as pa

    features = {
        "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    schema = pa.schema({"text": pa.string(), "label": pa.int64()})
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    saved = tmp_path / "reviews"
    for split, labels in (("train", [1, 0, 1, -1]), ("test", [0])):
        (saved / split).mkdir(parents=True)
        table = pa.table({"text": [f"{split} soup {i}" for i in range(len(labels))], "label": labels}, schema=schema)
        with pa.ipc.new_stream(saved / split / "data-00000-of-00001.arrow", schema) as writer:
            writer.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (saved / split / "state.json").write_text(json.dumps(state))
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    config = PrepareConfig(dev_fraction=0, near_duplicates=0)
    plan = PreparePlan.make(config, [saved], [], corpus / "tokenizer", tmp_path / "out")
    assert [path.parent.name for path in plan.evaluation] == ["test"]
    manifest, _ = prepare(plan, progress=silent)
    (task,) = manifest["tasks"]
    assert ([label["name"] for label in task["labels"]], task["label_counts"]) == (["neg", "pos"], [1, 2])
    assert manifest["counts"]["rejected"] == 1


@pytest.mark.parametrize(
    ("inputs", "evaluation", "said"),
    [
        (["nowhere"], [], "There is no file or folder"),
        (["empty"], [], "has nothing to train on"),
        (["in"], ["nowhere.jsonl"], "is no evaluation set"),
        (["in"], ["in/a.jsonl"], "as an input and as an evaluation set"),
    ],
)
def test_inputs_that_cannot_be_used(corpus: Path, inputs: list[str], evaluation: list[str], said: str) -> None:
    (corpus / "empty").mkdir()
    with pytest.raises(InputError, match=said):
        PreparePlan.make(
            PrepareConfig(),
            [corpus / name for name in inputs],
            [corpus / name for name in evaluation],
            corpus / "tokenizer",
            corpus / "out",
        )


def test_when_no_row_is_usable_the_first_reason_is_said(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "no label"}\n')
    plan = PreparePlan.make(PrepareConfig(), [tmp_path / "bad.jsonl"], [], corpus / "tokenizer", tmp_path / "out")
    with pytest.raises(InputError, match=r"None of the 1 rows can be used: .*no column 'label'"):
        prepare(plan, progress=silent)
