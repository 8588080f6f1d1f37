"""Prints docs/benchmarks/scale.md: what training `classer-1b` on 500 million pairs takes (from `classer aot`).

    .venv-aot/bin/classer aot --topology h100:8x8 --length 128 --batch-size 2048 --json runs/aot/h100-8x8.json  # …
    python tools/dev/plan_scale.py runs/aot/*.json > docs/benchmarks/scale.md

Every figure is computed here, or stands in this file or in tools/aot/accelerators.py with its source.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from classer.tools.aot.accelerators import GIB, UTILISATION, UTILISATION_SOURCE, Accelerator, Topology
from classer.tools.aot.aot import Report
from classer.train.style import markdown_table

PAIRS = 500_000_000
EPOCHS = 1
# US dollars a device and hour: on-demand list prices change; these are round figures to scale by.
PRICES = {"h100": 3.0, "v5e": 1.2, "v5p": 4.2, "v6e": 2.7}
PRICE_SOURCE = "round figures near public on-demand list prices of 2025; put your own in PRICES"
REFERENCE_DAYS = 12


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return markdown_table(tuple(header), map(tuple, rows)).rstrip("\n")


def train_tables(reports: list[Report]) -> str:
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
                f"{r.peak / GIB:.2f} of {r.memory / GIB:.1f} GiB",
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
                f"{r.moving * 1e3:.0f} ms",
                f"{r.computing * 1e3:.0f} ms",
            )
            for r in reports
        ),
    )
    return f"{compiled}\n\n{moved}"


def plan_table(reports: list[Report]) -> str:
    rows = []
    for r in reports:
        steps = PAIRS * EPOCHS / r.batch_size
        seconds = steps * r.step
        hours = seconds / 3600 * r.devices
        rows.append(
            (
                f"{r.devices} × {accelerator(r).name}",
                " × ".join(str(size) for size in r.mesh.values()),
                f"{steps:,.0f}",
                f"{seconds / 3600:.1f} h",
                f"{PAIRS * EPOCHS / seconds:,.0f}",
                f"{hours:,.0f}",
                f"${hours * PRICES[Topology.parse(r.topology).kind]:,.0f}",
                f"{REFERENCE_DAYS * 86_400 / seconds:.0f} times as long",
            )
        )
    header = ("devices", "mesh", "steps", "time", "pairs a second", "device hours", "cost")
    return table((*header, f"{REFERENCE_DAYS} days are"), rows)


def serve_table(reports: list[Report]) -> str:
    return table(
        ("one device", "texts × tokens", "peak of HBM", "FLOPs", "at its int8 peak", "products"),
        (
            (
                accelerator(r).name,
                f"{r.batch_size} × {r.length}",
                f"{r.peak / GIB:.2f} of {r.memory / GIB:.1f} GiB",
                f"{r.flops:.2e}",
                f"{r.flops / accelerator(r).int8 * 1e3:.1f} ms",
                ", ".join(f"{count} {types}" for types, count in r.products.items()),
            )
            for r in reports
        ),
    )


def accelerator(report: Report) -> Accelerator:
    return Topology.parse(report.topology).accelerator


def traffic(report: Report, kind: str) -> str:
    found = [one for one in report.collectives if one.kind == kind]
    return f"{sum(one.count for one in found):,}: {sum(one.bytes for one in found) / 1e9:.1f} GB" if found else "–"


def page(reports: list[Report]) -> str:
    train = [r for r in reports if r.program == "train"]
    serve = list({Topology.parse(r.topology).kind: r for r in reports if r.program == "serve"}.values())
    preset = train[0].preset
    kinds = dict.fromkeys(Topology.parse(r.topology).kind for r in reports)
    prices = ", ".join(f"{Topology(kind, (1,)).accelerator.name} ${PRICES[kind]:.2f}" for kind in kinds)
    sources = "\n".join(
        f"- {a.name}: {a.memory / GIB:.1f} GiB, {a.bf16 / 1e12:,.0f} T bfloat16 and {a.int8 / 1e12:,.0f} T int8 "
        f"operations and {a.link / 1e9:,.0f} GB a second"
        + (f" ({a.port / 1e9:,.0f} between hosts)" if a.port != a.link else "")
        + f"; {a.source}."
        for a in (Topology(kind, (1,)).accelerator for kind in kinds)
    )
    return f"""# Training at scale, on paper

Printed by `tools/dev/plan_scale.py` from the figures of `classer aot`; nothing here was run on an accelerator. What is
compiled is what `classer train --scan --remat` runs: {preset} ({train[0].parameters / 1e6:,.0f} M parameters, 15,000
labels), bfloat16 products, float32 parameters and AdamW, parameters divided over all devices.

## The training step, as compiled

{train_tables(train)}

Bytes are of one device: arguments are parameters, moments and the batch; collectives count as often as loops
run them. FLOPs are of the matrix products over all devices, from the jaxpr. A GPU program that needs more than the
memory would compile all the same; `classer aot` compares and fails, as it does where XLA copies whole arrays against
their sharding. *Moving* is the least time that the collectives take: through a device's own links within a host and
between TPUs; between hosts the GPUs of one bring an array in together, each by its own port, as NCCL's rings do.
TPUs' programs have sums of all in the place of some gathers and scatters, which count as they stand there. *Computing*
is the time of the products at {UTILISATION:.0%} of the peak.

## {PAIRS / 1e6:,.0f} million pairs

{EPOCHS} pass over {PAIRS / 1e6:,.0f} million texts of {train[0].length} tokens with padding, in the steps above.
A step takes the longer of moving and computing, which go on at once; computing is at {UTILISATION:.0%} of the peak in
model FLOPs, which do not count rematerialisation.

{plan_table(train)}

- Utilisation: {UTILISATION_SOURCE}.
- Prices: {prices} a device and hour: {PRICE_SOURCE}.
- Google Cloud names v5p slices by TensorCores, two a chip: 32 chips are v5p-64.
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
    reports = [Report.parse(r) for file in a.reports for r in json.loads(file.read_text(encoding="utf-8"))]
    print(page(sorted(reports, key=lambda r: (Topology.parse(r.topology).kind, r.devices))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
