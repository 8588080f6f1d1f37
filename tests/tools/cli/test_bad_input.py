"""Bad input: one clear sentence with file and row or field where there is one, exit code 2, and nothing overwritten."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from classer.model.bundle import Bundle, save_bundle
from classer.tools.cli.main import main

from ..conftest import LAUNCHER, Classer, Trained

GOOD = "text,label\n" + "".join(f"my card {i},{'ab'[i % 2]}\n" for i in range(40))


def fingerprint(folder: Path) -> dict[str, str]:
    """The content of every file below a folder, and every folder's name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs a command in this process; its one sentence on stderr, after a look that the refusal left no trace."""

    def run(*arguments: object) -> str:
        before = fingerprint(tmp_path)
        assert main([str(argument) for argument in arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("classer: error: ")
        assert errors.count("\n") == 1
        assert errors.endswith((".\n", ")\n", "?\n"))
        assert fingerprint(tmp_path) == before
        return errors.removeprefix("classer: error: ").removesuffix("\n").replace(f"{tmp_path}/", "")

    return run


@pytest.fixture
def usage_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command whose arguments cannot be parsed; what it says on stderr, in one line."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert exit_.value.code == 2
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    return run


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.csv",
            "words,label\nhi,x\n",
            "a.csv, row 1 (line 2): no column 'text', only 'words', 'label'; see --text-column.",
        ),
        (
            "a.csv",
            "text,topic\nhi,x\n",
            "a.csv has no column 'label' or 'labels', only 'text', 'topic'; name another with --label-column "
            "('topic' comes nearest).",
        ),
        ("a.csv", "", "a.csv is empty; at least one row of text and label was expected."),
        ("a.csv", "text,label\n", "a.csv is empty; at least one row of text and label was expected."),
        ("a.jsonl", "", "a.jsonl is empty; at least one row of text and label was expected."),
        (
            "a.csv",
            "text,label\nq,x\nr,x\n",
            "a.csv: All 2 rows have the label 'x'; a classifier needs at least two to tell apart.",
        ),
        (
            "a.csv",
            "text,label\nq,x\nr,y\n",
            "a.csv: 2 examples of 2 labels are too few to set 10% of them aside for development, as each label needs "
            "one to train on; add examples or give a development file.",
        ),
        (
            "a.csv",
            b"text,label\nhi,x\ncaf\xe9,y\n",
            "a.csv, line 3: byte 0xe9 at offset 19 is not UTF-8; save the file as UTF-8.",
        ),
        (
            "a.csv",
            "text,label\nhi,x\n" + "a " * 5_000_000 + ",y\n",
            "a.csv, row 2 (line 3): 'text' holds 10,000,000 characters; a text may have 1,000,000. Cut it.",
        ),
        (
            "a.csv",
            "id,text,label\n7,q,x\n8,r,y\n7,s,x\n",
            "a.csv, row 3 (line 4): the id '7' stood at a.csv, row 1 (line 2) already; ids must differ.",
        ),
        (
            "a.csv",
            "text,label\nq,x\nr,NaN\n",
            "a.csv, row 2 (line 3): 'label' holds 'NaN', a missing value; name a label or remove the row.",
        ),
        (
            "a.jsonl",
            '{"text": "q", "label": NaN}\n',
            "a.jsonl, line 1: 'label' holds NaN, a missing value; a label is a name or a whole number.",
        ),
        ("a.jsonl", '{"text": q}\n', "a.jsonl, line 1: not valid JSON, Expecting value at column 10."),
        (
            "a.csv",
            "text,label\n  ,x\n",
            "a.csv, row 1 (line 2): 'text' is empty; remove the row or give it a text.",
        ),
        ("a.csv", 'text,label\n"q,x\n', "a.csv, row 1 (line 2): not valid CSV, "),
        ("a.parquet", "PAR", "a.parquet is no readable Parquet file: "),
        ("a.xls", GOOD, "a.xls has none of the known suffixes (.csv, .tsv, .jsonl, "),
    ],
)
def test_unusable_training_data(
    name: str, content: str | bytes, sentence: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = write(tmp_path, name, content)
    assert refused("train", "--data", file, "--out", tmp_path / "run").startswith(sentence)


def test_a_label_in_test_or_dev_but_not_in_train(tmp_path: Path, refused: Callable[..., str]) -> None:
    data = write(tmp_path, "good.csv", GOOD)
    other = write(tmp_path, "other.csv", "text,label\nq,a\nr,c\n")
    for option in ("--test", "--dev"):
        assert refused("train", "--data", data, option, other, "--out", tmp_path / "run") == (
            "other.csv, row 2 (line 3): the task 'good' has no label 'c', only 'a', 'b'."
        )


def test_a_missing_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    data = write(tmp_path, "good.csv", GOOD)
    assert refused("train", "--data", tmp_path / "x.csv", "--out", tmp_path / "run") == "There is no file x.csv."
    assert refused("train", "--data", data, "--test", tmp_path / "x.csv", "--out", tmp_path / "run") == (
        "There is no file x.csv."
    )


def test_serving_nothing(refused: Callable[..., str]) -> None:
    assert refused("serve") == "No bundle was named; give the folder of at least one. `classer train` writes them."


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        (
            {"name": "tree", "kind": "hierarchical", "labels": [{"name": "a"}]},
            "tree/task.json: Task 'tree' is hierarchical, but none of its labels has a parent; give some, or call it "
            "multiclass. It has 'a'.",
        ),
        ({"name": "tree", "kind": "binary"}, "tree/task.json: the task has no field 'labels'."),
        (
            {"name": "tree", "kind": "binary", "labels": [{"name": "a"}, {"name": "b"}]},
            "tree has no split beside task.json; expected a file such as train.jsonl.",
        ),
        (
            {"name": "tree", "kind": "binary", "labels": [{"name": "a"}, {"name": "b"}], "splits": ["dev"]},
            "tree has no file dev.jsonl (or ",
        ),
    ],
)
def test_an_unusable_task_folder(
    description: dict[str, object], sentence: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "tree").mkdir()
    write(tmp_path / "tree", "task.json", json.dumps(description))
    assert refused("train", "--data", tmp_path / "tree", "--out", tmp_path / "run").startswith(sentence)


def test_a_task_folder_whose_training_examples_have_one_label(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "one").mkdir()
    labels = [{"name": "a"}, {"name": "b"}]
    write(tmp_path / "one", "task.json", json.dumps({"name": "one", "kind": "binary", "labels": labels}))
    write(tmp_path / "one", "train.csv", "text,label\nq,a\nr,a\n")
    assert refused("train", "--data", tmp_path / "one", "--out", tmp_path / "run").startswith(
        "one: All 2 training examples of 'one' have the same label; "
    )


def test_a_folder_that_holds_something_is_left_alone(
    trained: Trained, tmp_path: Path, refused: Callable[..., str]
) -> None:
    data = write(tmp_path, "good.csv", GOOD)
    before = fingerprint(trained.out)
    assert "exists and is not empty; nothing in it was touched." in refused(
        "train", "--data", data, "--out", trained.out
    )
    assert refused("evaluate", trained.bundle, "--data", trained.test, "--out", trained.out).endswith(
        f"{trained.out} exists already and was not touched; name a new folder with --out."
    )
    assert "exists already and was not touched" in refused(
        "quantize", trained.out / "bundle-float32", "--out", trained.bundle
    )
    assert "is finished; its bundle is" in refused("train", *trained.options, "--out", trained.out, "--resume")
    assert "began with epochs = 4, not 5; resume it with that." in refused(
        "train", *trained.options, "--out", trained.out, "--resume", "--epochs", "5"
    )
    assert fingerprint(trained.out) == before
    assert "There is no run to resume in run" in refused("train", "--data", data, "--out", tmp_path / "run", "--resume")


def test_a_folder_that_cannot_be_made(trained: Trained, tmp_path: Path, refused: Callable[..., str]) -> None:
    file = write(tmp_path, "good.csv", GOOD)
    float_bundle = trained.out / "bundle-float32"
    for out in (file, file / "below", file / "far" / "below"):
        assert refused("train", "--data", file, "--out", out) == (
            f"--out is {out.relative_to(tmp_path)}, but good.csv is a file; name a folder that can be made."
        )
    for arguments in (("evaluate", float_bundle, "--data", trained.test), ("quantize", float_bundle)):
        assert "good.csv is a file; name a folder that can be made." in refused(*arguments, "--out", file / "below")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="skipped: no folder in which nobody may write")
def test_a_folder_where_nothing_can_be_written(tmp_path: Path, refused: Callable[..., str]) -> None:
    data = write(tmp_path, "good.csv", GOOD)
    assert refused("train", "--data", data, "--out", "/proc/runs/x").startswith(
        "--out is /proc/runs/x, but nothing can be written in /proc: "
    )


def test_an_encoder_that_cannot_be_used(tmp_path: Path, tiny_encoder: Path, refused: Callable[..., str]) -> None:
    data = write(tmp_path, "good.csv", GOOD)
    shutil.copytree(tiny_encoder, tmp_path / "gpt")
    write(tmp_path / "gpt", "config.json", '{"model_type": "gpt2"}')
    (tmp_path / "none").mkdir()
    train = ("train", "--data", data, "--out", tmp_path / "run", "--encoder")
    assert refused(*train, tmp_path / "none").startswith("none is no encoder folder: it has no config.json")
    assert "model_type is 'gpt2'" in refused(*train, tmp_path / "gpt")
    assert refused(*train, tiny_encoder, "--max-length", "256") == (
        "max_length is 256, but the encoder has only 48 positions."
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--epochs", "-1"), "epochs must be at least 0; it is -1."),
        (("--dropout", "1.5"), "dropout must be between 0 and 0.9; it is 1.5."),
        (("--max-length", "4"), "max_length must be between 8 and 512; it is 4."),
        (("--seed", "-1"), "seed must be at least 0; it is -1."),
        (("--preset", "nope"), "There is no preset 'nope'; there are: banking77, imdb, multitask."),
        (("--preset=nope",), "There is no preset 'nope'; there are: banking77, imdb, multitask."),
        (("--preset",), "--preset needs a name: banking77, imdb, multitask."),
    ],
)
def test_values_out_of_range(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert refused("train", "--data", "x.csv", "--out", tmp_path / "run", *arguments) == sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("classify", "hi", "--server", "localhost"), "--server is 'localhost'; an address is HOST:PORT"),
        (("classify", "hi", "--server", ""), "--server is ''; an address is HOST:PORT"),
        (("classify", "hi", "--bundle", "b", "--server", "host:1"), "Give --server or --bundle, not both"),
        (("classify", "hi", "--bundle", "nowhere"), "nowhere is no bundle: it does not exist."),
        (("classify", "hi", "--top-k", "0"), "--top-k is 0; at least 1 label is shown."),
        (("classify", "hi", "--threshold", "1.5"), "--threshold is 1.5; a score lies between 0 and 1."),
        (("classify", "hi", "--timeout", "-1"), "--timeout is -1; give seconds, above 0 and at most 86,400."),
        (("classify", "hi", "--timeout", "nan"), "--timeout is nan; give seconds,"),
        (("serve", "nowhere", "--port", "70000"), "--port is 70000; a port is a number from 0 (pick a free one)"),
        (
            ("trian",),
            "There is no command 'trian'. There are: train, serve, classify, predict, ",
        ),
    ],
)
def test_arguments_of_the_other_commands(
    arguments: tuple[str, ...], sentence: str, refused: Callable[..., str]
) -> None:
    assert refused(*arguments).startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--data", "x.csv", "--out", "o", "--epohs", "3"), "Unrecognized options: --epohs"),
        (("train", "--data", "x.csv", "--out", "o", "--epohs", "3"), "Perhaps you meant: --epochs"),
        (("train", "--data", "x.csv", "--out", "o", "--epochs", "three"), "Error parsing --epochs: "),
        (("train", "--data", "x.csv"), "Missing from classer train: --out PATH the run's folder"),
        (("train", "--data", "x.csv", "--out", "o", "--class-weights", "many"), "--class-weights"),
        (("classify", "--nope"), "Unrecognized options: --nope"),
        (("info",), "Missing from classer info: BUNDLE"),
        (("quantize", "b"), "Missing from classer quantize: --out PATH"),
    ],
)
def test_arguments_that_cannot_be_parsed(
    arguments: tuple[str, ...], words: str, usage_error: Callable[..., str]
) -> None:
    assert words in usage_error(*arguments)


@pytest.mark.parametrize("command", ["info", "serve", "evaluate", "quantize"])
def test_a_path_that_is_no_bundle(command: str, trained: Trained, tmp_path: Path, refused: Callable[..., str]) -> None:
    more = {"evaluate": ("--data", trained.test), "quantize": ("--out", tmp_path / "new"), "serve": ("--port", "0")}
    (tmp_path / "empty").mkdir()
    file = write(tmp_path, "file", "")
    for path, what in ((tmp_path / "empty", "holds no bundle.json"), (file, "holds no bundle.json")):
        assert refused(command, path, *more.get(command, ())) == (
            f"{path.name} is no bundle: it {what}. `classer train` writes bundles, to OUT/bundle."
        )
    assert "is no bundle: it does not exist." in refused(command, tmp_path / "none", *more.get(command, ()))


@pytest.mark.parametrize("command", ["info", "serve"])
def test_a_damaged_bundle(command: str, trained: Trained, tmp_path: Path, refused: Callable[..., str]) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(trained.bundle, bundle)
    file, manifest = bundle / "weights.safetensors", bundle / "bundle.json"
    whole = file.read_bytes()
    more = ("--port", "0") if command == "serve" else ()

    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is damaged or was changed: the SHA-256 of weights.safetensors" in refused(command, bundle, *more)
    file.write_bytes(whole[:-7])
    assert f"weights.safetensors has {len(whole) - 7} bytes where" in refused(command, bundle, *more)
    file.unlink()
    assert refused(command, bundle, *more) == "bundle is damaged: weights.safetensors is missing."
    file.write_bytes(whole)
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 3'))
    assert "Upgrade Classer to load it." in refused(command, bundle, *more)


def test_what_evaluate_refuses(trained: Trained, tmp_path: Path, refused: Callable[..., str]) -> None:
    other = write(tmp_path, "other.csv", "text,label\nq,food\nr,sports\n")
    evaluate = ("evaluate", trained.bundle, "--data")
    assert refused(*evaluate, other) == (
        "other.csv, row 2 (line 3): the task 'topics' has no label 'sports', only 'food', 'sport', 'weather'. "
        "Did you mean 'sport'?"
    )
    assert refused(*evaluate, trained.test, "--task", "nope") == "There is no task 'nope'; this model has: topics."
    for length in ("0", "17"):
        assert refused(*evaluate, trained.test, "--max-length", length) == (
            f"--max-length is {length}; this bundle reads 2 to 16 tokens."
        )
    assert "There is no file" in refused(*evaluate, tmp_path / "x.csv")
    assert "no column 'body'" in refused(*evaluate, other, "--text-column", "body")


def test_a_bundle_of_several_tasks_needs_a_name(
    tiny_bundle: Bundle, trained: Trained, tmp_path: Path, refused: Callable[..., str]
) -> None:
    bundle = save_bundle(tiny_bundle, tmp_path / "two").path
    assert refused("evaluate", bundle, "--data", trained.test) == (
        "The bundle has several tasks; name one with --task: topic, tags."
    )


def test_quantising_twice(trained: Trained, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "is INT8 already; quantise a float32 bundle." in refused(
        "quantize", trained.bundle, "--out", tmp_path / "new"
    )


def test_no_server_at_the_address(refused: Callable[..., str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        assert refused("classify", "hi", "--server", address).startswith(f"No server answers at {address}; ")
    assert "No server answers at nowhere.invalid:1; " in refused("classify", "hi", "--server", "nowhere.invalid:1")


def test_what_a_server_refuses(server: str, refused: Callable[..., str]) -> None:
    assert refused("classify", "hi", "--task", "nope", "--server", server) == (
        "This model has no task of the name given; it has: topics."
    )
    assert refused("classify", "fine", "a\udcff", "--server", server).startswith(
        "Text 2: The text holds a lone surrogate"
    )


def test_a_text_of_10_mb(server: str, classer: Classer) -> None:
    done = classer("classify", "--server", server, "--top-k", "1", stdin="rain\n" + "a " * 5_000_000)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 2  # the first text was answered
    assert done.stderr == (
        "classer: error: Text 2: The text has 10000000 characters; at most 1000000 are taken. Split or shorten it.\n"
    )
    done = classer("classify", "--server", server, stdin="ä" * 9_000_000)
    assert done.returncode == 2
    assert done.stderr == (
        "classer: error: Text 1: The request has 18000009 bytes; the server takes 16777216 at most.\n"
    )


def test_undecodable_bytes_on_standard_input(server: str, classer: Classer) -> None:
    done = classer("classify", "--server", server, "--top-k", "1", stdin=b"rain\nsnow\xff\n")
    assert done.returncode == 2
    assert done.stdout.count("\n") == 2
    assert done.stderr == "classer: error: Standard input, line 2: byte 0xff at its position 4 is not UTF-8.\n"


def test_a_port_in_use(server: str, trained: Trained, classer: Classer) -> None:
    done = classer("serve", trained.bundle, "--port", server.split(":")[-1])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"classer: error: Cannot listen on {server}: address already in use. "
        "Choose another --port (0 picks a free one) or --host.\n"
    )


@pytest.mark.parametrize("launcher", [False, True])
def test_the_real_commands_end_with_2(launcher: bool, classer: Classer, tmp_path: Path) -> None:
    data = write(tmp_path, "a.csv", "text,label\nq,x\nr,x\n")
    arguments = ("--data", data, "--out", tmp_path / "run")
    done = classer(*arguments, command=LAUNCHER) if launcher else classer("train", *arguments)
    assert done.returncode == 2
    assert launcher or not done.stdout  # the launcher says first where things will be
    assert done.stderr == (
        f"classer: error: {data}: All 2 rows have the label 'x'; a classifier needs at least two to tell apart.\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_usage_error_of_the_real_command(classer: Classer) -> None:
    done = classer("quantize", "b", "--out", "o", "--nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Unrecognized options: --nope" in done.stderr
    assert "Traceback" not in done.stderr
