"""Processes of `test_checkpoints.py`: ACTION FOLDER [FSDP TENSOR [STEP]]; also several, as launchers start them."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from classer.data.errors import InputError
from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig
from classer.model.sharding import make_layout
from classer.train.checkpoints import Checkpoints, Progress
from classer.train.distributed import join
from classer.train.step import TrainState, abstract_state, init_state

CONFIG = EncoderConfig(vocab_size=20, num_layers=1, d_model=16, num_heads=2, d_ff=32, max_positions=16)
LARGE = EncoderConfig(vocab_size=4000, num_layers=1, d_model=16, num_heads=2, d_ff=32, max_positions=16)
OPTIMIZER = optax.adam(1e-3)


def numbered(tree: Any) -> Any:
    """Every element of every leaf is another number."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 100, leaf.shape).astype(leaf.dtype), tree)


def write_until_it_fails(folder: Path, model: TextClassifier, steps: range) -> int:
    shapes = abstract_state(model, OPTIMIZER).params
    try:
        with Checkpoints(folder) as checkpoints:
            for step in steps:
                state = init_state(numbered(shapes), OPTIMIZER)._replace(step=jnp.asarray(step, jnp.int32))
                checkpoints.save(state, Progress(step, {"next_step": step}, 0.5, 0.5, step, 0))
                checkpoints.wait()
    except InputError as e:
        print(e)
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore_latest(abstract_state(model, OPTIMIZER))
        if found is not None:
            print(f"the newest whole one is of step {int(found[0].step)}")
        return 2
    return 0


def save(folder: Path, fsdp: int, tensor: int) -> int:
    layout, model = make_layout(fsdp=fsdp, tensor=tensor), TextClassifier(CONFIG, 3)
    like = abstract_state(model, OPTIMIZER, layout)

    def place(whole: np.ndarray, like: Any) -> jax.Array:
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: whole[index])

    with Checkpoints(folder) as checkpoints:
        for step in (4, 5):
            state = jax.tree.map(place, state_at(step, model), like)
            checkpoints.save(state, Progress(step, {"next_step": step}, 0.5, 0.5, 4, 0))
    return 0


def state_at(step: int, model: TextClassifier) -> TrainState:
    """On the host: not only parameters but moments and counts that are no beginner's."""
    return numbered(abstract_state(model, OPTIMIZER))._replace(step=np.asarray(step, np.int32))


def check(folder: Path, fsdp: int, tensor: int, step: int = 5) -> int:
    layout, model = make_layout(fsdp=fsdp, tensor=tensor), TextClassifier(CONFIG, 3)
    like = abstract_state(model, OPTIMIZER, layout)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore_latest(like)
    assert found is not None
    state: TrainState = found[0]
    leaves = zip(*map(jax.tree.leaves, (state, state_at(step, model), like)), strict=True)
    for leaf, whole, wanted in leaves:
        assert leaf.sharding == wanted.sharding, (leaf.sharding, wanted.sharding)
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
    return 0


async def log_tracebacks() -> None:
    """What Orbax and asyncio log of arrays that cannot be read: of a handled one, and of one that is never awaited."""
    logging.getLogger("absl").error("an array cannot be read", exc_info=OSError("damaged"))

    async def fail() -> None:
        raise OSError("damaged")

    asyncio.get_running_loop().create_task(fail())
    await asyncio.sleep(0)


def restore_with_tracebacks(folder: Path) -> int:
    """Reads the newest whole checkpoint; every attempt to read one logs as much as Orbax can."""
    restore = Checkpoints.restore

    def noisy(self: Checkpoints, like: TrainState, step: int) -> tuple[TrainState, Progress]:
        asyncio.run(log_tracebacks())
        return restore(self, like, step)

    Checkpoints.restore = noisy
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore_latest(abstract_state(TextClassifier(CONFIG, 3), OPTIMIZER))
    return 0 if found is not None else 1


if __name__ == "__main__":
    join()
    action, folder = sys.argv[1], Path(sys.argv[2])
    if action == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
        sys.exit(write_until_it_fails(folder, TextClassifier(CONFIG, 3), range(2, 3)))
    if action == "noisy":
        sys.exit(restore_with_tracebacks(folder))
    if action == "full":
        sys.exit(write_until_it_fails(folder, TextClassifier(LARGE, 3), range(1, 20)))
    sys.exit({"save": save, "check": check}[action](folder, *map(int, sys.argv[3:])))
