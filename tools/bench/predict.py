"""`classer predict` on many short texts: rows per second against the bare program, memory, and resumption after kills.

    python tools/bench/predict.py runs/banking77/bundle --rows 1000000

The rows are drawn from the real texts of a folder of data sets. One run is not interrupted; another is killed three
times and continued each time, and both outputs are compared. 20,000 rows take minutes on two cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from classer.data.errors import InputError
from classer.model.variants import VARIANTS
from classer.tools.bulk.models import BulkOptions, BundleModel
from classer.tools.cli.arguments import BundleArgument
from classer.tools.cli.load_runner import resident_mb
from classer.tools.cli.main import run

KILLS = 3
MEMORY_AT = (0.1, 0.5, 1.0)
BATCH = 4096


@dataclasses.dataclass(frozen=True)
class PredictBenchmarkArguments:
    """
    Attributes:
      bundle: the bundle that predicts.
      data: the folder of data sets; by default $CLASSER_DATASETS, or `shared/datasets` beside the repository.
      rows: number of rows.
      max_chars: texts that are longer are left out.
      task: name of the bundle's task; needed only if it has several.
      precision: the value of --precision; "auto" measures the bare programs and takes the fastest for all runs, so that
        their outputs can be compared.
      focus: the value of --focus; needs a bundle that was trained for it.
      bare_rows: how many rows the bare program is measured on.
      seed: seed of the draw.
      out: a JSON file for the results.
    """

    bundle: BundleArgument
    data: Path | None = None
    rows: int = 1_000_000
    max_chars: int = 80
    task: str | None = None
    precision: str = "auto"
    focus: str | None = None
    bare_rows: int = 20_000
    seed: int = 0
    out: Path | None = None


def main(a: PredictBenchmarkArguments) -> None:
    """Measures and prints. Raises InputError if the outputs differ."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "datasets"
    datasets = a.data or Path(os.environ.get("CLASSER_DATASETS") or beside)
    if not datasets.is_dir():
        print("skipped: no data sets")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = short_texts(datasets, a.max_chars)
        drawn = write_rows(folder / "in.parquet", texts, a.rows, a.seed)
        precision, bare = fastest_program(a, drawn[: a.bare_rows])
        command = [sys.executable, "-m", "classer.tools.cli.main", "predict", str(a.bundle)]
        command += ["--data", str(folder / "in.parquet"), "--precision", precision]
        command += ["--task", a.task] if a.task else []
        command += ["--focus", a.focus] if a.focus else []
        figures: dict[str, Any] = {"rows": a.rows, "distinct": len(texts), "precision": precision}
        figures |= {"focus": a.focus or "1", "bare": bare}
        figures |= uninterrupted(command, folder / "whole.parquet", a.rows)
        figures |= killed(command, folder / "killed.parquet", a.rows)
        same = (folder / "whole.parquet").read_bytes() == (folder / "killed.parquet").read_bytes()
        figures["equal"] = same
        print(table(figures))
        if a.out is not None:
            a.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        if not same:
            raise InputError("The output of the run that was killed differs from the other one's.")


def short_texts(datasets: Path, max_chars: int) -> list[str]:
    """The distinct texts of all data sets that are no longer than that, sorted."""
    texts: set[str] = set()
    for file in sorted(datasets.glob("*/*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts.update(text for line in lines if len(text := json.loads(line)["text"]) <= max_chars and text.strip())
    return sorted(texts)


def write_rows(file: Path, texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Writes that many rows, drawn from the texts; returns the first of them."""
    rng = np.random.default_rng(seed)
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    first: list[str] = []
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, count, 1 << 16):
            drawn: list[str] = [texts[int(i)] for i in rng.integers(0, len(texts), min(1 << 16, count - start))]
            first = first or [*drawn]
            writer.write_table(pa.table({"id": range(start, start + len(drawn)), "text": drawn}, schema=schema))
    return first


def fastest_program(a: PredictBenchmarkArguments, texts: Sequence[str]) -> tuple[str, float]:
    """The precision of the fastest programs, and their rows per second."""
    rates = {one: bare_program(a, one, texts) for one in (VARIANTS if a.precision == "auto" else (a.precision,))}
    best = max(rates, key=lambda one: rates[one])
    return best, rates[best]


def bare_program(a: PredictBenchmarkArguments, precision: str, texts: Sequence[str]) -> float:
    """Rows per second of the compiled programs alone, without reading, tokenising and writing."""
    model = BundleModel(a.bundle, BulkOptions(a.task, focus=a.focus), precision)
    ids = [row for start in range(0, len(texts), BATCH) for row in model.prepare(texts[start : start + BATCH]).ids]
    model.outputs(ids[:BATCH])  # compiles
    begin = time.perf_counter()
    for start in range(0, len(ids), BATCH):
        model.outputs(ids[start : start + BATCH])
    return len(ids) / (time.perf_counter() - begin)


def uninterrupted(command: Sequence[str], out: Path, rows: int) -> dict[str, Any]:
    """Rows per second from the first finished chunk to the last, and memory during the run."""
    seen: list[tuple[float, int, float]] = []
    begin = time.perf_counter()
    with started(command, out) as process:
        while process.poll() is None:
            done = finished_rows(out)
            if done and (not seen or done > seen[-1][1]):
                seen.append((time.perf_counter() - begin, done, resident_mb(process.pid)))
            time.sleep(0.02)
        if process.returncode:
            raise InputError(f"The run ended with exit code {process.returncode}.")
    whole = time.perf_counter() - begin
    (first, before, _), (last, after, _) = seen[0], seen[-1]
    memory = {f"{share:.0%}": next(mb for _, done, mb in seen if done >= share * after) for share in MEMORY_AT}
    rate = (after - before) / (last - first) if last > first else rows / whole
    return {"seconds": whole, "rate": rate, "memory_mb": memory}


def killed(command: Sequence[str], out: Path, rows: int) -> dict[str, Any]:
    """Kills the run three times, then lets it finish."""
    lost = []
    for kill in range(1, KILLS + 1):
        with started(command, out) as process:
            while (done := finished_rows(out)) < rows * kill / (KILLS + 1):
                if process.poll() is not None:
                    raise InputError("The run ended before it could be killed; ask for more --rows.")
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
        lost.append(done)
    with started(command, out) as process:
        if process.wait():
            raise InputError(f"The run that went on ended with exit code {process.returncode}.")
    return {"killed_at": lost}


@contextlib.contextmanager
def started(command: Sequence[str], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finished_rows(out: Path) -> int:
    """The number of rows in finished chunks, from the names of their files."""
    return sum(int(path.name.split(".")[2]) for path in out.with_name(out.name + ".part").glob("*.rows"))


def table(figures: dict[str, Any]) -> str:
    memory = ", ".join(f"{mb:,.0f} MB at {share}" for share, mb in figures["memory_mb"].items())
    rate, bare, kills = figures["rate"], figures["bare"], ", ".join(f"{done:,}" for done in figures["killed_at"])
    setting = f"precision {figures['precision']}, focus {figures['focus']}"
    return "\n".join(
        [
            f"{figures['rows']:,} rows of {figures['distinct']:,} real texts, {setting}",
            f"classer predict  {rate:10,.0f} rows a second, {figures['seconds']:,.0f} s with the start",
            f"bare program     {bare:10,.0f} rows a second, of which classer predict reaches {rate / bare:.1%}",
            f"resident memory  {memory}",
            f"killed at        {kills} rows and continued: the output {'is equal' if figures['equal'] else 'DIFFERS'}",
        ]
    )


if __name__ == "__main__":
    sys.exit(
        run(lambda argv: main(tyro.cli(PredictBenchmarkArguments, args=[*argv], description=__doc__)), sys.argv[1:])
    )
