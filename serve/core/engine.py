"""Turbine's engine: the compiled programs of one model at one focus, each measured, and the choice among them.

No gRPC and no threads: an engine is called from one thread at a time. Axes: `B` batch, `S` sequence,
`L` labels of the whole taxonomy, `N` texts.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from ...data.buckets import pad_batch
from ...data.errors import InputError
from ...model.evidence import Kept
from .work import Output

# Few programs, because each takes one to three seconds to compile on two cores.
PROGRAM_LENGTHS = (16, 32, 64, 128, 256, 512)
BATCH_SIZES = (1, 8, 32)
# Larger batches gain no throughput, and delay the texts behind them.
MAX_PROGRAM_TOKENS = 8192
# A larger program is preferred if it reaches this part of the best measured rate.
ABOUT_AS_GOOD = 0.9
# Runs that time a program: the first may still allocate, the fastest of the others counts.
WARM_UP_RUNS = 6
# `ensure` stops measuring a program after so long, because a caller waits.
ENSURE_SECONDS = 1.0
EMPTY = 2  # tokens of the empty text: [CLS] and [SEP]


class ExecutableProtocol(Protocol):
    """An executable for one static shape: tokens_BS, lengths_B (int32) → logits_BL (float32), kept tokens of each row.

    Each method starts a run; the function that it returns waits for it.
    """

    def launch(self, tokens_BS: np.ndarray, lengths_B: np.ndarray, /) -> Callable[[], np.ndarray]: ...

    def launch_explain(
        self, tokens_BS: np.ndarray, lengths_B: np.ndarray, /
    ) -> Callable[[], tuple[np.ndarray, Sequence[Kept]]]: ...


class CompilerProtocol(Protocol):
    """The part of `model.predict.Predictor` that an engine uses."""

    @property
    def focused(self) -> bool: ...

    def compile(self, batch_size: int, length: int) -> ExecutableProtocol: ...


@dataclasses.dataclass(frozen=True)
class GoldenCheck:
    """Texts with known outputs, which a precision must reproduce to be used.

    Attributes:
      ids: token ids of each text.
      max_error: the largest absolute difference of logits_NL from the known ones, for the texts at these positions; NaN
        where logits are not finite.
      tolerance: the largest `max_error` that is accepted.
    """

    ids: Sequence[np.ndarray]
    max_error: Callable[[Sequence[int], np.ndarray], float]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class TimedProgram:
    """A compiled and timed program.

    Attributes:
      max_error: how far it was from the golden outputs.
      chosen: whether its precision runs its bucket.
    """

    program: ExecutableProtocol
    precision: str
    batch_size: int
    length: int
    compile_seconds: float
    run_seconds: float
    max_error: float = 0.0
    chosen: bool = True


class Engine:
    """All programs of one model at one focus; a `work.Device`.

    For each bucket the largest batch is compiled in every precision, and the fastest of those that reproduce the golden
    outputs runs that bucket; only that one's smaller batches are compiled too, and must reproduce them as well.

    Args:
      predictors: the compiler of each precision, in the order of preference among equally fast ones.
      max_length: the model's, in tokens; the largest bucket is this long.
      pad_id: the token id that fills rows; warm-up runs on it too.
      golden: the outputs that every precision must reproduce; None for no check.
      plan: bucket → precision, as chosen before for a model of the same shapes. Other precisions are tried only if that
        one does not reproduce the golden outputs.
      buckets: the lengths in tokens for which there are programs; those beyond `max_length` are left out.
      batch_sizes: the numbers of texts for which there are programs. The smallest is always built, a larger one only
        where it holds at most `MAX_PROGRAM_TOKENS`.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        predictors: Mapping[str, CompilerProtocol],
        *,
        max_length: int,
        pad_id: int,
        golden: GoldenCheck | None = None,
        plan: Mapping[int, str] | None = None,
        buckets: Sequence[int] = PROGRAM_LENGTHS,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._predictors = dict(predictors)
        self._pad_id = pad_id
        self._golden = golden
        self._clock = clock
        self._buckets = (*sorted(bucket for bucket in set(buckets) if bucket < max_length), max_length)
        sizes = sorted(set(batch_sizes))
        self._sizes = {
            bucket: (sizes[0], *(size for size in sizes[1:] if size * bucket <= MAX_PROGRAM_TOKENS))
            for bucket in self._buckets
        }
        self._plan = {bucket: plan[bucket] for bucket in self._buckets if plan and plan.get(bucket) in self._predictors}
        # How many programs `warm_up` compiles, unless a choice fails to reproduce the golden outputs.
        self.steps = sum(
            len(self._sizes[bucket]) - 1 + (1 if bucket in self._plan else len(self._predictors))
            for bucket in self._buckets
        )
        self._focused = any(predictor.focused for predictor in self._predictors.values())
        self._warmed: dict[tuple[int, int], TimedProgram] = {}
        self._measured: list[TimedProgram] = []

    @property
    def focused(self) -> bool:
        """Whether the programs drop tokens."""
        return self._focused

    @property
    def buckets(self) -> tuple[int, ...]:
        return self._buckets

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(bucket, batch size) of every program."""
        return [(bucket, size) for bucket in self._buckets for size in self._sizes[bucket]]

    @property
    def ready(self) -> bool:
        """Whether every program is compiled and warm."""
        return len(self._warmed) == len(self.shapes)

    @property
    def programs(self) -> list[TimedProgram]:
        """The compiled programs, by bucket and batch size."""
        return [self._warmed[shape] for shape in self.shapes if shape in self._warmed]

    @property
    def measured(self) -> list[TimedProgram]:
        """The largest batch of every bucket in every precision tried; `max_error` is over all its batch sizes."""
        return self._measured

    @property
    def plan(self) -> dict[int, str]:
        """Bucket → the precision that runs it, of the buckets that are ready."""
        return {bucket: warmed.precision for (bucket, _), warmed in self._warmed.items()}

    def warm_up(self) -> Iterator[TimedProgram]:
        """Compiles, runs and times every program, one with each `next`; the engine is ready after the last.

        Raises:
          InputError: no precision reproduces the golden outputs.
        """
        for bucket in self._buckets:
            yield from self._warm_up_bucket(bucket, self._sizes[bucket])
        # This frees the weights that no program uses.
        self._golden, self._predictors = None, {}

    def ensure(self, bucket: int, count: int, *, exact: bool = True) -> None:
        """Compiles the program for `count` texts of a bucket if it is missing, instead of all programs by `warm_up`.

        The first program of a bucket is compiled in every precision, and the fastest that reproduces the golden outputs
        runs the bucket from then on.

        Args:
          bucket: one of `buckets`.
          count: how many texts; the program is the smallest that holds them, or the largest of the bucket.
          exact: whether a larger program that is ready already does not do.

        Raises:
          InputError: no precision reproduces the golden outputs.
        """
        size = _smallest(self._sizes[bucket], count)
        ready = self._ready_sizes(bucket)
        if size in ready or (not exact and any(one > size for one in ready)):
            return
        for _ in self._warm_up_bucket(bucket, (size,), ENSURE_SECONDS):
            pass
        self._plan[bucket] = self._warmed[bucket, size].precision

    def batch_for(self, bucket: int, waiting: int) -> int:
        """How many of `waiting` texts to run next: the number with the highest rate of texts a second.

        The rates were measured at warm-up: a batch of 32 with 9 texts in it may take four times as long as a full one
        of 8 (on a CPU), or no longer (on a GPU). Among programs about as fast as the best, the largest is taken,
        because measurements are noisy and every batch has costs outside the program.
        """
        rates = {
            size: min(waiting, size) / max(self._warmed[bucket, size].run_seconds, 1e-9)
            for size in self._ready_sizes(bucket)
        }
        good = max(rates.values()) * ABOUT_AS_GOOD
        return min(waiting, max(size for size, rate in rates.items() if rate >= good))

    def rows(self, bucket: int, count: int) -> int:
        """The rows of the smallest program that is ready and holds `count` texts of a bucket."""
        return _smallest(self._ready_sizes(bucket) or self._sizes[bucket], count)

    def seconds(self, bucket: int, count: int) -> float:
        """Seconds of a batch of `count` texts of a bucket, as measured at warm-up."""
        return self._warmed[bucket, self.rows(bucket, count)].run_seconds

    def launch(self, ids: Sequence[np.ndarray], bucket: int) -> Callable[[], list[Output]]:
        """Starts N texts; the function returned waits for their outputs. Logits may be NaN, each text's on its own.

        Args:
          ids: the token ids of each text, (S_i,) with S_i ≤ `bucket`; N at most the bucket's largest batch size.
          bucket: one of `buckets`.

        Raises:
          RuntimeError: the engine is not warm.
          ValueError: more texts than the largest batch, or one longer than the bucket.
        """
        size = self.rows(bucket, len(ids))
        warmed = self._warmed.get((bucket, size))
        if warmed is None:
            raise RuntimeError(
                f"The program for {size} × {bucket} tokens is not compiled yet; warm the engine up first."
            )
        tokens_BS, lengths_B = pad_batch(ids, size, bucket, self._pad_id)
        if not self.focused:
            collect = warmed.program.launch(tokens_BS, lengths_B)
            return lambda: [Output(logits_L, None, warmed.precision) for logits_L in collect()[: len(ids)]]
        explain = warmed.program.launch_explain(tokens_BS, lengths_B)

        def outputs() -> list[Output]:
            logits_BL, kept_B = explain()
            return [Output(logits_BL[i], kept_B[i], warmed.precision) for i in range(len(ids))]

        return outputs

    def run(self, ids: Sequence[np.ndarray], bucket: int) -> list[Output]:
        """`launch`, and wait."""
        return self.launch(ids, bucket)()

    def check(self) -> None:
        """Runs the smallest program on padding. Raises if the device is lost."""
        bucket = self._buckets[0]
        self.run([np.full(bucket, self._pad_id, np.int32)], bucket)

    def _ready_sizes(self, bucket: int) -> list[int]:
        return [size for size in self._sizes[bucket] if (bucket, size) in self._warmed]

    def _warm_up_bucket(self, bucket: int, sizes: Sequence[int], seconds: float = math.inf) -> Iterator[TimedProgram]:
        """Compiles programs of these sizes, ascending; measuring one of them stops after so many seconds."""
        *smaller, largest = sizes
        planned = [self._plan[bucket]] if bucket in self._plan else []
        tried: dict[str, TimedProgram] = {}
        for precisions in (planned, [one for one in self._predictors if one not in planned]):
            for precision in precisions:
                tried[precision] = self._warm(precision, largest, bucket, seconds)
                yield tried[precision]
            while (best := self._fastest(tried.values())) is not None:
                self._warmed[bucket, largest] = best
                for size in smaller:
                    warmed = self._warm(best.precision, size, bucket, seconds)
                    if not self._reproduces(warmed):
                        tried[best.precision] = dataclasses.replace(best, max_error=warmed.max_error)
                        break
                    self._warmed[bucket, size] = warmed
                    yield warmed
                else:
                    self._measured += [dataclasses.replace(one, chosen=one is best) for one in tried.values()]
                    return
        found = ", ".join(f"{one.precision} is off by {one.max_error:.4f}" for one in tried.values())
        raise InputError(
            f"No precision reproduces the bundle's golden outputs in batches of up to {largest} × {bucket} tokens: "
            f"{found}. The bundle or this installation is broken."
        )

    def _warm(self, precision: str, size: int, bucket: int, seconds: float) -> TimedProgram:
        begin = self._clock()
        program = self._predictors[precision].compile(size, bucket)
        compiled = self._clock() - begin
        tokens_BS = np.full((size, bucket), self._pad_id, np.int32)
        lengths_B = np.full(size, bucket, np.int32)
        times: list[float] = []
        while len(times) < WARM_UP_RUNS and (len(times) < 2 or sum(times) < seconds):
            begin = self._clock()
            program.launch(tokens_BS, lengths_B)()
            times.append(self._clock() - begin)
        return TimedProgram(
            program, precision, size, bucket, compiled, min(times[1:]), self._max_error(program, size, bucket)
        )

    def _max_error(self, program: ExecutableProtocol, size: int, bucket: int) -> float:
        """The largest error of a program on the golden texts that fit it; NaN if an output is not finite."""
        golden, max_error = self._golden, 0.0
        if golden is None:
            return max_error
        fitting = [i for i, ids in enumerate(golden.ids) if len(ids) <= bucket]
        # INT8 may differ from float on the empty text (see `bundle.quantize_bundle`): used only if no other text fits.
        fitting = [i for i in fitting if len(golden.ids[i]) > EMPTY] or fitting
        for start in range(0, len(fitting), size):
            some = fitting[start : start + size]
            tokens_BS, lengths_B = pad_batch([golden.ids[i] for i in some], size, bucket, self._pad_id)
            one = golden.max_error(some, program.launch(tokens_BS, lengths_B)()[: len(some)])
            max_error = one if math.isnan(one) else max(max_error, one)
            if math.isnan(max_error):
                break
        return max_error

    def _reproduces(self, warmed: TimedProgram) -> bool:
        return self._golden is None or warmed.max_error <= self._golden.tolerance  # False where it is NaN

    def _fastest(self, tried: Iterable[TimedProgram]) -> TimedProgram | None:
        """The fastest program that reproduces the golden outputs; None if none does."""
        return min(filter(self._reproduces, tried), key=lambda one: one.run_seconds, default=None)


def _smallest(sizes: Sequence[int], count: int) -> int:
    """The smallest size that holds `count`, else the largest."""
    return next((size for size in sizes if size >= count), sizes[-1])
