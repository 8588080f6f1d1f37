"""Measurements that need a GPU: `make gpu-check GPU_PYTHON=…`, or, in a bare CUDA image,

    pip install 'jax[cuda12]' flax optax && mkdir -p .pyright && ln -sfn .. .pyright/classer
    PYTHONPATH=.pyright python tools/dev/gpu_check.py --out gpu-report

Needs JAX, Flax and Optax alone (with matplotlib it also draws pictures). Weights are random: speed and rounding do not
depend on what they were trained for. Writes report.md and report.json:
- numerics: the same program on this device and on the CPU, float32, bfloat16 and INT8;
- INT8 against bfloat16: the encoder's products, shape by shape, and whole programs in texts a second;
- a training step: tokens a second and model FLOPs utilisation.

`--tiny` runs all of it in a minute on any machine, to see that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig, native
from classer.model.precision import Precision
from classer.model.quantize import INT8_MAX, is_quantized, unflatten
from classer.tools.aot.accelerators import bf16_peak
from classer.tools.aot.hlo import count_flops, instructions, products
from classer.train.step import LossConfig, init_state, make_optimizer, make_train_step

VOCAB = 30_522
# Of a run's output on another device, in units of the largest: float32 products on a GPU may be TF32.
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2, "int8": 5e-2}


@dataclasses.dataclass(frozen=True)
class Size:
    """What is run: presets, labels, a batch for numerics, (texts, tokens) of programs, of training steps; rounds."""

    presets: tuple[str, ...] = ("classer-22m", "classer-110m", "classer-1b")
    labels: int = 1000
    numerics: tuple[int, int] = (8, 64)
    programs: tuple[tuple[int, int], ...] = ((1, 64), (32, 64), (128, 64), (512, 64), (64, 256), (256, 256))
    steps: tuple[tuple[int, int], ...] = ((256, 128), (64, 256))
    rounds: int = 20


TINY = Size(("classer-5m",), 7, (2, 16), ((2, 16),), ((4, 16),), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the report")
    parser.add_argument("--tiny", action="store_true", help="small models and few rounds, on any device")
    a = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu" and not a.tiny:
        print("JAX sees no GPU here: install jax[cuda12] on a machine that has one, or try --tiny.", file=sys.stderr)
        return 2
    size = TINY if a.tiny else Size()
    report: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    for name, measure in (
        ("numerics", numerics),
        ("products", compare_products),
        ("programs", time_programs),
        ("training", time_training),
    ):
        print(f"{name} …", file=sys.stderr, flush=True)
        report[name] = measure(size)
        write(report, a.out)  # after each part, so that a run that is cut short leaves what it has measured
    report["picture"] = draw(report, a.out)
    write(report, a.out)
    print(describe(report))
    print(f"Report: {a.out}")
    wrong = [row for row in report["numerics"] if not row["ok"]]
    return 1 if wrong else 0


def random_weights(config: EncoderConfig, labels: int, precision: str) -> Any:
    """Variables of a classifier, random as at the beginning of training; INT8 ones with a scale per channel."""
    model = TextClassifier(config, labels)
    ids = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), *ids)["params"]
    if precision != "int8":
        return {"params": params}
    named = {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    weights: dict[str, Any] = {}
    for name, value in named.items():
        if is_quantized(name):
            axis = 0 if name.endswith(".kernel") else 1
            scale = jnp.maximum(jnp.abs(value).max(axis=axis) / INT8_MAX, 1e-30)
            weights[name] = np.asarray(jnp.round(value / jnp.expand_dims(scale, axis)).astype(jnp.int8))
            weights[f"{name}_scale"] = np.asarray(scale)
        else:
            weights[name] = np.asarray(value)
    return {"params": unflatten(weights)}


def compiled(config: EncoderConfig, labels: int, precision: str, batch: int, length: int, device: Any) -> tuple:
    """(executable, its variables on the device, tokens, lengths)."""
    stored = Precision.int8 if precision == "int8" else Precision.float32
    dtype = jnp.float32 if precision == "float32" else jnp.bfloat16
    model = TextClassifier(config, labels, dtype, stored)
    weights = jax.device_put(random_weights(config, labels, precision), device)
    rng = np.random.default_rng(0)
    tokens_BS = jax.device_put(rng.integers(0, VOCAB, (batch, length), np.int32), device)
    lengths_B = jax.device_put(rng.integers(length // 2, length + 1, batch).astype(np.int32), device)

    def forward(weights: Any, tokens_BS: jax.Array, lengths_B: jax.Array) -> Any:
        return model.apply(weights, tokens_BS, lengths_B)

    return jax.jit(forward).lower(weights, tokens_BS, lengths_B).compile(), weights, tokens_BS, lengths_B


def numerics(size: Size) -> list[dict[str, Any]]:
    """The smallest preset's logits here and on the CPU."""
    config = native(size.presets[0], vocab_size=VOCAB)
    rows = []
    for precision, tolerance in TOLERANCE.items():
        logits = []
        for device in (jax.devices()[0], jax.devices("cpu")[0]):
            program, *arguments = compiled(config, size.labels, precision, *size.numerics, device)
            logits.append(np.asarray(program(*arguments), np.float64))
        difference = float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max())
        rows.append({"precision": precision, "difference": difference, "tolerance": tolerance})
        rows[-1]["ok"] = difference <= tolerance
    return rows


def compare_products(size: Size) -> list[dict[str, Any]]:
    """The encoder's matrix products, int8 × int8 → int32 beside bfloat16, for the tokens of each program."""
    rows = []
    tokens = sorted({batch * length for batch, length in size.programs})
    for preset in size.presets:
        config = native(preset, vocab_size=VOCAB)
        D, F = config.d_model, config.d_ff
        for name, (rows_in, columns) in {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 2 * F), "down": (F, D)}.items():
            for N in tokens:
                seconds = {}
                for dtype, result in ((jnp.int8, jnp.int32), (jnp.bfloat16, jnp.float32)):
                    product = functools.partial(lax.dot, preferred_element_type=result)
                    operands = jnp.ones((N, rows_in), dtype), jnp.ones((rows_in, columns), dtype)
                    seconds[dtype.__name__] = median_seconds(jax.jit(product), operands, size.rounds)
                flops = 2 * N * rows_in * columns
                rows.append(
                    {
                        "preset": preset,
                        "product": name,
                        "tokens": N,
                        "shape": [N, rows_in, columns],
                        "bfloat16_tflops": flops / seconds["bfloat16"] / 1e12,
                        "int8_tops": flops / seconds["int8"] / 1e12,
                        "speedup": seconds["bfloat16"] / seconds["int8"],
                    }
                )
    return rows


def time_programs(size: Size) -> list[dict[str, Any]]:
    """Whole programs as a server runs them, full batches: texts a second; the error where one does not fit."""
    rows = []
    for preset in size.presets:
        config = native(preset, vocab_size=VOCAB)
        for batch, length in size.programs:
            row: dict[str, Any] = {"preset": preset, "texts": batch, "tokens": length}
            try:
                for precision in ("bfloat16", "int8"):
                    program, *arguments = compiled(config, size.labels, precision, batch, length, jax.devices()[0])
                    row[f"{precision}_texts_per_s"] = batch / median_seconds(program, arguments, size.rounds)
                    if precision == "int8":
                        row["int8_products"] = products(instructions(program.as_text() or "")).get("s8×s8→s32", 0)
                row["speedup"] = row["int8_texts_per_s"] / row["bfloat16_texts_per_s"]
            except jax.errors.JaxRuntimeError as e:
                row["error"] = _first_line(e)
            rows.append(row)
    return rows


def time_training(size: Size) -> list[dict[str, Any]]:
    """A training step of each preset on this one device; the error where it does not fit."""
    peak = bf16_peak(jax.devices()[0].device_kind)
    rows = []
    for preset in size.presets:
        config = native(preset, vocab_size=VOCAB)
        for batch, length in size.steps:
            row: dict[str, Any] = {"preset": preset, "texts": batch, "tokens": length}
            try:
                seconds, flops = train_step(config, size.labels, batch, length, size.rounds)
            except jax.errors.JaxRuntimeError as e:
                row["error"] = _first_line(e)
            else:
                row |= {"seconds": seconds, "tokens_per_s": batch * length / seconds, "tflops": flops / seconds / 1e12}
                row["utilisation"] = flops / seconds / peak if peak else None
            rows.append(row)
    return rows


def train_step(config: EncoderConfig, labels: int, batch: int, length: int, rounds: int) -> tuple[float, int]:
    """(median seconds of a step, its model FLOPs)."""
    model = TextClassifier(config, labels, jnp.bfloat16, scan=True, remat=True)
    recipe: Any = SimpleNamespace(max_grad_norm=1.0, weight_decay=0.01)
    optimizer = make_optimizer(recipe, lambda step: 1e-4)
    loss = LossConfig(label_smoothing=0.05)
    rng = np.random.default_rng(0)
    data: Any = SimpleNamespace(
        tokens_BS=jnp.asarray(rng.integers(0, VOCAB, (batch, length), np.int32)),
        lengths_B=jnp.full((batch,), length, jnp.int32),
        targets_BL=jax.nn.one_hot(jnp.asarray(rng.integers(0, labels, batch)), labels),
        weights_B=jnp.ones((batch,), jnp.float32),
        tasks_B=jnp.zeros((batch,), jnp.int32),
        soft_BL=None,
        soft_share_B=None,
        vectors_BV=None,
    )
    table = Taxonomy((Task("all", TaskKind.MULTICLASS, tuple(Label(str(i)) for i in range(labels))),)).table
    ids = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), *ids)["params"]
    state = jax.jit(lambda params: init_state(params, optimizer))(params)
    # Rematerialised products are not counted: utilisation is of the model's own FLOPs.
    plain = make_train_step(model.clone(remat=False), table, optimizer, loss)
    flops = count_flops(jax.make_jaxpr(lambda state: plain(state, data))(state).jaxpr)
    step = make_train_step(model, table, optimizer, loss)
    times = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        state, metrics = step(state, data)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:]), flops


def median_seconds(function: Callable, arguments: Sequence[Any], rounds: int) -> float:
    """Of one call, waiting for the device; each round is as many calls as make its overhead small."""
    jax.block_until_ready(function(*arguments))
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(50, round(0.02 / max(time.perf_counter() - started, 1e-6))))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120]


def write(report: dict[str, Any], out: Path) -> None:
    """Writes report.json and report.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report in Markdown, of the parts that there are."""
    lines = [f"# GPU check: {report['device']}, JAX {report['jax']}", "", "## Numerics against the CPU", ""]
    for row in report["numerics"]:
        said = "agrees" if row["ok"] else "DIFFERS"
        lines.append(
            f"- {row['precision']}: {said}, by {row['difference']:.1e} of the largest logit ({row['tolerance']:g})"
        )
    for title, name in (
        ("INT8 against bfloat16, by product", "products"),
        ("Programs", "programs"),
        ("A training step, bfloat16, rematerialised", "training"),
    ):
        if name not in report:
            continue
        columns = list(dict.fromkeys(key for row in report[name] for key in row))
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in report[name]]
    if "picture" in report:
        picture = report["picture"]
        lines += [
            "",
            f"![programs and products]({picture})" if picture else "No pictures: matplotlib is not installed.",
        ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def draw(report: dict[str, Any], out: Path) -> str | None:
    """Draws programs and products; the picture's name, or None where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    programs = [row for row in report["programs"] if "error" not in row]
    for place, row in enumerate(programs):
        axes[0].barh(place - 0.2, row["bfloat16_texts_per_s"], 0.4, color="tab:blue")
        axes[0].barh(place + 0.2, row["int8_texts_per_s"], 0.4, color="tab:orange")
    names = [f"{row['preset']}, {row['texts']} × {row['tokens']}" for row in programs]
    axes[0].set(yticks=range(len(names)), yticklabels=names, xlabel="texts a second (blue bfloat16, orange int8)")
    axes[0].set_xscale("log")
    for preset in dict.fromkeys(row["preset"] for row in report["products"]):
        rows = [row for row in report["products"] if row["preset"] == preset]
        flops = [2 * np.prod(np.float64(row["shape"])) / 1e9 for row in rows]
        axes[1].scatter(flops, [row["speedup"] for row in rows], label=preset)
    axes[1].axhline(1, color="grey", lw=1)
    axes[1].set(xscale="log", xlabel="GFLOP of a product", ylabel="int8 speed over bfloat16")
    axes[1].legend()
    figure.suptitle(report["device"])
    figure.savefig(out / "report.png", dpi=120)
    plt.close(figure)
    return "report.png"


if __name__ == "__main__":
    sys.exit(main())
