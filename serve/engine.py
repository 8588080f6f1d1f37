"""Turbine's engine: the compiled programs of one model, each measured, and the choice among them.

No gRPC and no threads: whoever owns an engine calls it from one thread at a time. Axes: `B` batch, `S` sequence,
`L` labels of the whole taxonomy, `N` texts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from ..data.buckets import pad_batch
from ..model.evidence import Kept
from .scheduler import Output

# Few programs, so that a server starts in well under a minute on two cores: each takes one to three seconds to compile.
BUCKETS = (32, 64, 128, 256, 512)
BATCH_SIZES = (1, 8, 32)
# Beyond this a larger batch gains nothing, and those who wait for the device wait too long.
MAX_BATCH_TOKENS = 8192
# How near the best measured rate a program must come to be taken for its size.
ABOUT_AS_GOOD = 0.9
# Two runs: the first of a program may still allocate.
WARM_UP_RUNS = 2


class Program(Protocol):
    """One executable for a static shape: tokens_BS and lengths_B (int32) → logits_BL (float32), what each row kept."""

    def explain(self, tokens_BS: np.ndarray, lengths_B: np.ndarray, /) -> tuple[np.ndarray, Sequence[Kept]]: ...


class Predictor(Protocol):
    """What the engine needs of `model.predict.Predictor`."""

    @property
    def focused(self) -> bool: ...

    def compile(self, batch_size: int, length: int) -> Program: ...


@dataclasses.dataclass(frozen=True)
class Warmed:
    """A program that is ready: what it took to compile, and what one full batch of it takes."""

    program: Program
    batch_size: int
    length: int
    compile_seconds: float
    run_seconds: float


class Engine:
    """All programs of one model on one device; a `scheduler.Device`.

    Args:
      predictor: compiles the programs.
      max_length: the model's, in tokens; the largest bucket is this long.
      pad_id: the token id that fills what is left of a row; also what warm-up runs on.
      buckets: the lengths in tokens for which there are programs; those beyond `max_length` are left out.
      batch_sizes: the numbers of texts for which there are programs. The smallest is always built, a larger one only
        where it holds at most `MAX_BATCH_TOKENS`.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        max_length: int,
        pad_id: int,
        buckets: Sequence[int] = BUCKETS,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._predictor = predictor
        self._pad_id = pad_id
        self._clock = clock
        self._buckets = (*sorted(bucket for bucket in set(buckets) if bucket < max_length), max_length)
        sizes = sorted(set(batch_sizes))
        self._sizes = {
            bucket: (sizes[0], *(size for size in sizes[1:] if size * bucket <= MAX_BATCH_TOKENS))
            for bucket in self._buckets
        }
        self._warmed: dict[tuple[int, int], Warmed] = {}

    @property
    def focused(self) -> bool:
        """Whether the programs leave tokens out."""
        return self._predictor.focused

    @property
    def buckets(self) -> tuple[int, ...]:
        return self._buckets

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(bucket, batch size) of every program, in the order of compilation."""
        return [(bucket, size) for bucket in self._buckets for size in self._sizes[bucket]]

    @property
    def ready(self) -> bool:
        """Whether every program is compiled and warm."""
        return len(self._warmed) == len(self.shapes)

    @property
    def programs(self) -> list[Warmed]:
        """The programs that are ready."""
        return list(self._warmed.values())

    def warm_up(self) -> Iterator[Warmed]:
        """Compiles, runs and times every program, one with each `next`; the engine is ready after the last."""
        for bucket, size in self.shapes:
            begin = self._clock()
            program = self._predictor.compile(size, bucket)
            compiled = self._clock() - begin
            tokens_BS = np.full((size, bucket), self._pad_id, np.int32)
            lengths_B = np.full(size, bucket, np.int32)
            times = []
            for _ in range(WARM_UP_RUNS):
                begin = self._clock()
                program.explain(tokens_BS, lengths_B)
                times.append(self._clock() - begin)
            warmed = Warmed(program, size, bucket, compiled, min(times))
            self._warmed[bucket, size] = warmed
            yield warmed

    def batch_for(self, bucket: int, waiting: int) -> int:
        """How many of `waiting` texts to run next: what finishes the most texts a second, as measured at warm-up.

        A batch of 32 with 9 texts in it may take four times as long as a full one of 8 (on a CPU) or no longer (on a
        GPU). Of those about as good as the best, the largest: measurements are noisy, and every batch has its price
        outside the program too.
        """
        rates = {
            size: min(waiting, size) / max(self._warmed[bucket, size].run_seconds, 1e-9) for size in self._sizes[bucket]
        }
        good = max(rates.values()) * ABOUT_AS_GOOD
        return min(waiting, max(size for size, rate in rates.items() if rate >= good))

    def run(self, ids: Sequence[np.ndarray], bucket: int) -> list[Output]:
        """What N texts give. Logits may be NaN, each text's on its own.

        Args:
          ids: the token ids of each text, (S_i,) with S_i ≤ `bucket`; N at most the bucket's largest batch size.
          bucket: one of `buckets`.

        Raises:
          RuntimeError: the engine is not warm.
          ValueError: more texts than the largest batch, or one longer than the bucket.
        """
        size = next((size for size in self._sizes[bucket] if size >= len(ids)), self._sizes[bucket][-1])
        warmed = self._warmed.get((bucket, size))
        if warmed is None:
            raise RuntimeError(
                f"The program for {size} × {bucket} tokens is not compiled yet; warm the engine up first."
            )
        tokens_BS, lengths_B = pad_batch(ids, size, bucket, self._pad_id)
        logits_BL, kept_B = warmed.program.explain(tokens_BS, lengths_B)
        return [Output(logits_BL[i], kept_B[i] if self.focused else None) for i in range(len(ids))]

    def check(self) -> None:
        """Runs the smallest program on padding; it raises only if the device is lost."""
        bucket = self._buckets[0]
        self.run([np.full(bucket, self._pad_id, np.int32)], bucket)
