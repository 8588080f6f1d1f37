"""The guide's code blocks run, page by page, on a tiny encoder and toy data; slow.

What a page needs lies in its folder before: data files, task folders, an encoder, and trained bundles. `classer train`
gets the tiny encoder and few epochs where the page does not name them; ports are free ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from classer.data.taxonomy import TaskKind
from classer.tests.docs.pages import GUIDE, ROOT, blocks, commands, name_of
from classer.tests.helpers import TOY_TASKS, TREE, write_encoder, write_task, write_toy_data
from classer.tests.tools.conftest import to_csv

COMMAND = [sys.executable, "-m", "classer.tools.cli.main"]
TRAINS = {"--encoder": "./encoder", "--epochs": "1", "--max-length": "16", "--batch-size": "16"}
READY_SECONDS = 300
BLOCK_SECONDS = 600
SERVER = "localhost:50051"


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=BLOCK_SECONDS, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def trained(data: str, out: str, folder: Path, *more: str) -> None:
    options = [word for pair in TRAINS.items() for word in pair]
    run([*COMMAND, "train", "--data", data, "--out", out, *options, *more], folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the guide has: files of labelled and unlabelled texts, task folders, and trained bundles."""
    folder = tmp_path_factory.mktemp("guide")
    to_csv(write_toy_data(folder / "tickets.jsonl", TaskKind.MULTICLASS, 120))
    to_csv(write_toy_data(folder / "held_out.jsonl", TaskKind.MULTICLASS, 60, seed=1))
    texts = [json.loads(line)["text"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    (folder / "unlabelled.csv").write_text("".join(f"{text}\n" for text in ["text", *texts]))
    shutil.copy(folder / "unlabelled.csv", folder / "new.csv")
    write_toy_data(folder / "texts.jsonl", TaskKind.MULTICLASS, 400)  # conversion holds 256 out
    (folder / "tasks").mkdir()
    for task in (dataclasses.replace(TREE, name="support"), *TOY_TASKS[:2]):
        write_task(folder / "tasks", task, train=120, dev=30, test=30)
    write_encoder(folder / "encoder")
    trained("tickets.csv", "runs/tickets", folder)
    trained("tasks/support", "runs/support", folder)
    trained("tickets.csv", "runs/focused", folder, "--focus-epochs", "1")
    return folder


class Page:
    """Runs the blocks of one page in a folder of its own; servers that it starts end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[subprocess.Popen[str]] = []
        self.addresses: dict[str, str] = {}

    def run(self, line: str) -> None:
        for written, real in self.addresses.items():
            line = line.replace(written, real)
        if " | " in line:
            run(["bash", "-c", line.replace("classer ", f"{shlex.join(COMMAND)} ")], self.folder)
            return None
        words = shlex.split(line)
        if words[0] in ("classer", ".venv/bin/classer"):
            words = [*COMMAND, *words[1:]]
            command = words[len(COMMAND)]
            if command in ("serve", "gateway"):
                return self.start(words)
            if command in ("train", "convert"):
                words = self.training(words)
            if command == "convert":
                words += ["--tokens", "10000"]
            if command == "prepare":
                words += ["--tokenizer", "./encoder"]
        elif words[:2] == ["python", "tools/launch.py"]:
            words = self.training([sys.executable, str(ROOT / "tools" / "launch.py"), *words[2:]])
        run(words, self.folder)
        return None

    def training(self, words: list[str]) -> list[str]:
        """The command with what makes it take seconds, into a folder that is free."""
        out = self.folder / words[words.index("--out") + 1]
        if out.exists():
            out.rename(out.with_name(f"{out.name}-{time.monotonic_ns()}"))
        converts = "convert" in words
        given = {word for word in words if word.startswith("--")}
        for option, value in TRAINS.items():
            if option not in given and not (converts and option == "--epochs"):
                words = [*words, option, value]
        return words

    def start(self, words: list[str]) -> None:
        """Starts a server on a free port, and lets later blocks reach it where the page says that it is."""
        written = words[words.index("--port") + 1] if "--port" in words else "50051"
        for port in ("--port", "--admin-port"):
            if port in words:
                words[words.index(port) + 1] = "0"
        words = words if "--port" in words else [*words, "--port", "0"]
        process = subprocess.Popen(words, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.servers.append(process)
        lines: list[str] = []
        ready = threading.Event()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if re.search(r"(Serving|Listening|Gateway|http://|Uvicorn).*:\d+", line):
                    ready.set()
            ready.set()

        threading.Thread(target=read, daemon=True).start()
        assert ready.wait(READY_SECONDS), f"{shlex.join(words)} did not get ready:\n{''.join(lines)}"
        assert process.poll() is None, f"{shlex.join(words)} ended:\n{''.join(lines)}"
        ports = re.findall(r":(\d+)", lines[-1])
        self.addresses[f"localhost:{written}"] = f"localhost:{ports[-1]}"

    def close(self) -> None:
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
        for server in self.servers:
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture
def page_of(prepared: Path, tmp_path: Path) -> Iterator[Page]:
    page = Page(tmp_path / "page")
    shutil.copytree(prepared, page.folder)
    yield page
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("path", GUIDE, ids=name_of)
def test_the_blocks_of_a_page_run(path: Path, page_of: Page) -> None:
    for block in blocks(path):
        if block.not_run:
            continue
        if block.language == "bash":
            for line in commands(block):
                if not line.startswith("make "):  # .ci/run's
                    page_of.run(line)
        elif block.language == "yaml":
            (page_of.folder / ("stages.yaml" if "replay" in block.text else "task.yaml")).write_text(block.text)
        elif block.language == "python":
            text = block.text.replace("ClasserClassifier(", 'ClasserClassifier(encoder="./encoder", max_length=16, ')
            if "Client(" in text and SERVER not in page_of.addresses:
                page_of.run("classer serve runs/tickets/bundle")
            run([sys.executable, "-c", text.replace(SERVER, page_of.addresses.get(SERVER, SERVER))], page_of.folder)


def test_the_environment_of_a_page_is_this_checkout() -> None:
    """The blocks run the code beside the page, not another one that is installed."""
    found = subprocess.run(
        [sys.executable, "-c", "import classer; print(classer.__file__)"], capture_output=True, text=True, check=True
    )
    assert os.path.samefile(found.stdout.strip(), ROOT / "__init__.py")
