"""Prints the device memory of the full loss over many labels: the label head alone, forward and backward.

    .venv/bin/python tools/bench/labels.py

Compiled for virtual CPU devices and not run. The texts are those of one group of `tensor` devices, the labels a tree of
two levels. Lastly: how many labels would fill a device that has nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from typing import Any

DEVICES = 8
MEMORY = 80e9  # bytes of a device
TEXTS_A_DEVICE = 16


def compiled_memory(texts: int, labels: int, width: int, tensor: int) -> tuple[int, int]:
    """Bytes per device: of the table with its gradient and both moments of AdamW, and of the rest of the step."""
    import jax
    import jax.numpy as jnp

    from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
    from classer.model.classifier import LabelHead
    from classer.model.sharding import make_layout
    from classer.train.losses import classification_loss

    top = math.isqrt(labels)
    tree = tuple(Label(str(i), parent=str(i % top) if i >= top else None) for i in range(labels))
    table = Taxonomy((Task("tree", TaskKind.HIERARCHICAL, tree),)).table
    layout = make_layout(jax.devices()[:tensor], tensor=tensor)

    def loss(params: Any, pooled_BD: jax.Array, *batch: jax.Array) -> jax.Array:
        logits_BL: Any = LabelHead(labels).apply({"params": params["head"]}, pooled_BD)
        return classification_loss(table, logits_BL, *batch, label_smoothing=0.1)

    def step(*arguments: Any) -> Any:
        with layout.active():
            return jax.value_and_grad(loss, argnums=(0, 1))(*arguments)

    def row(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((texts, *shape), dtype, sharding=layout.batch)

    params = {"head": jax.eval_shape(LabelHead(labels).init, jax.random.key(0), jnp.zeros((1, width)))["params"]}
    shardings = layout.shardings(params)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    batch = row(jnp.float32, width), row(jnp.float32, labels), row(jnp.int32), row(jnp.float32)
    placed = jax.jit(step, out_shardings=(layout.replicated, (shardings, layout.batch)))
    memory: Any = placed.lower(params, *batch).compile().memory_analysis()
    return 16 * (width // tensor + 1) * labels, memory.temp_size_in_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[15_000, 150_000], help="of the whole taxonomy")
    parser.add_argument("--texts", type=int, nargs="+", default=[32, 1024], help="of one group of `tensor` devices")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 2048], help="of the model")
    a = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    print("| width | labels | tensor | table, gradient, moments |", *(f"temporaries, {n:,} texts |" for n in a.texts))
    print("|---:" * (4 + len(a.texts)) + "|")
    for width, labels, tensor in itertools.product(a.widths, a.labels, (1, DEVICES)):
        rest, temporaries = zip(*(compiled_memory(texts, labels, width, tensor) for texts in a.texts), strict=True)
        sizes = (f"{size / 1e6:,.0f} MB" for size in (rest[0], *temporaries))
        print("| " + " | ".join((f"{width:,}", f"{labels:,}", str(tensor), *sizes)) + " |", flush=True)
    for width, tensor in itertools.product(a.widths, (1, DEVICES)):
        each = sum(compiled_memory(TEXTS_A_DEVICE * tensor, max(a.labels), width, tensor)) / max(a.labels)
        full = f"{MEMORY / each / 1e6:,.1f} million labels in {MEMORY / 1e9:.0f} GB"
        print(f"{TEXTS_A_DEVICE} texts a device, width {width:,}, tensor {tensor}: {each:,.0f} bytes a label, {full}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
