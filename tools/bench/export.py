"""Exports against Classer's own programs: difference of probabilities, size, loading time and speed.

    .venv/bin/python tools/bench/export.py runs/x/bundle-float32 runs/x/bundle --data FOLDER …

Writes every format of both bundles, and ONNX Runtime's own dynamic quantisation of the float32 ONNX file. Then, over
real texts of each folder: the largest difference of a probability from Classer's float32 (INT8: from Classer's INT8)
and the share of texts with the same most probable label, in each task; and for INT8 the mean and the largest distance
from Classer's float32 besides. Speed is measured on batches of `--tokens` tokens, all runtimes in turn, round by round;
the median counts.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from classer.data.readers import read_task_folder
from classer.data.taxonomy import Task
from classer.model.bundle import Bundle, load_bundle
from classer.model.precision import Precision
from classer.tools.cli.main import run
from classer.tools.export.folder import Export
from classer.tools.export.formats import FORMATS
from classer.tools.export.run import export_bundle, make_request
from classer.tools.export.runtime import TokenRuntime

CASES = (
    ("safetensors", "float32"),
    ("stablehlo", "float32"),
    ("stablehlo", "bfloat16"),
    ("savedmodel", "float32"),
    ("onnx", "float32"),
    ("onnx", "float16"),
    ("onnx", "bfloat16"),
    ("openvino", "float32"),
    ("litert", "float32"),
    ("stablehlo", "int8"),
    ("savedmodel", "int8"),
    ("onnx-int8", "int8"),
    ("openvino", "int8"),
    ("litert", "int8"),
)
DYNAMIC = "onnx, ONNX Runtime's dynamic quantisation"
BATCH = 32


@dataclasses.dataclass(frozen=True)
class ExportBenchmarkArguments:
    """
    Attributes:
      float_bundle: a float32 bundle.
      int8_bundle: the INT8 bundle of the same run.
      data: folders with task.json.
      split: which of their splits.
      texts: how many texts of each, drawn at random.
      tokens: length of the batches that are timed.
      batches: their sizes.
      rounds: how often each runtime is timed; 0 leaves speed out.
      only: formats to measure; none is all.
      seed: seed of the draw of texts.
      out: a JSON file for the results.
    """

    float_bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FLOAT32")]
    int8_bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="INT8")]
    data: tuple[Path, ...]
    split: str = "test"
    texts: int = 1000
    tokens: int = 64
    batches: tuple[int, ...] = (1, 32)
    rounds: int = 15
    only: tuple[str, ...] = ()
    seed: int = 0
    out: Path | None = None


@dataclasses.dataclass
class Row:
    """One runtime: its name, its function and its measurements."""

    name: str
    precision: str
    classify: Callable[[Sequence[str], int], np.ndarray]
    run: Callable[[np.ndarray, np.ndarray], object] | None
    megabytes: float = 0.0
    load_seconds: float = 0.0
    measured: dict[str, float] = dataclasses.field(default_factory=dict)


def main(argv: Sequence[str]) -> None:
    a = tyro.cli(ExportBenchmarkArguments, args=list(argv), description=__doc__)
    bundles = {"float32": load_bundle(a.float_bundle), "int8": load_bundle(a.int8_bundle)}
    ours = {name: own(bundle) for name, bundle in bundles.items()}
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = [*ours.values(), *load_all(bundles, Path(folder), a.only)]
        times = measure_speed(rows, a) if a.rounds else {}
        for data in a.data:
            texts = drawn_texts(data, a)
            references = {name: row.classify(texts, BATCH) for name, row in ours.items()}
            for row in tqdm(rows, desc=f"Comparing on {data.name}", unit="runtime"):
                compare(row, bundles["float32"], row.classify(texts, BATCH), references)
            print_tables(rows, times, a, f"{data.name}, {len(texts):,} texts of {a.split}")
            figures[data.name] = {
                f"{row.name}, {row.precision}": {**row.measured, **times.get(id(row), {})} for row in rows
            }
    if a.out is not None:
        a.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def drawn_texts(data: Path, a: ExportBenchmarkArguments) -> list[str]:
    examples = list(read_task_folder(data, (a.split,)).splits[a.split])
    chosen = np.random.default_rng(a.seed).permutation(len(examples))[: a.texts]
    return [examples[i].text for i in chosen]


def own(bundle: Bundle) -> Row:
    """Classer's own programs, as Turbine runs them."""
    predictor = bundle.predictor()

    def classify(texts: Sequence[str], batch_size: int) -> np.ndarray:
        logits_NL = predictor.logits(bundle.tokenizer.encode(texts, bundle.max_length).ids, batch_size=batch_size)
        return np.concatenate([bundle.probabilities(task.name, logits_NL) for task in bundle.taxonomy.tasks], axis=1)

    def run_batch(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> object:
        return predictor.compile(*tokens_BS.shape)(tokens_BS, lengths_B)

    return Row("Classer", bundle.precision, classify, run_batch)


def load_all(bundles: dict[str, Bundle], folder: Path, only: Sequence[str]) -> list[Row]:
    rows = []
    for target, precision in tqdm(CASES, desc="Exporting", unit="format"):
        if target not in FORMATS or (only and target not in only):
            continue
        bundle = bundles["int8" if precision == "int8" else "float32"]
        out = folder / f"{target}-{precision}"
        checked = export_bundle(make_request(bundle, target, precision=Precision(precision)), target, out)
        rows.append(load_row(checked.export, target, precision))
        if (target, precision) == ("onnx", "float32"):
            rows.append(quantized_by_onnxruntime(checked.export, folder))
    return rows


def load_row(export: Export, target: str, precision: str) -> Row:
    started = time.perf_counter()
    runtime: Any = FORMATS[target].load_module().load(export)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in export.path.rglob("*") if file.is_file()) / 1e6
    run_batch = runtime.run if isinstance(runtime, TokenRuntime) else None
    return Row(target, precision, runtime, run_batch, size, seconds)


def quantized_by_onnxruntime(export: Export, folder: Path) -> Row:
    from onnxruntime.quantization import quantize_dynamic

    twin = folder / "dynamic"
    shutil.copytree(export.path, twin)
    quantize_dynamic(export.path / "model.onnx", twin / "model.onnx")
    row = load_row(dataclasses.replace(export, path=twin, precision=Precision.int8), "onnx", Precision.int8)
    return dataclasses.replace(row, name=DYNAMIC)


def compare(row: Row, bundle: Bundle, got_NL: np.ndarray, references: dict[str, np.ndarray]) -> None:
    """Records how far a runtime's probabilities are from Classer's."""
    own_NL = references["int8" if row.precision == "int8" else "float32"]
    agreement, to_float = [], []
    for task in bundle.taxonomy.tasks:
        columns = bundle.taxonomy.slice_of(task.name)
        best = [top_labels(task, p_NL[:, columns]) for p_NL in (got_NL, own_NL, references["float32"])]
        agreement.append((best[0] == best[1]).mean())
        to_float.append((best[0] == best[2]).mean())
    distance_NL = np.abs(got_NL - references["float32"])
    row.measured = {
        "difference": float(np.abs(got_NL - own_NL).max()),
        "agreement": float(min(agreement)),
        "float_agreement": float(min(to_float)),
        "float_difference": float(distance_NL.max()),
        "float_distance": float(distance_NL.max(axis=1).mean()),
        "megabytes": row.megabytes,
        "load_seconds": row.load_seconds,
    }


def top_labels(task: Task, probs_NL: np.ndarray) -> np.ndarray:
    """Each text's most probable label; of a tree, leaf."""
    return np.where(task.leaves_L, probs_NL, -1.0).argmax(axis=1)


def measure_speed(rows: Sequence[Row], a: ExportBenchmarkArguments) -> dict[int, dict[str, float]]:
    """Median milliseconds a batch, by row and batch size."""
    times: dict[int, dict[str, float]] = {id(row): {} for row in rows}
    rng = np.random.default_rng(0)
    for size in a.batches:
        tokens_BS = rng.integers(1000, 20_000, (size, a.tokens)).astype(np.int32)
        lengths_B = np.full(size, a.tokens, np.int32)
        taken: dict[int, list[float]] = {id(row): [] for row in rows if row.run}
        for _ in tqdm(range(a.rounds + 1), desc=f"Timing, batch {size}", unit="round"):
            for row in rows:
                if row.run:
                    started = time.perf_counter()
                    row.run(tokens_BS, lengths_B)
                    taken[id(row)].append(time.perf_counter() - started)
        for key, seconds in taken.items():
            times[key][f"milliseconds at batch {size}"] = 1e3 * float(np.median(seconds[1:]))  # the first warms up
    return times


def print_tables(
    rows: Sequence[Row], times: dict[int, dict[str, float]], a: ExportBenchmarkArguments, title: str
) -> None:
    print(f"\n{title}\n")
    speed = [f"milliseconds at batch {size}" for size in a.batches] if times else []
    head = ["runtime", "precision", "largest difference", "same top label", "MB", "load, s"]
    print("| " + " | ".join([*head, *(f"ms, batch {size}" for size in a.batches if times)]) + " |")
    print("|---" * (len(head) + len(speed)) + "|")
    for row in rows:
        m = row.measured
        cells = [row.name, row.precision, f"{m['difference']:.1e}", f"{m['agreement']:.2%}"]
        cells += [f"{m['megabytes']:.1f}", f"{m['load_seconds']:.2f}"] if row.megabytes else ["", ""]
        cells += [f"{times[id(row)][name]:.1f}" if name in times[id(row)] else "" for name in speed]
        print("| " + " | ".join(cells) + " |")
    print("\nINT8 beside Classer's float32:\n")
    print("| runtime | mean distance | largest distance | same top label |\n|---|---|---|---|")
    for row in rows:
        if row.precision == "int8":
            m = row.measured
            print(
                f"| {row.name} | {m['float_distance']:.4f} | {m['float_difference']:.3f} | {m['float_agreement']:.2%} |"
            )


if __name__ == "__main__":
    import sys

    raise SystemExit(run(main, sys.argv[1:]))
