"""The planner's search on costs and divergences that are known, and the whole on a tiny model."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.sparse import csr_array

from classer.data.errors import InputError
from classer.model.bundle import Bundle
from classer.model.config import EncoderConfig
from classer.model.focus import UNITS, Focus
from classer.model.precision import Precision
from classer.tests.helpers import with_gates
from classer.train.focus_plan import MAX_SPEEDUP, _attention_share, _CostModel, greedy_path, plan_focus
from classer.train.tokenized import TokenizedSplit

DENSE = Focus.pyramid(1, 4)


def cost(focus: Focus) -> float:
    return sum(focus.units) / UNITS


def test_it_cuts_where_it_costs_least() -> None:
    """Only layer 2 may lose anything for free."""

    def divergence(focus: Focus) -> float:
        dropped = [1 - units / UNITS for units in focus.units]
        return 5 * dropped[0] + 5 * dropped[1] + 0.01 * (dropped[2] + dropped[3])

    path = list(itertools.islice(greedy_path(divergence, cost, DENSE), 6))
    assert all(focus.units[:2] == (UNITS, UNITS) for focus in path)
    assert all(after.units != before.units for before, after in itertools.pairwise(path))
    assert all(cost(after) < cost(before) for before, after in itertools.pairwise([DENSE, *path]))
    assert path[-1].units[3] <= path[-1].units[2] < UNITS


def test_the_path_ends_where_nothing_is_left_to_cut() -> None:
    path = list(greedy_path(lambda focus: 1.0, cost, DENSE))
    assert len(path) < 200
    assert path[-1].mean_share < 0.05


def test_a_cut_spares_its_own_feed_forward_and_all_of_later_layers() -> None:
    cost = _CostModel(attention=1.0, quadratic=0.0, feed_forward=2.0)
    lengths_N = np.array([100])
    assert cost(Focus.from_shares([1, 1]), lengths_N) == pytest.approx(600)
    assert cost(Focus.from_shares([1, 0.5]), lengths_N) == pytest.approx(500)
    assert cost(Focus.from_shares([0.5, 0.5]), lengths_N) == pytest.approx(100 + 100 + 50 + 100)


def test_attention_has_a_third_of_the_products_of_a_bert_layer() -> None:
    bert = EncoderConfig(vocab_size=100, num_layers=6, d_model=384, num_heads=12, d_ff=1536)
    assert _attention_share(bert) == pytest.approx(1 / 3)
    gated_unit = dataclasses.replace(bert, activation="swiglu", d_ff=1024)
    assert _attention_share(gated_unit) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def gated(tiny_bundle: Bundle) -> Bundle:
    return with_gates(tiny_bundle)


@pytest.fixture(scope="module")
def dev(gated: Bundle) -> TokenizedSplit:
    """Labelled with what the dense model answers, so that it is right everywhere."""
    rng = np.random.default_rng(1)
    ids = [rng.integers(5, 20, rng.integers(20, 40), dtype=np.int32) for _ in range(40)]
    task = gated.taxonomy.tasks[0]
    logits_NL = gated.predictor().logits(ids)[:, gated.taxonomy.slice_of(task.name)]
    targets_NL = np.eye(logits_NL.shape[1], dtype=np.float32)[logits_NL.argmax(axis=1)]
    return TokenizedSplit(ids, csr_array(targets_NL))


def test_a_loss_is_kept_and_a_speed_is_reached(
    gated: Bundle, dev: TokenizedSplit, capsys: pytest.CaptureFixture[str]
) -> None:
    task = gated.taxonomy.tasks[0]
    none = plan_focus(gated, task, dev, max_loss=0, compute_dtype=Precision.float32)
    assert none.accuracy == none.dense_accuracy == 1
    some = plan_focus(gated, task, dev, max_loss=20, compute_dtype=Precision.float32)
    assert some.accuracy >= 0.8
    assert some.speedup >= none.speedup >= 1
    fast = plan_focus(gated, task, dev, speedup=1.5, compute_dtype=Precision.float32)
    assert fast.speedup >= 1.5
    # The masked search and the program that is served agree.
    served_NL = gated.predictor(focus=fast.focus).logits(dev.ids)[:, gated.taxonomy.slice_of(task.name)]
    assert (served_NL.argmax(axis=1) == dev.targets_NL.argmax(axis=1)).mean() == pytest.approx(fast.accuracy)
    assert "×, accuracy " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "one of them"),
        ({"max_loss": 1.0, "speedup": 2.0}, "one of them"),
        ({"speedup": 0.5}, f"between 1 and {MAX_SPEEDUP:g}"),
        ({"max_loss": -1.0}, "points of accuracy, from 0"),
    ],
)
def test_targets_that_are_none_are_refused(gated: Bundle, dev: TokenizedSplit, targets: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_focus(gated, gated.taxonomy.tasks[0], dev, **targets)


def test_a_model_without_gates_is_refused(tiny_bundle: Bundle, dev: TokenizedSplit) -> None:
    with pytest.raises(InputError, match="not trained for focus"):
        plan_focus(tiny_bundle, tiny_bundle.taxonomy.tasks[0], dev, max_loss=1)
