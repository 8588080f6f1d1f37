"""Several processes of one job: joining it, and exchanging objects.

A launcher (`tools/launch.py`, Slurm, Kubernetes) sets the rank in the environment; without it there is one process.
All processes run the same program on the same inputs, and call the functions here in the same order. Only the primary
process, of rank 0, writes files and prints.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import itertools
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the key-value store has no public name yet; Orbax takes it from here too
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..data.errors import InputError
from .process_info import LAUNCHER, ProcessInfo

WAIT_MS = 24 * 3600 * 1000  # for the primary: tokenising and probing take their time, and launchers end dead jobs
Result = TypeVar("Result")


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the job's other processes, if there are any; call it before anything else of JAX.

    Raises:
      InputError: as `ProcessInfo.from_environment`; the primary did not answer within five minutes.
    """
    if LAUNCHER in environment:
        _die_with(int(environment[LAUNCHER]))
    process = ProcessInfo.from_environment(environment)
    if process is None or is_initialized():
        return
    try:
        jax.distributed.initialize(
            process.coordinator, process.count, process.rank, cluster_detection_method="deactivate"
        )
    except RuntimeError as e:
        raise InputError(
            f"Process {process.rank} of {process.count} could not join the job at {process.coordinator}: "
            f"{(str(e).splitlines() or ['no reason given'])[0]}"
        ) from None


def _die_with(launcher: int) -> None:
    """Ends this process when its launcher is killed: nothing would end it then, and the next run would collide."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)


def leave() -> None:
    """Disconnects from the other processes. All processes call it together; the primary goes on alone."""
    if is_initialized():
        jax.distributed.shutdown()


def is_initialized() -> bool:
    """Whether there are several processes."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Whether this process writes the files and prints."""
    return not is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """A block whose thread prints nothing by `say` and draws no progress bars; as ever where `silent` is false."""
    token = _quiet.set(silent)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether this thread is in a block of `quiet`."""
    return _quiet.get()


def say(sentence: object) -> None:
    """Prints a line in the primary process; does nothing in the others and where `is_quiet`.

    No logger: these lines are a command's output, and each thread is quiet on its own.
    """
    if is_primary() and not is_quiet():
        print(sentence, flush=True)


def on_primary(compute: Callable[[], Result]) -> Result:
    """Calls `compute` in the primary process and returns its result, which must be picklable, in all.

    Raises:
      InputError: in all processes, where `compute` raised it in the primary.
    """
    if not is_initialized():
        return compute()
    client, key = _store(), f"classer/{next(_messages)}"
    content = b""
    if is_primary():
        try:
            content = pickle.dumps(compute())
            answer = {"length": len(content)}
        except InputError as e:
            answer = {"error": str(e)}
        except BaseException:
            client.key_value_set(key, json.dumps({"error": "The first process failed."}))
            raise
        client.key_value_set(key, json.dumps(answer))
    # The broadcast's own time-out is short, so that the wait happens here.
    answer = json.loads(client.blocking_key_value_get(key, WAIT_MS))
    if "error" in answer:
        raise InputError(answer["error"])
    array = np.frombuffer(content, np.uint8) if is_primary() else np.zeros(answer["length"], np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(array)).astype(np.uint8).tobytes()
    return pickle.loads(sent)


def all_gather(sentence: str) -> list[str]:
    """The sentences of all processes, by rank."""
    if not is_initialized():
        return [sentence]
    client, number = _store(), next(_messages)
    client.key_value_set(f"classer/{number}/{jax.process_index()}", sentence)
    keys = [f"classer/{number}/{rank}" for rank in range(jax.process_count())]
    return [client.blocking_key_value_get(key, WAIT_MS) for key in keys]


def primary_first(load: Callable[[], Result]) -> Result:
    """Calls `load` in the primary process, then in the others, which find the files that the primary has left."""
    result: list[Result] = []
    on_primary(lambda: result.append(load()))
    return result[0] if result else load()


def shard_of(compute: Callable[[Sequence[np.ndarray]], np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    """`compute(rows)`, one row of output for each row, computed in shards by all processes."""
    if not is_initialized() or not len(rows):
        return compute(rows)
    count, rank = jax.process_count(), jax.process_index()
    share = -(-len(rows) // count)
    # All shards have one length, so that they can be gathered; the padding is computed twice and dropped.
    mine = [rows[min(i, len(rows) - 1)] for i in range(rank, share * count, count)]
    gathered = np.asarray(multihost_utils.process_allgather(compute(mine)))
    return gathered.swapaxes(0, 1).reshape(share * count, *gathered.shape[2:])[: len(rows)]


def any_process(*flags: bool) -> Callable[[], tuple[bool, ...]]:
    """Begins to ask whether any process has raised each flag; call the result to wait for the answer."""
    if not is_initialized():
        return lambda: flags
    reduce, sharding = _reduction()
    mine = np.array([flags], np.int32)
    asked = jax.make_array_from_callback((jax.process_count(), len(flags)), sharding, lambda _: mine)
    answer = reduce(asked)
    return lambda: tuple(bool(flag) for flag in np.asarray(answer))


@functools.cache
def _reduction() -> tuple[Any, NamedSharding]:
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[rank] for rank in sorted(firsts)]), ("process",))
    whole = NamedSharding(mesh, PartitionSpec())
    reduce = jax.jit(lambda flags: jnp.max(flags, axis=0), out_shardings=whole)
    return reduce, NamedSharding(mesh, PartitionSpec("process"))


def _store() -> Any:
    """The job's key-value store."""
    client = distributed.global_state.client
    assert client is not None
    return client


_messages = itertools.count()
_quiet = contextvars.ContextVar("quiet", default=False)
