"""One run in several processes: who they are, what only the first may do, and how they agree to save and to stop.

A launcher (`tools/launch.py`, Slurm, Kubernetes) says in the environment who a process is; without it there is one
process. All processes run the same program on the same inputs; files are written by the first alone.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the key-value store has no public name yet; Orbax takes it from here too
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load, save

from ..data.errors import InputError
from ..model.quantize import Weights
from .place import LAUNCHER, STOPPED_CODE, ProcessInfo

WAIT_MS = 24 * 3600 * 1000  # for the first process: tokenising and probing take their time, and launchers end dead jobs
Result = TypeVar("Result")


class Stopped(Exception):
    """The run was told to stop (SIGTERM), and all that it had done is saved.

    Args:
      sentence: what to tell the user.
      together: whether all processes of the job stopped at the same step.
    """

    def __init__(self, sentence: str, *, together: bool = True) -> None:
        super().__init__(sentence)
        self.together = together


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the job, if there are others; before anything else of JAX is used.

    Raises:
      InputError: as `ProcessInfo.from_environment`; the first process did not answer within five minutes.
    """
    if LAUNCHER in environment:
        _die_with(int(environment[LAUNCHER]))
    place = ProcessInfo.from_environment(environment)
    if place is None or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(place.coordinator, place.count, place.rank, cluster_detection_method="deactivate")
    except RuntimeError as e:
        raise InputError(
            f"Process {place.rank} of {place.count} could not join the job at {place.coordinator}: "
            f"{(str(e).splitlines() or ['no reason given'])[0]}"
        ) from None


def _die_with(launcher: int) -> None:
    """Ends this process when its launcher is killed: nobody would watch over it, and the next one would meet it."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)


def leave() -> None:
    """Ends the common part of the run: the first process goes on alone. All processes call it together."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def end(stopped: Stopped) -> int:
    """Ends the job's common part after a stop; the exit code for this process (see `place.STOPPED_CODE`)."""
    code = int(os.environ.get(STOPPED_CODE, "0"))
    if stopped.together or not jax.distributed.is_initialized():
        leave()
        return code
    # A tidy end would wait for all processes, and some may be in the middle of a collective operation.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_primary() -> bool:
    """Whether this process is the one that writes files and speaks to people."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def broadcast(make: Callable[[], bytes]) -> bytes:
    """Calls `make` in the first process and gives what it returns to all.

    Raises:
      InputError: in all processes, where it was raised in the first.
    """
    if not jax.distributed.is_initialized():
        return make()
    client, key = distributed.global_state.client, f"classer/{next(_messages)}"
    assert client is not None
    said = b""
    if is_primary():
        try:
            said = make()
            answer = {"length": len(said)}
        except InputError as e:
            answer = {"error": str(e)}
        except BaseException:
            client.key_value_set(key, json.dumps({"error": "The first process failed."}))
            raise
        client.key_value_set(key, json.dumps(answer))
    # The wait is here and not in the broadcast, whose time-out is short.
    answer = json.loads(client.blocking_key_value_get(key, WAIT_MS))
    if "error" in answer:
        raise InputError(answer["error"])
    if not answer["length"]:
        return b""
    array = np.frombuffer(said, np.uint8) if is_primary() else np.zeros(answer["length"], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(array)).astype(np.uint8).tobytes()


def all_gather(sentence: str) -> list[str]:
    """What each process has to say, by rank: the same list in all processes."""
    if not jax.distributed.is_initialized():
        return [sentence]
    client, number = distributed.global_state.client, next(_messages)
    assert client is not None
    client.key_value_set(f"classer/{number}/{jax.process_index()}", sentence)
    keys = [f"classer/{number}/{rank}" for rank in range(jax.process_count())]
    return [client.blocking_key_value_get(key, WAIT_MS) for key in keys]


def broadcast_decision(make: Callable[[], bool]) -> bool:
    """`broadcast` of a yes or no."""
    return broadcast(lambda: b"\1" if make() else b"\0") == b"\1"


def compute_on_primary(make: Callable[[], Weights]) -> Weights:
    """`broadcast` of arrays."""
    return load(broadcast(lambda: save(make()))) if jax.distributed.is_initialized() else make()


def primary_first(make: Callable[[], Result]) -> Result:
    """Calls `make` in all processes, in the first before the others: it leaves files that they then find."""
    result: list[Result] = []
    broadcast_decision(lambda: result.append(make()) is None)
    return result[0] if result else make()


def shard_of(compute: Callable[[Sequence[np.ndarray]], np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    """`compute(rows)`, one row of output a row, with the work shared out among the processes."""
    if not jax.distributed.is_initialized():
        return compute(rows)
    count, rank = jax.process_count(), jax.process_index()
    share = -(-len(rows) // count)
    if not len(rows):
        return compute(rows)
    # Of a length, so that the shares can be gathered; what is padded is computed twice and dropped.
    mine = [rows[min(i, len(rows) - 1)] for i in range(rank, share * count, count)]
    gathered = np.asarray(multihost_utils.process_allgather(compute(mine)))
    return gathered.swapaxes(0, 1).reshape(share * count, *gathered.shape[2:])[: len(rows)]


class CheckpointSchedule:
    """When to save within an epoch, and when to stop: the same answer at the same step in every process.

    Args:
      steps: save every so many steps; 0 never.
      minutes: save when so many have passed since the last time, by the first process's clock; 0 never.
      clock: seconds that only grow.
    """

    def __init__(self, steps: int, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._seconds, self._clock = steps, minutes * 60, clock
        self._saved = clock()
        self._pending: Callable[[], tuple[bool, ...]] | None = None

    def after(self, step: int) -> tuple[bool, bool]:
        """(save, stop) after a step. What a clock or a signal asked for is heard a step later in a job of several.

        Raises:
          KeyboardInterrupt: SIGINT has come.
        """
        _signals.check()
        due = is_primary() and self._seconds > 0 and self._clock() - self._saved >= self._seconds
        asked, self._pending = self._pending, _agree(due, _signals.asked)
        if not jax.distributed.is_initialized():
            asked = self._pending
        due, stop = asked() if asked is not None else (False, False)
        save = due or stop or (self._steps > 0 and step % self._steps == 0)
        if save:
            self._saved = self._clock()
        return save, stop


class _Signals:
    """SIGTERM and SIGINT. Within `deferred` they are only noted, for the loop to hear of between two steps.

    SIGTERM raises `Stopped`, and the loop saves first. SIGINT raises KeyboardInterrupt: in the middle of a step it
    could come into a callback of JAX or Orbax, where it is lost, or leaves a lock behind. A second one does not wait.
    """

    def __init__(self) -> None:
        self.asked = False
        self.interrupted = False
        self._deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted or not self._deferred:
                raise KeyboardInterrupt
            self.interrupted = True
            os.write(2, b"\nclasser: stopping after this step; interrupt again to stop at once\n")
            return
        self.asked = True
        if not self._deferred:
            raise Stopped("Stopped; there was nothing new to save.", together=False)

    def __enter__(self) -> None:
        self._deferred = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if SIGINT came."""
        if self.interrupted:
            raise KeyboardInterrupt

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._deferred = False
        if kind is None:
            self.check()
        # The signal came after the last step that `CheckpointSchedule` was asked about.
        if kind is None and _agree(self.asked)()[0]:
            raise Stopped("Stopped at the end of a stage; it is saved.")


_signals = _Signals()


def listen() -> None:
    """From now on SIGTERM stops the run in good order (see `Stopped`), and SIGINT between two steps.

    After `join`, and in the main thread.
    """
    _signals.asked = _signals.interrupted = False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _signals)


def deferred() -> _Signals:
    """Within it SIGTERM and SIGINT wait for `CheckpointSchedule`."""
    return _signals


def _agree(*flags: bool) -> Callable[[], tuple[bool, ...]]:
    """Whether any process has raised each flag: begins to ask, and returns what waits for the answer."""
    if not jax.distributed.is_initialized():
        return lambda: flags
    reduce, sharding = _any_flag()
    mine = np.array([flags], np.int32)
    asked = jax.make_array_from_callback((jax.process_count(), len(flags)), sharding, lambda _: mine)
    answer = reduce(asked)
    return lambda: tuple(bool(flag) for flag in np.asarray(answer))


@functools.cache
def _any_flag() -> tuple[Any, NamedSharding]:
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[rank] for rank in sorted(firsts)]), ("process",))
    whole = NamedSharding(mesh, PartitionSpec())
    reduce = jax.jit(lambda flags: jnp.max(flags, axis=0), out_shardings=whole)
    return reduce, NamedSharding(mesh, PartitionSpec("process"))


_messages = iter(range(1 << 62))
