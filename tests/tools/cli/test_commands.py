"""The whole way through the commands as people type them: train, serve, classify, evaluate, quantize, info."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import json
import re
import shlex
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.model.decode import Calibration
from classer.serve.core.answers import AnswerDecoder
from classer.serve.core.tokenizing import TokenizedText
from classer.serve.core.work import Output, Scored
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierServicer, add_ClassifierServicer_to_server
from classer.tests.helpers import printed, write_toy_data
from classer.tests.processes import Process
from classer.tools.cli import main as cli
from classer.tools.cli.main import main
from classer.tools.cli.train import parse_job
from classer.train.config import TrainJob
from classer.train.datasets import load_dataset

from ..conftest import COMMAND, LAUNCHER, TIMEOUT, Classer, Trained

TEXTS = ("my bread is not a cheese", "the team has a goal", "rain . snow")
TOPICS_OF_TEXTS = ("food", "sport", "weather")


def weights(bundle: Path) -> bytes:
    return (bundle / "weights.safetensors").read_bytes()


def task_of(out: Path) -> dict[str, Any]:
    [task] = json.loads((out / "bundle" / "taxonomy.json").read_text())["tasks"]
    return task


def test_the_installed_command_is_this_one() -> None:
    [entry] = importlib.metadata.entry_points(group="console_scripts", name="classer")
    assert entry.load() is cli.main


def test_training_says_what_it_found_and_what_it_reached(trained: Trained) -> None:
    assert "The label column holds one label a row, 3 distinct: a multiclass task.\n" in trained.output
    assert "Set 30 of 300 training examples aside for development.\n" in trained.output
    assert "270 to train on, 30 for development, 60 to test.\n" in trained.output
    assert "epoch 1/4 · dev accuracy" in trained.errors
    assert "On 60 test examples:" in trained.output
    for name in ("float32", "INT8"):
        row = re.search(rf"Classer, {name} +([\d.]+)%", trained.output)
        assert row is not None
        assert float(row[1]) > 90
    assert f"Serve it:  classer serve {trained.bundle}\n" in trained.output


def test_the_next_steps_that_training_prints_work(trained: Trained, classer: Classer) -> None:
    steps = dict(re.findall(r"^(Ask it|Use it): +classer (.+)$", trained.output, re.MULTILINE))
    asked = classer(*shlex.split(steps["Ask it"]))
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.startswith("→ ")
    used = classer(*shlex.split(steps["Use it"]))
    assert used.returncode == 0, used.stderr
    with trained.data.open() as before, (trained.out / "predicted.csv").open() as after:
        rows, predicted = list(csv.DictReader(before)), list(csv.DictReader(after))
    assert [row["text"] for row in predicted] == [row["text"] for row in rows]
    right = sum(row["label"] == row["predicted_label"] for row in predicted)
    assert right > 0.9 * len(rows)


def test_classify_with_a_bundle_answers_as_the_server_does(trained: Trained, server: str, classer: Classer) -> None:
    by_bundle, by_server = (
        [json.loads(line) for line in classer("classify", "--json", *TEXTS, *source).stdout.splitlines()]
        for source in (("--bundle", trained.bundle), ("--server", server))
    )
    assert [answer["labels"][0]["label"] for answer in by_bundle] == list(TOPICS_OF_TEXTS)
    for one, other in zip(by_bundle, by_server, strict=True):
        for answer in (one, other):
            for varying in ("milliseconds", "labels", "precision", "queue_duration", "compute_duration"):
                answer.pop(varying, None)
        assert one == other


def test_training_leaves_bundles_reports_and_logs(trained: Trained) -> None:
    assert {"bundle", "bundle-float32", "results", "results-float32", "checkpoints", "metrics.jsonl", "job.json"} <= {
        path.name for path in trained.out.iterdir()
    }
    assert {"report.md", "metrics.json", "confusion_matrix.png", "reliability.png"} <= {
        path.name for path in (trained.out / "results").iterdir()
    }
    assert (trained.bundle / "LICENSE").read_text() == "A licence.\n"
    assert len(weights(trained.bundle)) < len(weights(trained.out / "bundle-float32"))


@pytest.mark.slow
def test_the_launcher_trains_the_same_weights(trained: Trained, classer: Classer, tmp_path: Path) -> None:
    done = classer(*trained.options, "--out", tmp_path / "launched", command=LAUNCHER)
    assert done.returncode == 0, done.stderr
    for bundle in ("bundle", "bundle-float32"):
        assert weights(tmp_path / "launched" / bundle) == weights(trained.out / bundle)


def test_classify_prints_labels_probabilities_and_latency(server: str, classer: Classer) -> None:
    done = classer("classify", *TEXTS, "--server", server, "--top-k", "2")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * len(TEXTS)
    for i, topic in enumerate(TOPICS_OF_TEXTS):
        best, second, about = lines[3 * i : 3 * i + 3]
        assert re.fullmatch(rf"→ +[\d.]+%  {topic}", best)
        assert re.fullmatch(r"  +[\d.]+%  \w+", second)
        assert re.fullmatch(r"  \d+ tokens, [\d.]+ ms, model [0-9a-f]{12}", about)


def test_classify_as_json_from_standard_input(server: str, classer: Classer) -> None:
    done = classer("classify", "--json", "--server", server, stdin="\n".join(TEXTS) + "\r\n\n")
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["labels"][0]["label"] for answer in answers[:-1]] == list(TOPICS_OF_TEXTS)
    for answer in answers:
        assert sum(label["score"] for label in answer["labels"]) == pytest.approx(1, abs=1e-5)
        assert [label["chosen"] for label in answer["labels"]] == [True, False, False]
        assert answer["task"] == "topics"
        assert answer["milliseconds"] > 0
    assert answers[-1]["tokens"] == 2  # the empty line: [CLS] [SEP]


def test_a_cut_text_is_reported(server: str, classer: Classer) -> None:
    long = "the team has a goal " * 10
    done = classer("classify", long, "--server", server)
    assert done.returncode == 0
    assert "  16 tokens, cut to them, " in done.stdout
    [answer] = [
        json.loads(line) for line in classer("classify", long, "--json", "--server", server).stdout.splitlines()
    ]
    assert answer["truncated"] is True


def test_classify_where_the_terminal_lacks_a_character(server: str, classer: Classer) -> None:
    done = classer("classify", "rain", "--server", server, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(r"\u2192 ")


def test_classify_shows_where_in_a_tree_an_answer_stops(capsys: pytest.CaptureFixture[str]) -> None:
    labels = (Label("orders"), Label("refund", parent="orders"), Label("delay", parent="orders"), Label("other"))
    tree = Task("where", TaskKind.HIERARCHICAL, labels)
    answers = AnswerDecoder(Taxonomy((tree,)), {"where": Calibration()}, "m", "v1")

    class OneText(ClassifierServicer):
        def Classify(self, request: pb.ClassifyRequest, context: grpc.ServicerContext) -> pb.ClassifyResponse:
            scored = [Scored(Output(np.array([2.0, 0.1, 0.0, 0.0], np.float32)), 0.0, 0.0)]
            threshold = request.options.threshold if request.options.HasField("threshold") else None
            tokens = [TokenizedText(np.zeros(3, np.int32), truncated=False)]
            (response,) = answers.answer(tree, tokens, scored, request.options.top_k, threshold=threshold)
            assert isinstance(response, pb.ClassifyResponse)
            return response

    def shown(*options: str) -> list[str]:
        assert main(["classify", "where is my money", "--server", address, "--top-k", "2", *options]) == 0
        return capsys.readouterr().out.splitlines()[:-1]

    server = grpc.server(ThreadPoolExecutor(1))
    add_ClassifierServicer_to_server(OneText(), server)
    address = f"localhost:{server.add_insecure_port('localhost:0')}"
    server.start()
    try:
        assert shown() == ["→  46.24%  orders › refund", "   41.84%  orders › delay"]
        assert shown("--threshold", "0.8") == ["→  88.08%  orders", "   46.24%  orders › refund"]
    finally:
        server.stop(None)


def test_evaluate_measures_what_training_measured(trained: Trained, classer: Classer, tmp_path: Path) -> None:
    done = classer("evaluate", trained.bundle, "--data", trained.test, "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    before = json.loads((trained.out / "results" / "metrics.json").read_text())
    after = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert after["accuracy"] == before["accuracy"]
    assert after["ece"] == pytest.approx(before["ece"], abs=1e-6)
    assert f"accuracy {before['accuracy']:.2%} · " in done.stdout
    assert "60 examples, 0 of them cut to the maximum length\n" in done.stdout
    assert (tmp_path / "report" / "confusion_matrix.png").is_file()


def test_quantize_makes_the_bundle_that_training_made(trained: Trained, classer: Classer, tmp_path: Path) -> None:
    done = classer("quantize", trained.out / "bundle-float32", "--out", tmp_path / "int8")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "int8") == weights(trained.bundle)
    assert "INT8, version " in done.stdout


def test_info_describes_the_bundle_that_answers(trained: Trained, server: str, classer: Classer) -> None:
    done = classer("info", trained.bundle)
    assert done.returncode == 0, done.stderr
    answer = json.loads(classer("classify", "rain", "--json", "--server", server).stdout)
    assert f"{trained.bundle}: whole, int8, version {answer['model_version']}\n" in done.stdout
    assert "texts are read up to 16 tokens" in done.stdout
    assert "task 'topics': multiclass, 3 labels, temperature " in done.stdout
    assert all(f"    {topic}\n" in done.stdout for topic in TOPICS_OF_TEXTS)


@pytest.mark.slow
def test_a_binary_tsv_with_other_column_names_and_a_dev_file(
    tiny_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("mails", 24), ("dev", 12)):
        rows = [f"my card {i} is\t{('spam', 'no spam')[i % 2]}" for i in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["body\tfolder", *rows]) + "\n")
    options = ["--data", str(tmp_path / "mails.tsv"), "--dev", str(tmp_path / "dev.tsv"), "--text-column", "body"]
    out = tmp_path / "run"
    assert main(["train", *options, "--label-column=folder", "--out", str(out), *tiny_options]) == 0
    said = capsys.readouterr().out
    assert "one label a row, 2 distinct: a binary task." in said
    assert "aside" not in said
    assert "24 to train on, 12 for development, 0 to test." in said
    assert "On 12 dev examples:" in said
    # The same texts stand in both files.
    assert "12 texts of dev also in train" in said
    assert task_of(out) == {"name": "mails", "kind": "binary", "labels": [{"name": "no spam"}, {"name": "spam"}]}


def test_a_multilabel_jsonl_with_a_test_file(
    tiny_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_toy_data(tmp_path / "tags.jsonl", TaskKind.MULTILABEL, 60)
    test = write_toy_data(tmp_path / "test.jsonl", TaskKind.MULTILABEL, 20, seed=1)
    out = tmp_path / "run"
    assert main(["train", "--data", str(data), "--test", str(test), "--out", str(out), *tiny_options]) == 0
    said = capsys.readouterr().out
    assert re.search(r"The label column holds 0 to \d labels a row, 3 distinct: a multilabel task\.", said)
    assert "On 20 test examples:" in said
    assert task_of(out)["kind"] == "multilabel"
    assert main(["info", str(out / "bundle")]) == 0
    assert re.search(r"^    food  from 0\.\d{3}$", capsys.readouterr().out, re.MULTILINE)


def test_a_parquet_of_lists_and_of_names(tmp_path: Path) -> None:
    for kind in (TaskKind.MULTICLASS, TaskKind.MULTILABEL):
        toy = write_toy_data(tmp_path / "toy.jsonl", kind, 40)
        rows = [json.loads(line) for line in toy.read_text().splitlines()]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{kind}.parquet")
        job = TrainJob(data=tmp_path / f"{kind}.parquet", out=tmp_path / "run")
        dataset, said = printed(functools.partial(load_dataset, job))
        (task,) = dataset.taxonomy.tasks
        assert task.kind is kind
        assert said[0].endswith(f" 3 distinct: a {kind} task.")
        read = {(example.text, example.labels) for example in dataset.train[task.name] + dataset.dev[task.name]}
        assert read == {(row["text"], (row["label"],) if kind.exclusive else tuple(row["labels"])) for row in rows}


def test_a_csv_with_a_byte_order_mark_and_odd_names(
    tiny_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["naïve | né", "日本語", 'quo"ted, with a comma', "🙂", "../up", "$x_1$"]
    rows = [f'"text {i} 🙂 \u200b\u0301","{names[i % len(names)].replace(chr(34), chr(34) * 2)}"' for i in range(60)]
    data = tmp_path / "odd names.csv"
    data.write_text("\ufeff" + "\r\n".join(["text,label", *rows]), encoding="utf-8")
    out = tmp_path / "a run"
    assert main(["train", "--data", str(data), "--out", str(out), *tiny_options]) == 0
    assert [label["name"] for label in task_of(out)["labels"]] == sorted(names)
    assert f"classer serve '{out / 'bundle'}'\n" in capsys.readouterr().out  # quoted, because of the space


def test_a_preset_gives_way_to_options() -> None:
    job = parse_job(["--preset", "banking77", "--data", "d", "--out", "o", "--epochs", "3"], prog="classer train")
    assert (job.recipe.max_length, job.recipe.epochs) == (64, 3)
    assert parse_job(["--data", "d", "--out", "o", "--preset=banking77"], prog="classer train").recipe.epochs != 3


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    for arguments in (["train", "--help"], ["--help"]):
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(TIMEOUT) == 128 + signal.SIGPIPE


def test_interrupting_a_run_says_so(trained: Trained, tmp_path: Path) -> None:
    command = [
        *COMMAND,
        "train",
        *trained.options,
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "1000",
        "--patience",
        "0",
    ]
    with Process(command) as process:
        process.stderr.line_with("epoch 1/1000")
        process.send_signal(signal.SIGINT)
        done = process.result(TIMEOUT)
    assert done.returncode == 128 + signal.SIGINT
    assert "classer: stopped." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "bundle").exists()
