"""Prints docs/scale.md: what training `classer-1b` on 500 million pairs takes, from what `classer aot` found.

    .venv-aot/bin/classer aot --topology h100:8x8 --json runs/aot/h100-8x8.json    # and the other topologies
    python tools/plan_scale.py runs/aot/*.json > docs/scale.md

Every figure is computed here, or stands in this file or in tools/accelerators.py with its source.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from classer.tools.accelerators import GIB, Topology

PAIRS = 500_000_000
TOKENS_A_TEXT = 128  # padding included: what a batch computes
EPOCHS = 1
# Model FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B).
UTILISATION = 0.40
UTILISATION_SOURCE = (
    "what llm-foundry's benchmarks (mosaicml/llm-foundry, scripts/train/benchmarking/README.md) report for a decoder "
    "of 1.3 billion parameters at bfloat16 with full sharding: 40.9 % on 64 H100 at 2,048 tokens, 43.2 % on 8 at 512; "
    "assumed for TPUs too, and measured by us on neither"
)
# US dollars a device and hour: on-demand list prices change; these are round figures to scale by.
PRICES = {"h100": 3.0, "v5e": 1.2, "v5p": 4.2, "v6e": 2.7}
PRICE_SOURCE = "round figures near public on-demand list prices of 2025; put your own in PRICES"
REFERENCE_DAYS = 12


@functools.cache
def flops_per_token(preset: str, length: int, labels: int = 15_000) -> float:
    """Model FLOPs of a training step (forward and backward, nothing computed twice) a token, from its jaxpr."""
    import jax
    import jax.numpy as jnp

    from classer.model.classifier import TextClassifier
    from classer.model.config import native
    from classer.model.sharding import make_layout
    from classer.tools.aot import train_program
    from classer.tools.hlo import count_flops

    layout = make_layout(jax.devices()[:1])
    config = native(preset, vocab_size=30_522, max_positions=512)
    model = TextClassifier(config, labels, jnp.dtype("bfloat16"), scan=True)
    step, state, batch = train_program(model, 8, length, layout)
    with layout.active():
        return count_flops(jax.jit(step).trace(state, batch).jaxpr.jaxpr) / (8 * length)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def train_tables(reports: list[SimpleNamespace]) -> str:
    compiled = table(
        (
            "devices",
            "mesh (data × fsdp × tensor)",
            "texts × tokens a step",
            "arguments",
            "temporaries",
            "peak of HBM",
            "fits",
        ),
        (
            (
                f"{r.devices} × {accelerator(r).name}",
                " × ".join(str(size) for size in r.mesh.values()),
                f"{r.batch_size:,} × {r.length}",
                f"{r.arguments / GIB:.2f} GiB",
                f"{r.temporaries / GIB:.2f} GiB",
                f"{peak(r) / GIB:.2f} of {r.memory / GIB:.1f} GiB",
                "no" if r.faults else "yes",
            )
            for r in reports
        ),
    )
    moved = table(
        (
            "devices",
            "mesh",
            "FLOPs",
            "rematerialised",
            "all-gather",
            "reduce-scatter",
            "all-reduce",
            "moving",
            "computing",
        ),
        (
            (
                f"{r.devices} × {accelerator(r).name}",
                " × ".join(str(size) for size in r.mesh.values()),
                f"{r.flops:.2e}",
                f"{1 - r.model_flops / r.flops:.0%}",
                *(traffic(r, kind) for kind in ("all-gather", "reduce-scatter", "all-reduce")),
                f"{moving(r) * 1e3:.0f} ms" if counted(r) else "not counted",
                f"{r.model_flops / (r.devices * accelerator(r).bf16 * UTILISATION) * 1e3:.0f} ms",
            )
            for r in reports
        ),
    )
    return f"{compiled}\n\n{moved}"


def plan_table(reports: list[SimpleNamespace], preset: str) -> str:
    total = flops_per_token(preset, TOKENS_A_TEXT) * TOKENS_A_TEXT * PAIRS * EPOCHS
    rows = []
    for r in reports:
        seconds = total / (r.devices * accelerator(r).bf16 * UTILISATION)
        hours = seconds / 3600 * r.devices
        price = PRICES[Topology.parse(r.topology).kind]
        rows.append(
            (
                f"{r.devices} × {accelerator(r).name}",
                f"{PAIRS * EPOCHS / r.batch_size:,.0f}",
                f"{seconds / 3600:.1f} h",
                f"{PAIRS * EPOCHS / seconds:,.0f}",
                f"{hours:,.0f}",
                f"${hours * price:,.0f}",
                f"{REFERENCE_DAYS * 86_400 / seconds:.0f} times as long",
            )
        )
    header = (
        "devices",
        "steps",
        "time",
        "pairs a second",
        "device hours",
        "cost",
        f"{REFERENCE_DAYS} days are",
    )
    return f"All of it is {total:.2e} FLOPs.\n\n{table(header, rows)}"


def serve_table(reports: list[SimpleNamespace]) -> str:
    return table(
        ("one device", "texts × tokens", "peak of HBM", "FLOPs", "at its int8 peak", "products"),
        (
            (
                accelerator(r).name,
                f"{r.batch_size} × {r.length}",
                f"{peak(r) / GIB:.2f} of {r.memory / GIB:.1f} GiB",
                f"{r.flops:.2e}",
                f"{r.flops / accelerator(r).int8 * 1e3:.1f} ms",
                ", ".join(f"{count} {types}" for types, count in r.products.items()),
            )
            for r in reports
        ),
    )


def accelerator(report: SimpleNamespace) -> Any:
    return Topology.parse(report.topology).accelerator


def peak(report: SimpleNamespace) -> int:
    return report.arguments + report.temporaries + report.outputs


def traffic(report: SimpleNamespace, kind: str) -> str:
    if not counted(report):
        return "not counted"
    found = report.collectives.get(kind)
    return f"{found['count']:,}: {found['bytes'] / 1e9:.1f} GB" if found else "–"


def counted(report: SimpleNamespace) -> bool:
    """Whether all collectives are seen: XLA for TPU writes no trips on its loops and hides some in fusions."""
    return Topology.parse(report.topology).kind == "h100"


def moving(report: SimpleNamespace) -> float:
    """Seconds that a device's link is busy in a step; a sum of all moves twice what it works on."""
    found = report.collectives
    return sum((1 + (kind == "all-reduce")) * found[kind]["bytes"] for kind in found) / accelerator(report).link


def page(reports: list[SimpleNamespace]) -> str:
    train = [r for r in reports if r.program == "train"]
    serve = list({Topology.parse(r.topology).kind: r for r in reports if r.program == "serve"}.values())
    preset = train[0].preset
    kinds = dict.fromkeys(Topology.parse(r.topology).kind for r in reports)
    prices = ", ".join(f"{Topology(kind, (1,)).accelerator.name} ${PRICES[kind]:.2f}" for kind in kinds)
    sources = "\n".join(
        f"- {a.name}: {a.memory / GIB:.1f} GiB, {a.bf16 / 1e12:,.0f} T bfloat16 and {a.int8 / 1e12:,.0f} T int8 "
        f"operations "
        f"and {a.link / 1e9:,.0f} GB a second; {a.source}."
        for a in (Topology(kind, (1,)).accelerator for kind in kinds)
    )
    return f"""# Training at scale, on paper

Printed by `tools/plan_scale.py` from the figures of `classer aot`; nothing here was run on an accelerator. What is
compiled is what `classer train` runs: {preset} ({train[0].parameters / 1e6:,.0f} M parameters, 15,000 labels), bfloat16
products, float32 parameters and AdamW, scanned and rematerialised layers, parameters divided over all devices.

## The training step, as compiled

{train_tables(train)}

Bytes are of one device: arguments are parameters, moments and the batch; collectives count as often as loops
run them. FLOPs are of the matrix products over all devices, from the jaxpr. A GPU program that needs more than the
memory would compile all the same; `classer aot` compares and fails, as it does where XLA copies whole arrays against
their sharding. *Moving* is the least time that the collectives take at the speed of a device's link (on GPUs the one
between hosts; within a host NVLink is nine times as fast), *computing* the time of the products at {UTILISATION:.0%} of
the peak. Where moving takes longer than computing, the utilisation below cannot be had with this mesh and batch: divide
parameters over fewer devices (`--fsdp`), or take more texts a step. On TPUs the traffic is not counted: their HLO says
neither how often a loop runs nor, within fusions, what is moved.

## {PAIRS / 1e6:,.0f} million pairs

{EPOCHS} pass over {PAIRS / 1e6:,.0f} million texts of {TOKENS_A_TEXT} tokens with padding, at
{UTILISATION:.0%} of the peak in model FLOPs, which do not count rematerialisation. {plan_table(train, preset)}

- Utilisation: {UTILISATION_SOURCE}.
- Prices: {prices} a device and hour: {PRICE_SOURCE}.
- The {REFERENCE_DAYS} days are the reference system's training time for as many pairs.

## INT8 inference, as compiled

{serve_table(serve)}

Products with int8 operands and int32 results are the encoder's; attention's two and the label head stay floats.

## Sources

{sources}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="files that `classer aot --json` wrote")
    a = parser.parse_args()
    reports = [SimpleNamespace(**r) for file in a.reports for r in json.loads(file.read_text(encoding="utf-8"))]
    print(page(sorted(reports, key=lambda r: (Topology.parse(r.topology).kind, r.devices))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
