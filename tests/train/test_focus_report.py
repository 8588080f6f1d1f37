"""The report on a tiny model: what it says of each budget, and that it lets go what it compiled."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array

from classer.model.bundle import Bundle
from classer.model.focus import Focus
from classer.model.precision import Precision
from classer.model.predict import Predictor
from classer.tests.helpers import with_gates
from classer.train.focus_report import focus_report, focus_table
from classer.train.tokenized import TokenizedSplit


def test_budgets_side_by_side(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels are what the dense model answers. A process may not hold the programs of all budgets in all shapes."""
    gated = with_gates(tiny_bundle)
    task = gated.taxonomy.tasks[0]
    rng = np.random.default_rng(1)
    ids = [rng.integers(5, 20, length, dtype=np.int32) for length in (10, 20, 30, 40) * 10]
    logits_NL = gated.predictor().logits(ids)[:, gated.taxonomy.slice_of(task.name)]
    split = TokenizedSplit(ids, csr_array(np.eye(logits_NL.shape[1], dtype=np.float32)[logits_NL.argmax(axis=1)]))
    predictors: set[Predictor] = set()
    held = []
    compile_one = Predictor.compile

    def spy(self: Predictor, batch_size: int, length: int):
        program = compile_one(self, batch_size, length)
        predictors.add(self)
        held.append(sum(len(predictor.executables) for predictor in predictors))
        return program

    monkeypatch.setattr(Predictor, "compile", spy)
    layers = gated.encoder.num_layers
    focuses = [Focus.pyramid(1, layers), Focus.pyramid(0.5, layers)]  # the dense one is there without being asked for
    rows = focus_report(
        gated,
        task,
        split,
        focuses,
        compute_dtype=Precision.float32,
        timed_texts=40,
        rounds=2,
    )
    assert [row.focus.full for row in rows] == [True, False]
    assert rows[0].accuracy == 1.0
    assert rows[0].speedup == 1.0
    assert rows[0].kept[0] == pytest.approx(25)
    assert rows[1].kept[-1] < rows[0].kept[-1] == pytest.approx(25)
    assert all(row.texts_per_second > 0 and row.latency_ms > 0 for row in rows)
    assert focus_table(rows).count("\n") == 3
    assert capsys.readouterr().out.splitlines()[-1] == "Timed 2 rounds of 40 texts each."
    # One budget in all four shapes, or all budgets in one.
    assert max(held) == 4
    assert not any(predictor.executables for predictor in predictors)
