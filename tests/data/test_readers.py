import contextlib
import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classer.data.errors import InputError
from classer.data.examples import Example
from classer.data.limits import MAX_TEXT_CHARS
from classer.data.readers import (
    check_labels,
    data_file,
    infer_task,
    nearest_column,
    read_examples,
    read_task_folder,
)
from classer.data.tables import PIPE, read_rows
from classer.data.taxonomy import Label, Task, TaskKind


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    data = content.encode() if isinstance(content, str) else content
    if name.endswith(".zst"):
        with pyarrow.output_stream(path, compression="zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def read(path: Path, **options) -> list[tuple[str, tuple[str, ...]]]:
    return [(example.text, example.labels) for example in read_examples(path, task="t", **options)]


def test_csv_with_ids_and_sources(tmp_path: Path):
    path = write(tmp_path, "tickets.csv", "id,text,label\n7,card lost,cards\n8,hello,greeting\n")
    assert read_examples(path, task="t") == [
        Example("card lost", ("cards",), "t", id="7", source=f"{path}, row 1 (line 2)"),
        Example("hello", ("greeting",), "t", id="8", source=f"{path}, row 2 (line 3)"),
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.csv.zst", "A.CSV"])
def test_csv_dialect(tmp_path: Path, name: str):
    content = '\ufefftext,label\r\n"two\r\nlines, and ""quotes""",x\r\n\r\nplain,y|z\r\n'
    path = write(tmp_path, name, content)
    assert read(path) == [('two\r\nlines, and "quotes"', ("x",)), ("plain", ("y|z",))]
    assert read_examples(path, task="t")[1].source == f"{path}, row 2 (line 5)"


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_tsv(tmp_path: Path, name: str):
    assert read(write(tmp_path, name, "text\tlabel\na, b\tx\n")) == [("a, b", ("x",))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl(tmp_path: Path, name: str):
    rows = [
        {"text": "one\u2028line", "labels": ["a|b", "c"]},
        {"text": "none", "labels": []},
        {"text": "number", "labels": 3},
        {"text": "truth", "labels": [True]},
    ]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    path = write(tmp_path, name, content)
    assert read(path) == [("one\u2028line", ("a|b", "c")), ("none", ()), ("number", ("3",)), ("truth", ("true",))]
    assert read_examples(path, task="t")[3].source == f"{path}, line 4"


def test_parquet(tmp_path: Path):
    table = pyarrow.table({"body": ["one", "two"], "labels": [["a", "b"], []], "id": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_column="body") == [("one", ("a", "b")), ("two", ())]


def test_several_labels_in_a_cell(tmp_path: Path):
    path = write(tmp_path, "a.csv", "text,labels,topics\nhi,a | b,c|d\n")
    assert read(path) == [("hi", ("a", "b"))]
    assert read(path, label_column="topics") == [("hi", ("c", "d"))]


def test_a_text_of_a_million_characters_is_read(tmp_path: Path):
    text = "x" * MAX_TEXT_CHARS
    assert read(write(tmp_path, "a.csv", f"text,label\n{text},a\n")) == [(text, ("a",))]
    assert csv.field_size_limit() == 131072, "the process-wide limit is as before"


ERRORS = {
    "suffix": ("a.xlsx", "", r"a\.xlsx has none of the known suffixes \(\.csv, \.tsv, \.jsonl"),
    "empty": ("a.csv", "", r"a\.csv is empty; at least one row"),
    "header only": ("a.csv", "text,label\n", r"a\.csv is empty; at least one row"),
    "empty jsonl": ("a.jsonl", "\n", r"a\.jsonl is empty"),
    "no text column": (
        "a.csv",
        "body,label\nx,y\n",
        r"no column 'text', only 'body', 'label'; see --text-column \('body' comes nearest\)\.",
    ),
    "no label column": (
        "a.csv",
        "text,topic\nx,y\n",
        r"no column 'label' or 'labels', only 'text', 'topic'; .*--label-",
    ),
    "two label columns": (
        "a.csv",
        "text,label,labels\nx,y,z\n",
        r"both columns 'label' and 'labels'; .*--label-column",
    ),
    "field missing later": ("a.jsonl", '{"text":"x","label":"y"}\n{"text":"x"}\n', r"line 2: no column 'label', only"),
    "column twice": ("a.csv", "text,label,text\nx,y,z\n", r"names the column 'text' twice"),
    "ragged": (
        "a.csv",
        "text,label\na,b\nx, y,z\n",
        r"row 2 \(line 3\): 3 fields, where the header has 2 \(text, label\)",
    ),
    "unclosed quote": ("a.csv", 'text,label\na,b\n"x,y\nz,w\n', r"row 2 \(line 3\): not valid CSV, unexpected end"),
    "old Mac line ends": ("a.csv", "text,label\rx,y\r", r"row 1 \(line 1\): not valid CSV, new-line"),
    "bytes in csv": ("a.csv", b"text,label\nx,y\ncaf\xe9,y\n", r"line 3: byte 0xe9 at offset 18 is not UTF-8"),
    "bytes in jsonl": ("a.jsonl", b'{"text": "\xff"}', r"line 1: byte 0xff at offset 10 is not UTF-8"),
    "utf-16": (
        "a.csv",
        "text,label\nx,y\n".encode("utf-16"),
        r"line 1: byte 0xff at offset 0 .* save the file as UTF-8",
    ),
    "bad json": ("a.jsonl", '{"text":"x","label":"y"}\n{"text": x}\n', r"line 2: not valid JSON, .* at column 10"),
    "deep json": ("a.jsonl", "[" * 100_000, r"line 1: not valid JSON; .*nesting too deep"),
    "json array": ("a.jsonl", '["x", "y"]\n', r"line 1: not a JSON object such as"),
    "no gzip": ("a.csv", b"", r"a\.csv\.gz is no complete gzip file"),
    "null label": ("a.jsonl", '{"text": "x", "label": null}', r"line 1: 'label' holds null, a missing value"),
    "NaN label": ("a.jsonl", '{"text": "x", "label": NaN}', r"line 1: 'label' holds NaN, a missing value"),
    "null in list": ("a.jsonl", '{"text": "x", "labels": ["a", null]}', r"'labels' holds null, a missing value"),
    "nan in csv": ("a.csv", "text,label\nx,nan\n", r"row 1 \(line 2\): 'label' holds 'nan', a missing value"),
    "empty label": ("a.csv", "text,label\nx,\n", r"row 1 \(line 2\): 'label' has an empty label"),
    "empty in cell": ("a.csv", "text,labels\nx,a|\n", r"row 1 \(line 2\): 'labels' has an empty label"),
    "fraction": ("a.jsonl", '{"text": "x", "label": 0.5}', r"'label' holds a number \(0\.5\); a label is a name"),
    "label twice": ("a.csv", "text,labels\nx,a|a\n", r"'labels' names the label 'a' twice"),
    "same id": (
        "a.csv",
        "id,text,label\n1,x,a\n2,x,a\n1,x,a\n",
        r"row 3 \(line 4\): the id '1' stood at .*row 1 \(line 2\)",
    ),
    "text no string": ("a.jsonl", '{"text": 5, "label": "y"}', r"line 1: 'text' holds a number \(5\), not a text"),
    "text null": ("a.jsonl", '{"text": null, "label": "y"}', r"line 1: 'text' holds null, a missing value, not a text"),
    "text blank": ("a.csv", "text,label\n  ,y\n", r"row 1 \(line 2\): 'text' is empty"),
    "text long": (
        "a.csv",
        f"text,label\n{'x' * 10_000_000},y\n",
        r"row 1 .* 10,000,000 characters; a text may have 1,000,000",
    ),
    "surrogate": ("a.jsonl", '{"text": "a\\ud83d", "label": "y"}', r"'text' has \\ud83d at character 1, half of a"),
    "no parquet": ("a.parquet", b"PAR1 but not really", r"a\.parquet is no readable Parquet file"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_place_and_the_fault(tmp_path: Path, case: str):
    name, content, message = ERRORS[case]
    path = write(tmp_path, name, content)
    if case == "no gzip":
        path = path.rename(tmp_path / "a.csv.gz")
        path.write_bytes(gzip.compress(b"text,label\n" + b"x,y\n" * 1000)[:-9])
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_broken_zstd_file_is_named(tmp_path: Path):
    path = write(tmp_path, "a.csv.zst", b"text,label\n" + b"x,y\n" * 1000)
    for broken in (path.read_bytes()[:-5], b"text,label\nx,y\n"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"a\.csv\.zst is no complete zstd file"):
            read(path)


def test_concatenated_zstd_frames_are_one_file(tmp_path: Path):
    first, second = write(tmp_path, "a.csv.zst", "text,label\nx,y\n"), write(tmp_path, "b.csv.zst", "z,y\n")
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert read(first) == [("x", ("y",)), ("z", ("y",))]


def test_standard_input_is_json_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "x", "label": "y"}\n{"text": 1}\n')))
    with pytest.raises(InputError, match=r"^standard input, line 2: no column 'label'"):
        read(PIPE)


def test_a_row_brings_its_own_characters(tmp_path: Path):
    """`classer predict` writes these characters unchanged."""
    headers: list[tuple[list[str], str]] = []
    path = write(tmp_path, "a.csv", '\ufeffa,"b"\r\n\n"x\r\ny",1.50\r\n"",z')
    rows = list(read_rows(path, on_header=lambda names, raw: headers.append((names, raw))))
    assert headers == [(["a", "b"], 'a,"b"\r\n')]
    assert [row.raw.lstrip("\n") for row in rows] == ['"x\r\ny",1.50\r\n', '"",z']
    (row,) = read_rows(write(tmp_path, "a.jsonl", '\n{"n": 1.0}\n'))
    assert (row.fields, row.raw) == ({"n": 1.0}, '{"n": 1.0}\n')


def test_a_file_or_a_split_of_a_folder_is_named(tmp_path: Path):
    folder = tmp_path / "task"
    folder.mkdir()
    test = write(folder, "test.csv.gz", "text,label\nx,y\n")
    assert data_file(test, "train") == test
    assert data_file(PIPE, "train") == PIPE
    with pytest.raises(InputError, match=r"task has no task\.json \(or \.yaml\); give a file"):
        data_file(folder, "test")
    write(folder, "task.json", "{}")
    assert data_file(folder, "test") == test
    with pytest.raises(InputError, match=r"task has no split 'dev'; it has test\."):
        data_file(folder, "dev")
    with pytest.raises(InputError, match=r"holds several tasks; name the folder of one, such as .*task\."):
        data_file(tmp_path, "test")
    with pytest.raises(InputError, match="There is no file"):
        data_file(tmp_path / "nothing.csv", "test")


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(InputError, match=r"There is no file .*nowhere\.csv"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1, max_size=30).filter(
    lambda cell: cell.strip() and cell.casefold() not in ("nan", "null")
)


@settings(deadline=None, max_examples=100)
@given(rows=st.lists(st.tuples(cells, cells.map(str.strip)), min_size=1, max_size=6))
def test_all_formats_give_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]):
    folder = tmp_path_factory.mktemp("rows")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    write(folder, "a.jsonl", "\n".join(lines))
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    expected = [(text, (label,)) for text, label in rows]
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        assert read(folder / name) == expected, name


@settings(deadline=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".csv.gz", ".parquet"]))
def test_any_bytes_are_read_or_refused_with_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
):
    path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
    path.write_bytes(b"text,label\n" + content if suffix == ".csv" else content)
    # Any exception other than InputError fails the test.
    with contextlib.suppress(InputError):
        read(path)


def examples_of(*labels: tuple[str, ...]) -> list[Example]:
    return [Example("x", row, "t", source=f"f.csv, row {n}") for n, row in enumerate(labels, start=1)]


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        ([("b",), ("a",)], TaskKind.BINARY, "one label a row, 2 distinct: a binary task"),
        ([("b",), ("a",), ("c",)], TaskKind.MULTICLASS, "one label a row, 3 distinct: a multiclass task"),
        ([("a", "b"), ("a",)], TaskKind.MULTILABEL, "1 to 2 labels a row, 2 distinct: a multilabel task"),
        ([("a",), ()], TaskKind.MULTILABEL, "0 to 1 labels a row, 1 distinct: a multilabel task"),
        ([("a", "b"), ("b", "c")], TaskKind.MULTILABEL, "2 labels a row, 3 distinct: a multilabel task"),
    ],
)
def test_the_kind_is_found_and_said(rows: list[tuple[str, ...]], kind: TaskKind, said: str):
    task, sentence = infer_task("t", examples_of(*rows))
    assert task.kind is kind
    assert list(task.label_names) == sorted({label for row in rows for label in row})
    assert said in sentence


def test_one_label_is_no_task():
    with pytest.raises(InputError, match="All 2 rows have the label 'a'; a classifier needs at least two"):
        infer_task("t", examples_of(("a",), ("a",)))
    with pytest.raises(InputError, match="None of the 1 rows has a label"):
        infer_task("t", examples_of(()))


def test_labels_are_held_against_the_task():
    task = Task("t", TaskKind.MULTICLASS, tuple(map(Label, ("refund", "greeting", "other"))))
    check_labels(task, examples_of(("refund",), ("other",)))
    with pytest.raises(
        InputError, match=r"f\.csv, row 2: .* no label 'refnd', only 'refund', .* Did you mean 'refund'"
    ):
        check_labels(task, examples_of(("refund",), ("refnd",)))
    with pytest.raises(InputError, match=r"f\.csv, row 1: 0 labels, but 't' is a multiclass task"):
        check_labels(task, examples_of(()))
    with pytest.raises(InputError, match=r"row 1: 2 labels \('refund', 'other'\), but 't' is a multiclass task"):
        check_labels(task, examples_of(("refund", "other")))


def test_many_labels_are_not_all_listed():
    task = Task("t", TaskKind.MULTICLASS, tuple(Label(f"label {n}") for n in range(77)))
    with pytest.raises(InputError, match="'label 9' and 67 more"):
        check_labels(task, examples_of(("zzz",)))


def test_real_task_folder(datasets: Path):
    data = read_task_folder(datasets / "banking77")
    assert data.task.kind is TaskKind.MULTICLASS
    assert {split: len(examples) for split, examples in data.splits.items()} == {"train": 10003, "test": 3080}
    assert data.splits["train"][0].labels == ("card_arrival",)


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    task = Task("t", TaskKind.BINARY, (Label("a"), Label("b")))
    write(tmp_path, "task.json", json.dumps({**task.to_json(), "splits": {"train": 1}}))
    write(tmp_path, "train.jsonl", '{"text": "x", "labels": ["a"]}')
    return tmp_path


def test_task_folder(task_folder: Path):
    write(task_folder, "SOURCE.md", "not a split")
    write(task_folder, "dev.csv", "text,label\ny,b\n")
    data = read_task_folder(task_folder)
    assert {split: [e.labels for e in rows] for split, rows in data.splits.items()} == {
        "train": [("a",)],
        "dev": [("b",)],
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "text,label\nx,a\n", r"two files for the split 'train': train\.csv and train\.jsonl"),
        ("dev.csv", "text,label\nx,c\n", r"dev\.csv, row 1 \(line 2\): the task 't' has no label 'c'"),
        ("task.json", "{", r"task\.json is not valid JSON"),
        ("task.json", "[]", r"task\.json is no JSON object"),
        ("task.json", '{"name": "t", "kind": "odd", "labels": []}', r"task\.json: kind 'odd' is none of those"),
        ("task.json", '{"name": "t", "kind": "binary", "labels": "ab"}', r"'labels' must be a list of objects"),
        (
            "task.json",
            '{"name": 3, "kind": "multilabel", "labels": [{"name": "a"}]}',
            r"a name must be a string, not 3",
        ),
        (
            "task.json",
            '{"name": "t", "kind": "multilabel", "labels": [{"name": "a"}], "splits": 3}',
            r"'splits' must name splits",
        ),
        (
            "task.json",
            '{"name": "t", "kind": "binary", "labels": [{"name": "a"}, {"name": "b"}], "splits": {"test": 1}}',
            r"has no file test\.jsonl .*, which task\.json names",
        ),
    ],
)
def test_task_folder_errors(task_folder: Path, name: str, content: str, message: str):
    write(task_folder, name, content)
    with pytest.raises(InputError, match=message):
        read_task_folder(task_folder)


def test_task_folder_without_task_or_splits(task_folder: Path):
    (task_folder / "train.jsonl").unlink()
    write(task_folder, "task.json", '{"name": "t", "kind": "multilabel", "labels": [{"name": "a"}]}')
    with pytest.raises(InputError, match=r"has no split beside task\.json"):
        read_task_folder(task_folder)
    (task_folder / "task.json").unlink()
    with pytest.raises(InputError, match=r"task\.json does not exist; a task's folder holds it"):
        read_task_folder(task_folder)


@pytest.mark.parametrize(
    ("wanted", "columns", "nearest"),
    [
        ("text", ["id", "Text", "body"], "Text"),
        ("text", ["id", "body", "target"], "body"),
        ("text", ["review", "label"], "review"),
        ("label", ["message", "target"], "target"),
        ("label", ["sentence", " Category "], " Category "),
        ("label", ["text", "labell"], "labell"),
        ("subject", ["subjct", "label"], "subjct"),
        ("text", ["a", "b"], None),
        ("label", ["text"], None),
    ],
)
def test_the_nearest_column_is_that_of_the_same_meaning_or_spelling(
    wanted: str, columns: list[str], nearest: str | None
) -> None:
    assert nearest_column(wanted, columns) == nearest
