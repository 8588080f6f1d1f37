"""Speed of the training input pipeline: tokens per second of one core, against what models consume.

    python tools/bench/input.py runs/shards --batch-size 1024 --steps 300

Measures the CPU time of one thread that makes batches, so that other work on the machine does not matter. The kernel's
time for reading is included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from classer.data.errors import InputError
from classer.data.pipeline import epoch_batches
from classer.data.shards import Shards
from classer.model.classifier import TextClassifier
from classer.model.config import native
from classer.model.sharding import make_layout
from classer.tools.aot.accelerators import ACCELERATORS, UTILISATION
from classer.tools.aot.aot import train_program
from classer.tools.aot.hlo import count_flops


def flops_per_token(preset: str, length: int, labels: int = 15_000) -> float:
    """Model FLOPs per token of a training step (forward and backward, without recomputation), from its jaxpr."""
    layout = make_layout(jax.devices()[:1])
    config = native(preset, vocab_size=30_522, max_positions=512)
    model = TextClassifier(config, labels, jnp.dtype("bfloat16"), scan=True)
    step, state, batch = train_program(model, 8, length, layout)
    with layout.active():
        return count_flops(jax.jit(step).trace(state, batch).jaxpr.jaxpr) / (8 * length)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that `classer prepare` made")
    parser.add_argument("--batch-size", type=int, default=1024, help="texts a batch")
    parser.add_argument("--steps", type=int, default=300, help="batches to make")
    a = parser.parse_args()
    try:
        shards = Shards(a.folder)
    except InputError as error:
        parser.error(str(error))
    batches = epoch_batches(shards, batch_size=a.batch_size, seed=0, pad_id=0, num_epochs=1)
    rates, padded, real = [], 0, 0
    for first in range(0, min(a.steps, batches.num_steps), 10):
        started, tokens = time.process_time(), 0
        for step in range(first, min(first + 10, batches.num_steps)):
            batch = batches.batch(step)
            tokens += int(batch.lengths_B.sum())
            padded += batch.tokens_BS.size
        rates.append(tokens / (time.process_time() - started))
        real += tokens
    rate = statistics.median(rates)
    print(f"{rate:,.0f} tokens a second of one core (median of {len(rates)} runs of ten batches of {a.batch_size};")
    print(f"{min(rates):,.0f} to {max(rates):,.0f}); {real / padded:.1%} of the places in batches hold tokens.")
    h100 = ACCELERATORS["h100"]
    for preset in ("classer-22m", "classer-110m", "classer-1b"):
        wanted = 64 * h100.bf16 * UTILISATION / flops_per_token(preset, 128)
        consumer = f"{preset}, 64 × {h100.name} at {UTILISATION:.0%}"
        print(f"{consumer}: {wanted:,.0f} tokens a second, {wanted / rate:.1f} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
