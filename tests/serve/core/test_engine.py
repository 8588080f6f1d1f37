"""The engine on programs that are plain functions with a known cost."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from classer.data.errors import InputError
from classer.model.evidence import Kept
from classer.serve.core.engine import Engine, GoldenCheck

PAD = 9


class Programs:
    """Compiles functions that give each row's sum of real tokens; a run costs `cost(batch size, length)` seconds."""

    def __init__(self, cost=lambda size, length: size * length * 1e-3, focused: bool = False) -> None:
        self.cost = cost
        self.focused = focused
        self.now = 0.0
        self.wrong = 0.0
        self.wrong_sizes: set[int] = set()
        self.compiled: list[tuple[int, int]] = []
        self.ran: list[tuple[int, int]] = []

    def clock(self) -> float:
        return self.now

    def compile(self, batch_size: int, length: int) -> Any:
        self.compiled.append((batch_size, length))
        self.now += 2.0

        def launch_explain(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> Any:
            assert tokens_BS.shape == (batch_size, length)
            assert tokens_BS.dtype == lengths_B.dtype == np.int32
            self.ran.append((batch_size, length))
            self.now += self.cost(batch_size, length)
            real_BS = np.arange(length) < lengths_B[:, None]
            assert (tokens_BS[~real_BS] == PAD).all()
            sums_B1 = np.where(real_BS, tokens_BS, 0).sum(axis=1, keepdims=True).astype(np.float32)
            kept = [Kept(np.flatnonzero(row), np.zeros(row.sum())) for row in real_BS]
            return lambda: (sums_B1 + self.wrong + (batch_size in self.wrong_sizes), kept)

        def launch(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> Any:
            outputs = launch_explain(tokens_BS, lengths_B)()
            return lambda: outputs[0]

        return types.SimpleNamespace(launch=launch, launch_explain=launch_explain)


def engine_of(programs: Programs, max_length: int = 100, **options) -> Engine:
    return Engine({"float32": programs}, max_length=max_length, pad_id=PAD, clock=programs.clock, **options)


GOLDEN_IDS = [np.arange(1, n, dtype=np.int32) for n in (4, 6, 60)]


def max_error(texts: Sequence[int], logits_NL: np.ndarray) -> float:
    return float(np.abs(logits_NL[:, 0] - [GOLDEN_IDS[i].sum() for i in texts]).max())


GOLDEN = GoldenCheck(GOLDEN_IDS, max_error, tolerance=0.5)


def test_programs_are_those_that_the_model_can_fill() -> None:
    assert engine_of(Programs(), 100).buckets == (16, 32, 64, 100)
    assert engine_of(Programs(), 512).buckets == (16, 32, 64, 128, 256, 512)
    assert engine_of(Programs(), 16).buckets == (16,)
    # 32 × 512 tokens would keep the device for too long.
    assert [size for bucket, size in engine_of(Programs(), 512).shapes if bucket == 512] == [1, 8]
    assert [size for bucket, size in engine_of(Programs(), 512).shapes if bucket == 256] == [1, 8, 32]


def test_it_is_ready_only_when_every_program_is_warm() -> None:
    programs = Programs()
    engine = engine_of(programs)
    with pytest.raises(RuntimeError, match="warm the engine up"):
        engine.run([np.ones(3, np.int32)], 32)
    for warmed in engine.warm_up():
        assert engine.ready == (len(programs.compiled) == 12)
        assert warmed.compile_seconds == pytest.approx(2.0)
        assert warmed.run_seconds == pytest.approx(warmed.batch_size * warmed.length * 1e-3)
    assert engine.ready
    assert sorted(programs.compiled) == sorted((size, bucket) for bucket in (16, 32, 64, 100) for size in (1, 8, 32))
    assert set(programs.ran) == set(programs.compiled)


def test_run_takes_the_smallest_program_that_holds_the_texts() -> None:
    programs = Programs()
    engine = engine_of(programs)
    list(engine.warm_up())
    for count, size in ((1, 1), (2, 8), (8, 8), (9, 32), (32, 32)):
        ids = [np.arange(n % 7 + 1, dtype=np.int32) for n in range(count)]
        outputs = engine.run(ids, 64)
        assert programs.ran[-1] == (size, 64)
        assert [output.logits_L[0] for output in outputs] == [one.sum() for one in ids]
        assert all(output.kept is None for output in outputs)
    with pytest.raises(ValueError, match="33 rows"):
        engine.run([np.ones(1, np.int32)] * 33, 64)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        # A CPU: the time grows with the batch, so one large half-empty program loses to a full small one.
        (lambda size, length: size * 1e-3 + 1e-3, {1: 1, 2: 1, 5: 5, 8: 8, 9: 8, 12: 8, 30: 30, 40: 32}),
        # A GPU: a program takes as long, however much is in it.
        (lambda size, length: 1e-3, {1: 1, 2: 2, 9: 9, 40: 32}),
        # As fast one by one, but for the noise of the measurement: the larger batch has less to pay around it.
        (lambda size, length: size * 1e-3 * (1.05 if size > 1 else 1), {8: 8, 32: 32, 40: 32}),
    ],
)
def test_batches_are_sized_by_measured_speed(cost, expected: dict[int, int]) -> None:
    engine = engine_of(Programs(cost))
    list(engine.warm_up())
    assert {waiting: engine.batch_for(32, waiting) for waiting in expected} == expected


def test_check_fails_only_with_the_device() -> None:
    programs = Programs()
    engine = engine_of(programs)
    list(engine.warm_up())
    engine.check()

    def lost(size: int, length: int) -> float:
        raise RuntimeError("device lost")

    programs.cost = lost
    with pytest.raises(RuntimeError, match="device lost"):
        engine.check()


def test_a_focused_model_says_what_it_kept_of_each_text() -> None:
    engine = engine_of(Programs(focused=True))
    list(engine.warm_up())
    outputs = engine.run([np.ones(5, np.int32), np.ones(2, np.int32)], 32)
    assert [len(output.kept.positions_K) for output in outputs if output.kept] == [5, 2]


class Precisions:
    """Three precisions with one clock: fast but wrong, fast for short texts, fast for long ones."""

    def __init__(self) -> None:
        self.short = Programs(lambda size, length: size * (1e-3 if length < 50 else 1e-2))
        self.long = Programs(lambda size, length: size * (1e-2 if length < 50 else 1e-3))
        self.wrong = Programs(lambda size, length: size * 1e-6)
        self.wrong.wrong = 1.0
        self.all = {"float32": self.short, "bfloat16": self.long, "int8": self.wrong}

    def clock(self) -> float:
        return sum(programs.now for programs in self.all.values())

    def engine(self, **options) -> Engine:
        return Engine(self.all, max_length=100, pad_id=PAD, clock=self.clock, **{"golden": GOLDEN, **options})


def test_each_bucket_runs_in_the_fastest_precision_that_computes_the_golden_outputs() -> None:
    precisions = Precisions()
    engine = precisions.engine()
    assert len(list(engine.warm_up())) == engine.steps == 4 * (3 + 2)
    assert engine.plan == {16: "float32", 32: "float32", 64: "bfloat16", 100: "bfloat16"}
    # Smaller batches are compiled in the chosen precision only.
    short = [(32, 16), (1, 16), (8, 16), (32, 32), (1, 32), (8, 32), (32, 64), (32, 100)]
    assert precisions.short.compiled == short
    assert precisions.wrong.compiled == [(32, 16), (32, 32), (32, 64), (32, 100)]
    assert {warmed.precision: warmed.max_error for warmed in engine.measured if warmed.length == 32} == {
        "float32": 0,
        "bfloat16": 0,
        "int8": 1,
    }
    (output,) = engine.run([np.arange(1, 5, dtype=np.int32)], 32)
    assert output.logits_L == [10]


def test_a_plan_is_followed_but_still_checked() -> None:
    precisions = Precisions()
    plan = {16: "float32", 32: "bfloat16", 64: "float32", 100: "float32"}
    engine = precisions.engine(plan=plan)
    assert len(list(engine.warm_up())) == engine.steps == 12
    assert engine.plan == plan
    assert precisions.wrong.compiled == []


def test_where_a_plan_misses_the_golden_outputs_the_other_precisions_are_measured() -> None:
    precisions = Precisions()
    engine = precisions.engine(plan={16: "float32", 32: "int8", 64: "bfloat16", 100: "bfloat16"})
    list(engine.warm_up())
    assert engine.plan == {16: "float32", 32: "float32", 64: "bfloat16", 100: "bfloat16"}
    assert precisions.wrong.compiled == [(32, 32)]
    assert [(one.precision, one.max_error, one.chosen) for one in engine.measured if one.length == 32] == [
        ("int8", 1, False),
        ("float32", 0, True),
        ("bfloat16", 0, False),
    ]
    precisions = Precisions()
    precisions.short.wrong = precisions.long.wrong = 2.0
    with pytest.raises(InputError, match=r"No precision .*: int8 is off by 1\.0000, float32 is off by 2\.0000"):
        list(precisions.engine(plan={16: "int8"}).warm_up())


@pytest.mark.parametrize("plan", [{}, {32: "float32"}])
def test_smaller_batches_must_compute_the_golden_outputs_too(plan: dict[int, str]) -> None:
    precisions = Precisions()
    precisions.short.wrong_sizes = {8}
    engine = precisions.engine(plan=plan)
    list(engine.warm_up())
    assert engine.ready
    assert engine.plan == {16: "bfloat16", 32: "bfloat16", 64: "bfloat16", 100: "bfloat16"}
    assert {one.precision: one.max_error for one in engine.measured if one.length == 32}["float32"] == 1
    programs = Programs()
    programs.wrong_sizes = {1}
    with pytest.raises(InputError, match=r"up to 32 × 16 tokens: float32 is off by 1\.0000"):
        list(engine_of(programs, golden=GOLDEN).warm_up())


@pytest.mark.parametrize("wrong", [1.0, np.nan])
def test_a_model_that_computes_something_else_everywhere_is_refused(wrong: float) -> None:
    programs = Programs()
    programs.wrong = wrong
    with pytest.raises(InputError, match="broken"):
        list(engine_of(programs, golden=GOLDEN).warm_up())


def test_the_empty_golden_text_counts_only_where_no_other_fits() -> None:
    """INT8 may make something else of it than bfloat16, which is no reason to turn bfloat16 down."""
    ids = [np.arange(1, 3, dtype=np.int32), np.arange(1, 21, dtype=np.int32)]
    asked: list[Sequence[int]] = []

    def off_of_empty(texts: Sequence[int], logits_NL: np.ndarray) -> float:
        asked.append(texts)
        assert logits_NL[:, 0].tolist() == [ids[i].sum() for i in texts]
        return float(0 in texts)

    golden = GoldenCheck(ids, off_of_empty, tolerance=0.5)
    with pytest.raises(InputError, match=r"batches of up to 32 × 16 tokens: float32 is off by 1\.0000"):
        list(engine_of(Programs(), golden=golden).warm_up())
    assert asked == [[0]]
    asked.clear()
    list(engine_of(Programs(), golden=golden, buckets=(32,)).warm_up())
    assert asked
    assert all(texts == [1] for texts in asked)
