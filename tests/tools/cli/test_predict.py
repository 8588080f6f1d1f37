"""`classer predict`: every format and codec, pipes, real kills, full disks, a real server and Beam."""

from __future__ import annotations

import csv
import datetime
import functools
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from classer.model.bundle import Bundle, load_bundle, save_bundle
from classer.tests.helpers import make_bundle
from classer.tools.bulk import chunks
from classer.tools.cli.main import main

from ..conftest import COMMAND, Classer, Trained

TEXTS = ["the rain", "my card has not arrived ?", "soup, bread", 'a "goal"', "wind\nstorm", "snow", "team " * 400]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved bundle with a multiclass and a multilabel task."""
    folder = tmp_path_factory.mktemp("predict")
    save_bundle(make_bundle(folder), folder / "bundle")
    return folder / "bundle"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows, so that seven texts make three."""
    monkeypatch.setattr(chunks, "BATCH_ROWS", 3)
    monkeypatch.setattr("classer.data.tables.BATCH_ROWS", 3)


@functools.cache
def loaded(bundle: Path) -> Bundle:
    return load_bundle(bundle)


def expected(bundle: Path, texts: Sequence[str], task: str = "topic") -> tuple[list[str], np.ndarray]:
    """The best label of each text and all scores, without the code under test."""
    model = loaded(bundle)
    ids = model.tokenizer.encode(texts, model.max_length).ids
    probs_NL = model.probabilities(task, model.predictor().logits(ids))
    names = model.taxonomy.task(task).label_names
    return [names[i] for i in probs_NL.argmax(axis=1)], probs_NL


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Columns in the format that the file's suffixes name."""
    _, kind, *codec = path.name.split(".")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
        return path
    text = io.StringIO()
    if kind == "jsonl":
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(text, list(columns), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    with pa.output_stream(path, compression={"gz": "gzip", "zst": "zstd"}.get("".join(codec))) as file:
        file.write(text.getvalue().encode())
    return path


def read(path: Path) -> list[dict[str, Any]]:
    _, kind, *codec = path.name.split(".") if "rejects" not in path.name else ("", "jsonl")
    if kind == "parquet":
        return pq.read_table(path).to_pylist()
    with pa.input_stream(path, compression={"gz": "gzip", "zst": "zstd"}.get("".join(codec))) as file:
        text = file.read().decode()
    if kind == "jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == "tsv" else ","))


def predict(bundle: Path, data: Path, out: Path, *options: object) -> list[dict[str, Any]]:
    arguments = [bundle, "--data", data, "--out", out, "--task", "topic", "--precision", "float32", *options]
    assert main(["predict", *map(str, arguments)]) == 0
    assert not out.with_name(out.name + ".part").exists()
    return read(out)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("csv", "csv"),
        ("csv.gz", "csv.zst"),
        ("tsv.zst", "tsv.gz"),
        ("csv", "tsv"),
        ("tsv", "jsonl"),
        ("jsonl", "jsonl.gz"),
        ("jsonl.gz", "jsonl.zst"),
        ("jsonl.zst", "csv.gz"),
        ("csv.zst", "parquet"),
        ("jsonl", "parquet"),
        ("parquet", "parquet"),
        ("parquet", "csv"),
        ("parquet", "jsonl"),
    ],
)
def test_every_format_and_codec(bundle: Path, tmp_path: Path, source: str, target: str) -> None:
    data = write(tmp_path / f"in.{source}", {"id": list("abcdefg"), "text": TEXTS})
    rows = predict(bundle, data, tmp_path / f"out.{target}")
    labels, probs_NL = expected(bundle, TEXTS)
    assert [list(row) for row in rows] == [["id", "text", "label", "score", "truncated"]] * 7
    assert [row["id"] for row in rows] == list("abcdefg")
    assert [row["text"] for row in rows] == TEXTS
    assert [row["label"] for row in rows] == labels
    np.testing.assert_allclose([float(row["score"]) for row in rows], probs_NL.max(axis=1), atol=1e-5)
    truncated = [False] * 6 + [True]
    named = [str(value).lower() for value in truncated]
    assert [row["truncated"] for row in rows] == (named if target[:3] in ("csv", "tsv") else truncated)
    assert not (tmp_path / f"out.{target}.rejects.jsonl").exists()


def test_rows_of_csv_keep_their_own_characters(bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "in.csv"
    data.write_bytes(
        b'\xef\xbb\xbf"id",text,\r\n"1",plain,1.50\r\n\r\n2,"two\r\nlines, and ""quotes""", x \r\n3,end,"",'
    )
    data.write_bytes(data.read_bytes()[:-1])  # no end of line
    predict(bundle, data, tmp_path / "out.csv")
    lines = (tmp_path / "out.csv").read_bytes().split(b"\r\n")
    assert lines[0] == b'"id",text,,label,score,truncated'
    assert lines[1].startswith(b'"1",plain,1.50,topic ')
    assert lines[2:4] == [b'2,"two', lines[3]]
    assert lines[3].startswith(b'lines, and ""quotes""", x ,topic ')
    assert lines[4].startswith(b'3,end,"",topic ')
    assert lines[4].endswith(b",false\n")


def test_rows_of_json_keep_their_own_characters(bundle: Path, tmp_path: Path) -> None:
    own = ['{"n": 1.0e3, "text": "\\u0061 card", "deep": {"x": [1, null, 1.10]} }', '{"text":"snow"}']
    data = tmp_path / "in.jsonl"
    data.write_text("\n\n".join(own))
    predict(bundle, data, tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert lines[0].startswith('{"n": 1.0e3, "text": "\\u0061 card", "deep": {"x": [1, null, 1.10]}, "label": "topic')
    assert lines[1].startswith('{"text":"snow", "label": "topic ')


def test_parquet_keeps_its_schema(bundle: Path, tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(TEXTS, pa.large_string()),
            "when": pa.array([datetime.datetime(2026, 1, 1)] * 7, pa.timestamp("us", "UTC")),
            "kind": pa.array(list("aabbcca")).dictionary_encode(),
            "deep": pa.array([[{"x": i}] for i in range(7)], pa.list_(pa.struct([("x", pa.int16())]))),
            "raw": pa.array([b"\xff"] * 7),
        }
    ).replace_schema_metadata({"mine": "kept"})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=4)
    predict(bundle, tmp_path / "in.parquet", tmp_path / "out.parquet")
    out = pq.read_table(tmp_path / "out.parquet")
    assert out.select(table.column_names).equals(table)
    assert out.schema.metadata[b"mine"] == b"kept"
    appended = [out.schema.field(name).type for name in ("label", "score", "truncated")]
    assert appended == [pa.string(), pa.float32(), pa.bool_()]
    (row, *_) = predict(bundle, tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert (row["when"], row["deep"], row["raw"]) == ("2026-01-01T00:00:00+00:00", [{"x": 0}], "/w==")


def test_json_lines_of_mixed_types_become_parquet_or_a_sentence(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    data = write(tmp_path / "in.jsonl", {"text": TEXTS, "n": [1, None, 2.5, 1, 1, 1, 1]})
    assert [row["n"] for row in predict(bundle, data, tmp_path / "out.parquet")] == [1, None, 2.5, 1, 1, 1, 1]
    write(data, {"text": TEXTS, "n": [1, None, "x", 1, 1, 1, 1]})
    assert run(bundle, data, tmp_path / "no.parquet") == 2
    assert "'n' holds values of several types" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["csv", "jsonl", "parquet"])
def test_a_multilabel_task_and_all_scores(bundle: Path, tmp_path: Path, target: str) -> None:
    data = write(tmp_path / "in.csv", {"text": TEXTS})
    out = tmp_path / f"out.{target}"
    options = ("--task", "tags", "--threshold", "0.5", "--all-scores", "--prefix", "p_", "--precision", "float32")
    assert run(bundle, data, out, *options) == 0
    _, probs_NL = expected(bundle, TEXTS, "tags")
    names = loaded(bundle).taxonomy.task("tags").label_names
    for row, probs_L in zip(read(out), probs_NL, strict=True):
        assert list(row) == ["text", "p_labels", "p_scores", "p_truncated"]
        chosen = [names[i] for i in np.argsort(-probs_L, kind="stable") if probs_L[i] >= np.float32(0.5)]
        assert row["p_labels"] == ("|".join(chosen) if target == "csv" else chosen)
        scores = json.loads(row["p_scores"]) if target == "csv" else row["p_scores"]
        assert list(scores) == list(names)
        np.testing.assert_allclose(list(scores.values()), probs_L, atol=1e-5)


def test_a_label_that_does_not_reach_the_threshold_is_missing(bundle: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", {"text": TEXTS})
    rows = predict(bundle, data, tmp_path / "out.jsonl", "--threshold", "1")
    assert {row["label"] for row in rows} == {None}
    np.testing.assert_allclose([row["score"] for row in rows], expected(bundle, TEXTS)[1].max(axis=1), atol=1e-5)


def test_rows_that_cannot_be_classified_go_to_the_rejects(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    lines = [
        *('{"text": "snow"}', '{"text": null}', "no JSON", '{"other": 1}', '{"text": "  "}', '{"text": 7}'),
        *(json.dumps({"text": "x" * 1_000_001}), '{"text": "\\ud83d"}', "\xff", '{"text": "rain"}', "[]"),
    ]
    (tmp_path / "in.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    rows = predict(bundle, tmp_path / "in.jsonl", tmp_path / "out.csv")
    assert [row["text"] for row in rows] == ["snow", "rain"]
    rejects = read(tmp_path / "out.csv.rejects.jsonl")
    assert [reject["row"] for reject in rejects] == [2, 3, 4, 5, 6, 7, 8, 9, 11]
    for reject, said in zip(
        rejects,
        (
            "null",
            "not valid JSON",
            "no column 'text'",
            "empty",
            "a number",
            "1,000,001",
            "surrogate",
            "UTF-8",
            "object",
        ),
        strict=True,
    ):
        assert said in reject["reason"]
        assert f"in.jsonl, line {reject['row']}" in reject["reason"]
    errors = capsys.readouterr().err
    assert "2 rows classified" in errors
    assert f"9 rows could not be classified; {tmp_path / 'out.csv.rejects.jsonl'} says why" in errors


def run(bundle: Path, data: Path, out: Path, *options: object) -> int:
    task = () if "--task" in options else ("--task", "topic")
    return main(["predict", *map(str, (bundle, "--data", data, "--out", out, *task, *options))])


def test_bad_input_is_one_sentence_and_nothing_is_overwritten(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    data = write(tmp_path / "in.csv", {"text": TEXTS, "label": TEXTS})
    there = tmp_path / "there.csv"
    there.write_text("mine")
    (tmp_path / "out.csv.rejects.jsonl").write_text("mine")
    out = tmp_path / "new.csv"
    for arguments, said in (
        ((data, there), "there.csv exists already and was not touched"),
        ((data, tmp_path / "out.csv"), "out.csv.rejects.jsonl exists already and was not touched"),
        ((data, tmp_path / "no" / "out.csv"), "there is no folder"),
        ((data, tmp_path / "out.xlsx"), "must end in one of .csv, .tsv, .jsonl, .csv.gz"),
        ((data, out), "has a column 'label' already; give the predicted columns other names with --prefix"),
        ((data, out, "--text-column", "body"), "no column 'body', only 'text', 'label'"),
        ((tmp_path / "no.csv", out), "There is no file"),
        ((data, out, "--threshold", "2"), "a score lies between 0 and 1"),
        ((data, out, "--focus", "0.5"), "not trained for focus"),
        ((data, out, "--task", "color"), "color"),
        ((data, out, "--server", "localhost:1"), "a bundle, or --server HOST:PORT, and not both"),
        ((data, out, "--input-format", "csv"), "--input-format is of a pipe"),
        ((tmp_path, out), "has no task.json"),
    ):
        assert run(bundle, *map(Path, arguments[:2]), *arguments[2:]) == 2, said
        errors = capsys.readouterr().err
        assert said in errors
        assert errors.count("\n") == 1 + errors.count("rows/s")
        assert not out.exists()
    assert there.read_text() == (tmp_path / "out.csv.rejects.jsonl").read_text() == "mine"
    (tmp_path / "empty.csv").write_text("text\n")
    assert run(bundle, tmp_path / "empty.csv", out) == 2
    assert "no row that can be read" in capsys.readouterr().err


def test_a_task_folder_is_taken_as_train_takes_it(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text("{}")
    write(tmp_path / "dev.csv.gz", {"text": TEXTS})
    assert len(predict(bundle, tmp_path, tmp_path / "out.jsonl", "--split", "dev")) == 7


def test_another_input_or_other_options_do_not_go_on(bundle: Path, tmp_path: Path, capsys: Any, monkeypatch) -> None:
    data = write(tmp_path / "in.csv", {"text": TEXTS})
    out = tmp_path / "out.csv"
    with monkeypatch.context() as broken:
        broken.setattr("classer.tools.bulk.parts.Parts.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(bundle, data, out, "--precision", "float32")
    assert run(bundle, data, out, "--precision", "bfloat16") == 2
    assert "was begun with precision = 'float32', and not 'bfloat16'" in capsys.readouterr().err
    write(data, {"text": [*TEXTS[:-1], "other"]})
    assert run(bundle, data, out, "--precision", "float32") == 2
    assert "The input is not the one" in capsys.readouterr().err
    write(data, {"text": TEXTS})
    assert run(bundle, data, out, "--precision", "float32") == 0
    assert len(read(out)) == 7


# Real processes


def many(tmp_path: Path, count: int = 40_000) -> Path:
    rng = np.random.default_rng(0)
    words = " ".join(TEXTS[:6]).split()
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 12))) for _ in range(count - 1)]
    return write(tmp_path / "many.csv", {"n": list(range(count)), "text": [*texts, " "]})


@pytest.mark.slow
def test_killed_three_times_it_goes_on_to_the_same_output(bundle: Path, tmp_path: Path, classer: Classer) -> None:
    data, out = many(tmp_path), tmp_path / "out.parquet"
    options = ("--data", data, "--task", "topic", "--precision", "float32")
    done = classer("predict", bundle, *options, "--out", tmp_path / "whole.parquet")
    assert done.returncode == 0, done.stderr
    part = tmp_path / "out.parquet.part"
    for wanted in (2, 4, 7):
        command = [*COMMAND, "predict", str(bundle), *map(str, options), "--out", str(out)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while len(list(part.glob("*.rows"))) < wanted:
                assert process.poll() is None
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not out.exists()
    assert wanted <= len(list(part.glob("*.rows"))) < 10
    done = classer("predict", bundle, *options, "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    rejects = [tmp_path / f"{name}.parquet.rejects.jsonl" for name in ("out", "whole")]
    assert rejects[0].read_bytes() == rejects[1].read_bytes()
    assert [reject["row"] for reject in read(rejects[0])] == [40_000]
    assert not part.exists()


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    bundle: Path, tmp_path: Path, classer: Classer
) -> None:
    data, out = many(tmp_path, 9_000), tmp_path / "out.csv"
    command = [*COMMAND, "predict", str(bundle), "--data", str(data), "--out", str(out), "--task", "topic"]
    command += ["--precision", "float32"]
    full = subprocess.run(
        ["bash", "-c", 'ulimit -f 400; exec "$@"', "bash", *command],  # KB
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        check=False,
    )
    last = full.stderr.splitlines()[-1]
    assert (full.returncode, full.stdout) == (2, ""), full.stderr
    assert "could not be written: file too large. Finished rows stay in" in last
    assert "Traceback" not in full.stderr
    assert not out.exists()
    assert list((tmp_path / "out.csv.part").glob("*.rows"))
    done = classer(*command[len(COMMAND) :])
    assert done.returncode == 0, done.stderr
    assert len(read(out)) == 8_999


def test_pipes(bundle: Path, classer: Classer) -> None:
    options = ("predict", bundle, "--task", "topic", "--precision", "float32", "--data", "-", "--out", "-")
    done = classer(*options, stdin=b'{"text": "snow", "n": 1.0}\n{"text": ""}\n')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('{"text": "snow", "n": 1.0, "label": "topic ')
    assert done.stdout.count("\n") == 1
    assert "Left out: standard input, line 2: 'text' is empty" in done.stderr
    done = classer(*options, "--input-format", "csv", "--output-format", "tsv", stdin=b"text,n\nsnow,1\n")
    assert done.stdout.startswith("text\tn\tlabel\tscore\ttruncated\nsnow\t1\ttopic ")


def test_a_reader_that_stops_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    data = many(tmp_path, 9_000)
    command = [*COMMAND, "predict", str(bundle), "--data", str(data), "--out", "-", "--task", "topic"]
    command += ["--precision", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"n,text,label,score,truncated\r\n"
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 128 + signal.SIGPIPE
    process.stderr.close()
    assert "the reader of standard output stopped" in errors
    assert "Traceback" not in errors


def test_a_server_predicts_the_same(server: str, trained: Trained, tmp_path: Path, classer: Classer) -> None:
    options = ("predict", "--data", trained.test, "--prefix", "p_", "--all-scores")
    for name, where in (("server", ("--server", server)), ("here", (trained.bundle,))):
        done = classer(*options, *where, "--out", tmp_path / f"{name}.jsonl")
        assert done.returncode == 0, done.stderr
    by_server, here = read(tmp_path / "server.jsonl"), read(tmp_path / "here.jsonl")
    assert len(here) == 60
    for theirs, own in zip(by_server, here, strict=True):
        assert {**theirs, "p_score": 0, "p_scores": 0} == {**own, "p_score": 0, "p_scores": 0}
        for name, score in own["p_scores"].items():
            assert theirs["p_scores"][name] == pytest.approx(score, abs=0.02)
    done = classer(*options, "--server", "127.0.0.1:1", "--out", tmp_path / "no.jsonl")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No server answers at 127.0.0.1:1" in done.stderr


@pytest.mark.parametrize("target", ["csv.gz", "parquet"])
def test_beam_writes_the_same_bytes(bundle: Path, tmp_path: Path, target: str) -> None:
    data = write(tmp_path / "in.csv", {"text": [*TEXTS, " "]})
    predict(bundle, data, tmp_path / f"here.{target}")
    predict(bundle, data, tmp_path / f"beam.{target}", "--runner", "DirectRunner")
    assert (tmp_path / f"beam.{target}").read_bytes() == (tmp_path / f"here.{target}").read_bytes()
    rejects = [read(path) for path in tmp_path.glob("*.rejects.jsonl")]
    assert len(rejects) == 2
    assert rejects[0] == rejects[1]
