"""One process of `test_sharding.py`. Arguments: FOLDER PORT PROCESSES RANK.

Reads cases.json from FOLDER; rank 0 writes found.json.
"""

from __future__ import annotations

import collections
import json
import re
import sys
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig
from classer.model.focus import UNITS, FocusDraw
from classer.model.sharding import Layout, make_layout, to_host
from classer.train.losses import classification_loss

ROWS, LENGTH = 16, 16  # long enough for a focus to drop tokens
# 77 labels, which is not divisible by any number of devices in the tests; the tree has three levels.
TREE = ("a", "b", *(f"{'ab'[i % 2]}{i}" for i in range(4)), *(f"leaf {i}" for i in range(45)))
PARENTS = (None, None, "a", "b", "a", "b", *(f"{'ab'[i % 2]}{i % 4}" for i in range(45)))
TAXONOMY = Taxonomy(
    (
        Task("tree", TaskKind.HIERARCHICAL, tuple(Label(n, parent=p) for n, p in zip(TREE, PARENTS, strict=True))),
        Task("multilabel", TaskKind.MULTILABEL, tuple(Label(str(i)) for i in range(7))),
        Task("multiclass", TaskKind.MULTICLASS, tuple(Label(str(i)) for i in range(19))),
    )
)
TABLE, LABELS = TAXONOMY.table, TAXONOMY.num_labels
NATIVE: dict[str, Any] = {
    "num_segments": 0,
    "norm_eps": 1e-6,
    "norm": "rms",
    "pre_norm": True,
    "biases": False,
    "activation": "swiglu",
    "rope_base": 10_000.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "native": NATIVE,
    "modernbert": NATIVE | {"norm": "layer", "activation": "geglu", "local_window": 2, "global_every": 2},
    "focus": NATIVE | {"gated": True},
}
COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def batch(kind: str) -> tuple[np.ndarray, ...]:
    """A fixed batch of rows of different lengths, two of them fillers; for focus, also each row's units to keep."""
    rng = np.random.default_rng(0)
    tokens_BS = rng.integers(0, 30, (ROWS, LENGTH), dtype=np.int32)
    lengths_B = rng.integers(1, LENGTH + 1, ROWS).astype(np.int32)
    tasks_B = np.arange(ROWS, dtype=np.int32) % len(TAXONOMY.tasks)
    targets_BL = np.zeros((ROWS, LABELS), np.float32)
    for row, number in enumerate(tasks_B):  # the target may also be an inner label of the tree
        own = TAXONOMY.slice_of(TAXONOMY.tasks[number].name)
        many = TAXONOMY.tasks[number].kind is TaskKind.MULTILABEL
        targets_BL[row, rng.choice(np.arange(own.start, own.stop), 3 if many else 1, replace=False)] = 1
    weights_B = (np.arange(ROWS) < ROWS - 2).astype(np.float32)
    units_BI = np.tile(np.array([UNITS * 3 // 4, UNITS // 2], np.int32), (ROWS, 1))
    units = [units_BI] if kind == "focus" else []
    return tokens_BS, lengths_B * (weights_B > 0), targets_BL, tasks_B, weights_B, *units


def run_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    config = EncoderConfig(30, num_layers=2, d_model=16, num_heads=4, d_ff=32, max_positions=16, **KINDS[case["kind"]])
    model = TextClassifier(config, LABELS, scan=case["scan"], remat=case["scan"])

    def init() -> Any:
        return model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))["params"]

    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: (leaf + rng.normal(0, 0.3, leaf.shape)).astype(np.float32), jax.device_get(jax.jit(init)())
    )

    def loss_fn(params: Any, batch: tuple) -> jax.Array:
        tokens_BS, lengths_B, targets_BL, tasks_B, weights_B, *units = batch
        draw = FocusDraw(units[0], jnp.float32(0.5), jnp.zeros(len(units[0]), bool)) if units else None
        logits_BL = cast(jax.Array, model.apply({"params": params}, tokens_BS, lengths_B, draw))
        return classification_loss(TABLE, logits_BL, targets_BL, tasks_B, weights_B, label_smoothing=0.1)

    whole = batch(case["kind"])
    expected = jax.device_get(jax.jit(jax.value_and_grad(loss_fn))(params, whole))
    return [
        {"case": case["kind"], **run_mesh(make_layout(fsdp=fsdp, tensor=tensor), loss_fn, params, whole, expected)}
        for fsdp, tensor in case["meshes"]
    ]


def run_mesh(layout: Layout, loss_fn: Any, params: Any, whole: tuple, expected: Any) -> dict[str, Any]:
    def step(params: Any, batch: tuple) -> Any:
        with layout.active():
            return jax.value_and_grad(loss_fn)(params, batch)

    rows = layout.rows(ROWS)
    mine = jax.tree.map(
        lambda x: np.where(np.isin(np.arange(ROWS), rows).reshape(-1, *[1] * (x.ndim - 1)), x, 0), whole
    )
    placed = layout.put(params), layout.put_batch(jax.tree.map(lambda x: x[rows], mine), ROWS)
    compiled = jax.jit(step, out_shardings=(layout.replicated, layout.shardings(params))).lower(*placed).compile()
    loss, gradients = compiled(*placed)
    found = jax.tree.leaves(jax.tree.map(to_host, gradients))
    wanted = jax.tree.leaves(expected[1])
    program = compiled.as_text() or ""
    table = placed[0]["head"]["kernel"]
    shares = [
        leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(placed[0]) if leaf.size > 100
    ]
    return {
        "mesh": [layout.mesh.shape[axis] for axis in layout.mesh.axis_names],
        "loss": float(loss),
        "loss_error": abs(float(loss) - float(expected[0])),
        "gradient_error": max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True)),
        "largest_gradient": max(float(np.abs(leaf).max()) for leaf in found),
        "smallest_gradient": min(float(np.abs(leaf).max()) for leaf in found),
        "largest_share": max(shares),
        "collectives": collections.Counter(COLLECTIVE.findall(program)),
        "labels": LABELS,
        "table_share": table.addressable_shards[0].data.size / table.size,
        "table_labels": table_labels(program, len(table)),
    }


def table_labels(program: str, width: int) -> list[int]:
    """The sizes of the other axis of all float32 matrices in a device's program that have an axis of size `width`."""
    found = re.findall(rf"f32\[(?:{width},(\d+)|(\d+),{width})\]", program)
    return sorted({int(a or b) for a, b in found})


def main() -> None:
    folder, port, processes, rank = Path(sys.argv[1]), *map(int, sys.argv[2:])
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    found = [result for case in json.loads((folder / "cases.json").read_text()) for result in run_case(case)]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
