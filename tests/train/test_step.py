"""One step of training: its numbers, what it takes over, and what it decays."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import tree_leaves

from classer.data.errors import InputError
from classer.data.pipeline import Batch
from classer.data.taxonomy import Label, LabelTable, Task, TaskKind, Taxonomy
from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig
from classer.model.decode import Calibration, probabilities
from classer.model.quantize import flatten, unflatten
from classer.model.sharding import make_layout
from classer.tests.helpers import with_devices
from classer.train.config import Recipe
from classer.train.losses import classification_loss
from classer.train.step import (
    DenseTeacher,
    LossConfig,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)

CONFIG = EncoderConfig(vocab_size=20, num_layers=1, d_model=16, num_heads=2, d_ff=32, max_positions=16)
RECIPE = Recipe(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)


def fixed_params(num_labels: int = 3) -> dict:
    """Weights by NumPy, the same under every version of JAX."""
    model = TextClassifier(CONFIG, num_labels)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in sorted(flatten_shapes(shapes["params"]).items()):
        noise = rng.normal(0, 0.2, shape).astype(np.float32)
        weights[name] = 1 + noise if name.endswith("norm.scale") else noise
    return unflatten(weights)


def flatten_shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def fixed_batch() -> Batch:
    """Three examples and a filler."""
    rng = np.random.default_rng(1)
    targets_BL = np.zeros((4, 3), np.float32)
    targets_BL[[0, 1, 2], [2, 0, 1]] = 1
    return Batch(
        tokens_BS=rng.integers(0, 20, (4, 16), dtype=np.int32),
        lengths_B=np.array([16, 9, 2, 0], np.int32),
        targets_BL=targets_BL,
        weights_B=np.array([1, 1, 1, 0], np.float32),
        tasks_B=np.zeros(4, np.int32),
    )


def table_of(kind: TaskKind) -> LabelTable:
    return Taxonomy((Task("toy", kind, tuple(map(Label, "abc"))),)).table


def make_step(recipe: Recipe = RECIPE, *, kind=TaskKind.MULTICLASS, dropout: float = 0.0, dtype=jnp.float32, seed=0):
    model = TextClassifier(CONFIG, 3, dtype, dropout=dropout)
    optimizer = make_optimizer(recipe, lambda step: recipe.learning_rate)
    step = make_train_step(model, table_of(kind), optimizer, LossConfig(label_smoothing=0.05, seed=seed))
    return step, init_state(fixed_params(), optimizer)


@pytest.mark.parametrize(
    ("kind", "expected_loss", "expected_norm"),
    [(TaskKind.MULTICLASS, 1.2416023, 1.8768364), (TaskKind.MULTILABEL, 3 * 0.6802691, 3 * 0.6132425)],
)
def test_the_first_steps_loss_and_gradient_norm_are_pinned(kind, expected_loss: float, expected_norm: float) -> None:
    step, state = make_step(kind=kind)
    state, metrics = step(state, fixed_batch())
    assert float(metrics.loss) == pytest.approx(expected_loss, rel=1e-4)
    assert float(metrics.grad_norm) == pytest.approx(expected_norm, rel=1e-4)
    assert int(state.step) == 1


def test_bfloat16_computes_nearly_the_same_loss_over_float32_parameters() -> None:
    losses = []
    for dtype in (jnp.float32, jnp.bfloat16):
        step, state = make_step(dtype=dtype)
        state, metrics = step(state, fixed_batch())
        losses.append(float(metrics.loss))
        assert {leaf.dtype for leaf in tree_leaves(state.params)} == {jnp.dtype("float32")}
    assert 0 < abs(losses[0] - losses[1]) < 0.02


def test_steps_lower_the_loss_of_their_batch() -> None:
    step, state = make_step()
    losses = []
    for _ in range(20):
        state, metrics = step(state, fixed_batch())
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 20


def test_a_step_takes_over_the_memory_of_its_state() -> None:
    step, first = make_step()
    first, _ = step(first, fixed_batch())  # what came from NumPy is not JAX's to reuse
    second, _ = step(first, fixed_batch())
    assert all(leaf.is_deleted() for leaf in tree_leaves(first))
    assert not any(leaf.is_deleted() for leaf in tree_leaves(second))


def test_the_weights_a_state_is_made_from_stay_as_they_are() -> None:
    optimizer = make_optimizer(RECIPE, lambda step: RECIPE.learning_rate)
    params = fixed_params()
    before = {name: value.copy() for name, value in flatten(params).items()}
    step, _ = make_step()
    state = init_state(params, optimizer)
    for _ in range(3):
        state, _ = step(state, fixed_batch())
    for name, value in flatten(params).items():
        np.testing.assert_array_equal(value, before[name])


def test_only_matrices_decay() -> None:
    optimizer = make_optimizer(RECIPE, lambda step: RECIPE.learning_rate)
    params = jax.tree.map(jnp.asarray, fixed_params())
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = flatten(jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(params), params)[0])
    decayed = {name for name, update in updates.items() if update.any()}
    assert decayed == {name for name in updates if name.endswith((".kernel", ".table"))}
    for name in decayed:  # decoupled: learning rate × decay × weight, whatever the gradients
        np.testing.assert_allclose(updates[name], -1e-2 * 0.1 * flatten(params)[name], rtol=1e-5)


def test_the_first_update_is_adams_whatever_the_clip_and_the_clip_holds_the_norm() -> None:
    """Adam's first step is ±learning rate; gradients are clipped before its moments see them."""
    recipe = Recipe(learning_rate=1e-2, weight_decay=0.0, max_grad_norm=0.5)
    optimizer = make_optimizer(recipe, lambda step: recipe.learning_rate)
    params = {"w": jnp.array([[1.0, -2.0]])}
    updates, opt_state = optimizer.update({"w": jnp.array([[30.0, -40.0]])}, optimizer.init(params), params)
    np.testing.assert_allclose(tree_leaves(updates)[0], [[-1e-2, 1e-2]], rtol=1e-4)
    first_moment = next(leaf for leaf in tree_leaves(opt_state) if leaf.shape == (1, 2))
    np.testing.assert_allclose(first_moment, 0.1 * np.array([[0.3, -0.4]]), rtol=1e-5)  # norm 50 → 0.5


def test_dropout_is_a_function_of_seed_and_step() -> None:
    def losses(seed: int, *steps: int, dropout: float = 0.3) -> list[float]:
        step, state = make_step(dropout=dropout, seed=seed)
        states = [state._replace(step=jnp.asarray(at, jnp.int32)) for at in steps]
        return [float(step(jax.tree.map(jnp.copy, state), fixed_batch())[1].loss) for state in states]

    at_five, at_six, again = losses(0, 5, 6, 5)
    assert at_five == again
    assert len({at_five, at_six, *losses(1, 5), *losses(0, 5, dropout=0.0)}) == 4


def test_the_loss_is_that_of_the_evaluated_model() -> None:
    batch = fixed_batch()
    step, state = make_step()
    logits_BL = jax.jit(TextClassifier(CONFIG, 3).apply)({"params": fixed_params()}, batch.tokens_BS, batch.lengths_B)
    expected = classification_loss(
        table_of(TaskKind.MULTICLASS),
        logits_BL,
        jnp.asarray(batch.targets_BL),
        jnp.asarray(batch.tasks_B),
        jnp.asarray(batch.weights_B),
        label_smoothing=0.05,
    )
    _, metrics = step(state, batch)
    assert float(metrics.loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_learning_rate_rises_to_its_peak_and_falls_along_a_cosine() -> None:
    schedule = learning_rate_schedule(Recipe(learning_rate=2.0, warmup=0.1), 100)
    rates = np.array([schedule(step) for step in range(101)])
    np.testing.assert_allclose(jax.jit(schedule.__call__)(np.arange(101)), rates, atol=1e-6)
    np.testing.assert_allclose(rates[:11], 0.2 * np.arange(11), atol=1e-6)
    cosine = 1 + np.cos(np.pi * np.arange(91) / 90)
    np.testing.assert_allclose(rates[10:], cosine, atol=1e-5)


@pytest.mark.parametrize(("warmup", "num_steps"), [(0.0, 10), (1.0, 10), (0.1, 1), (0.5, 1), (0.0, 1)])
def test_schedules_at_the_edges_are_finite_and_train(warmup: float, num_steps: int) -> None:
    schedule = learning_rate_schedule(Recipe(learning_rate=1.0, warmup=warmup), num_steps)
    rates = np.array(jax.jit(schedule.__call__)(np.arange(num_steps)))
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert rates.max() > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("epochs", -1),
        ("batch_size", 0),
        ("dropout", 1.0),
        ("dev_fraction", 0.0),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -1.0),
        ("warmup", 1.5),
        ("label_smoothing", -0.1),
        ("max_length", 3),
        ("patience", -1),
        ("seed", -1),
    ],
)
def test_a_recipe_out_of_range_names_the_field(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} must be .*; it is {value}"):
        Recipe(**{field: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_dense_classifiers_answers_are_mixed_into_the_targets(dropout: float) -> None:
    """As if they had stood there; dropout, which disturbs the student, does not disturb them."""
    batch, given = fixed_batch(), fixed_params()
    dense = jax.tree.map(lambda x: 1.5 * x, given)
    task = Task("toy", TaskKind.MULTICLASS, tuple(map(Label, "abc")))
    logits_BL = np.asarray(TextClassifier(CONFIG, 3).apply({"params": dense}, batch.tokens_BS, batch.lengths_B))
    answers_BL = probabilities(task, logits_BL, Calibration())
    mixed = dataclasses.replace(batch, targets_BL=0.7 * answers_BL + 0.3 * batch.targets_BL)
    optimizer = make_optimizer(RECIPE, lambda step: RECIPE.learning_rate)
    model = TextClassifier(CONFIG, 3, dropout=dropout)
    config = LossConfig(label_smoothing=0.0)
    beforehand = make_train_step(model, table_of(task.kind), optimizer, config)
    in_step = make_train_step(model, table_of(task.kind), optimizer, config, dense=DenseTeacher(dense, 0.7))
    one, other = init_state(given, optimizer), init_state(given, optimizer)
    for _ in range(2):
        one, expected = beforehand(one, mixed)
        other, got = in_step(other, batch)
        assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(got.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-4)


def batch_with_vectors() -> Batch:
    vectors_BV = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float16)
    vectors_BV[3] = 0
    return dataclasses.replace(fixed_batch(), vectors_BV=vectors_BV)


def relation_step(share: float, **options: Any) -> Any:
    optimizer = make_optimizer(RECIPE, lambda step: RECIPE.learning_rate)
    model, table = TextClassifier(CONFIG, 3), table_of(TaskKind.MULTICLASS)
    config = LossConfig(label_smoothing=0.05, relation_share=share)
    return make_train_step(model, table, optimizer, config, **options), optimizer


def test_relations_are_added_to_the_loss_and_learnt() -> None:
    step, optimizer = relation_step(2.0)
    state = init_state(fixed_params(), optimizer)
    plain, _ = make_step()
    _, without = plain(init_state(fixed_params(), optimizer), fixed_batch())
    assert without.relation_loss is None
    seen = []
    for _ in range(20):
        state, metrics = step(state, batch_with_vectors())
        seen.append(metrics)
    assert float(seen[0].loss) == pytest.approx(float(without.loss) + 2 * float(seen[0].relation_loss), rel=1e-5)
    assert float(seen[-1].relation_loss) < 0.5 * float(seen[0].relation_loss)


def test_without_vectors_the_step_is_what_it_was() -> None:
    programs = []
    for share in (0.0, 0.2):
        step, optimizer = relation_step(share)
        state = init_state(fixed_params(), optimizer)
        programs.append(jax.jit(lambda state, step=step: step(state, fixed_batch())).lower(state).as_text())
    assert programs[0] == programs[1]


def test_relations_are_over_the_whole_of_a_batch_that_is_divided() -> None:
    command = [sys.executable, "-c", "from classer.tests.train.test_step import check_divided; check_divided()"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=with_devices(4), check=False)
    assert done.returncode == 0, done.stderr


def check_divided() -> None:
    layout = make_layout(fsdp=2)
    assert layout.batch_shards == 4
    found = []
    for place in (None, layout):
        step, optimizer = relation_step(2.0, layout=place)
        params = fixed_params() if place is None else place.put(fixed_params())
        _, metrics = step(init_state(params, optimizer, place), batch_with_vectors())
        found.append([float(x) for x in (metrics.loss, metrics.grad_norm, metrics.relation_loss)])
    np.testing.assert_allclose(*found, rtol=1e-5)
