"""The training step: loss, gradients and AdamW in one compiled function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..data.taxonomy import LabelTable
from ..model.classifier import TextClassifier
from ..model.focus import FocusDraw
from ..model.sharding import Layout
from .losses import SoftTargets, answers, classification_loss, relation_loss, teacher_loss

if TYPE_CHECKING:  # the step itself needs JAX, Flax and Optax alone, so that tools/dev/gpu_check.py runs on these
    from ..data.pipeline import Batch
    from .config import Recipe


class TrainState(NamedTuple):
    """The variables that a step updates. `step` counts the steps done."""

    params: Any
    opt_state: optax.OptState
    step: jax.Array


class StepMetrics(NamedTuple):
    """Scalars; see `losses`. `teacher_loss` is None of a batch without soft labels, `relation_loss` without vectors."""

    loss: jax.Array
    grad_norm: jax.Array
    teacher_loss: jax.Array | None
    relation_loss: jax.Array | None


class Arrays(NamedTuple):
    """A batch as the compiled step takes it; the fields are those of `data.pipeline.Batch`."""

    tokens_BS: Any
    lengths_B: Any
    targets_BL: Any
    weights_B: Any
    tasks_B: Any
    soft: SoftTargets | None
    vectors_BV: Any


def arrays_of(batch: Batch) -> Arrays:
    soft = None
    if batch.soft_BL is not None and batch.soft_share_B is not None:
        soft = SoftTargets(cast(jax.Array, batch.soft_BL), cast(jax.Array, batch.soft_share_B))
    return Arrays(
        batch.tokens_BS, batch.lengths_B, batch.targets_BL, batch.weights_B, batch.tasks_B, soft, batch.vectors_BV
    )


class DenseTeacher(NamedTuple):
    """The dense classifier whose answers a classifier with focus is trained on.

    Attributes:
      params: as in the state, and divided over the devices as there.
      share: weight of its answers in the targets, in [0, 1]; the labels have the rest.
    """

    params: Any
    share: float


# (a key, steps done, rows) → the tokens that each row keeps
DrawFocus = Callable[[jax.Array, jax.Array, int], FocusDraw]


_FOCUS = 0x0F0C  # folded into the key of the focus; differs from what Linen folds in for dropout


class TrainStep(Protocol):
    """One step, with the optimizer's own schedule unless another is given."""

    def __call__(
        self, state: TrainState, batch: Batch, schedule: Schedule | None = None
    ) -> tuple[TrainState, StepMetrics]: ...


class Schedule(NamedTuple):
    """A learning rate: linear warm-up to the peak, then a cosine down to 0 at the end.

    An `optax.Schedule` of three numbers. They are arguments of the compiled step, so that one program serves all phases
    of a run, whatever their length and peak.
    """

    peak: float
    warmup_steps: int
    num_steps: int

    def __call__(self, step: Any) -> Any:
        # NumPy for the log: a device would compute it only after the step that it is busy with.
        xp = jnp if isinstance(step, jax.Array) else np
        rising = step / xp.maximum(self.warmup_steps, 1)
        done = xp.minimum((step - self.warmup_steps) / xp.maximum(self.num_steps - self.warmup_steps, 1), 1.0)
        falling = 0.5 * (1 + xp.cos(xp.pi * done))
        return self.peak * xp.where(step < self.warmup_steps, rising, falling)


def learning_rate_schedule(recipe: Recipe, num_steps: int, peak: float | None = None) -> Schedule:
    """The recipe's schedule over `num_steps` steps, with its own peak unless `peak` is given."""
    return Schedule(recipe.learning_rate if peak is None else peak, round(recipe.warmup * num_steps), num_steps)


def make_optimizer(recipe: Recipe, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) behind clipping by the global norm.

    Matrices decay; biases and norms do not. An update that is passed a `schedule` uses that one instead.
    """

    def is_matrix(params):  # by name: the biases of a scan's layers are stacked to matrices too
        return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "table"), params)

    def clip(gradients, _):
        # A factor, where `optax.clip_by_global_norm` divides: XLA fuses it into both moments' updates.
        scale = jnp.minimum(1.0, recipe.max_grad_norm / optax.tree.norm(gradients))
        return jax.tree.map(lambda g: g * scale, gradients)

    def scale_by_schedule(updates, state, params=None, *, schedule=schedule, **_):
        return optax.scale_by_learning_rate(schedule).update(updates, state, params)

    return optax.chain(
        optax.stateless(clip),
        optax.chain(
            optax.scale_by_adam(b2=0.999),
            optax.add_decayed_weights(recipe.weight_decay, is_matrix),
            optax.GradientTransformationExtraArgs(optax.scale_by_learning_rate(schedule).init, scale_by_schedule),
        ),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class LossConfig:
    """What the loss of a step depends on beside the batch and the parameters.

    Attributes:
      label_smoothing, class_weights_L, temperature: see `classification_loss`.
      relation_share: factor of `relation_loss`, which is added where a batch has teachers' vectors.
      seed: of dropout and focus, which are functions of the seed and the step alone.
    """

    label_smoothing: float
    class_weights_L: jax.Array | None = None
    temperature: float = 1.0
    relation_share: float = 0.0
    seed: int = 0


def loss_fn(
    params: Any,
    batch: Arrays,
    step: jax.Array,
    *,
    model: TextClassifier,
    table: LabelTable,
    config: LossConfig,
    draw_focus: DrawFocus | None,
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """The loss of a batch; beside it the teacher's loss and the relation loss, as in `StepMetrics`."""
    tokens_BS, lengths_B, targets_BL, weights_B, tasks_B, soft, vectors_BV = batch
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    rngs = {"dropout": key} if model.dropout else None
    draw = draw_focus(jax.random.fold_in(key, _FOCUS), step, len(tokens_BS)) if draw_focus else None
    inputs = {"params": params}, tokens_BS, lengths_B, draw
    relation = None
    if vectors_BV is None:
        logits_BL = cast(jax.Array, model.apply(*inputs, rngs=rngs))
    else:
        logits_BL, pooled_BD = cast(Any, model.apply(*inputs, rngs=rngs, method="with_pooled"))
        relation = relation_loss(pooled_BD, vectors_BV, weights_B)
    loss = classification_loss(
        table,
        logits_BL,
        targets_BL,
        tasks_B,
        weights_B,
        label_smoothing=config.label_smoothing,
        class_weights_L=config.class_weights_L,
        soft=soft,
        temperature=config.temperature,
    )
    if relation is not None:
        loss += config.relation_share * relation
    if soft is None:
        return loss, (None, relation)
    return loss, (teacher_loss(table, logits_BL, tasks_B, weights_B, soft, config.temperature), relation)


def mix_dense_answers(
    batch: Arrays, dense_params: Any, share: float, model: TextClassifier, table: LabelTable
) -> Arrays:
    """The batch with the dense classifier's answers mixed into its targets; see `DenseTeacher`."""
    undisturbed = model.clone(dropout=0.0)
    logits_BL = cast(jax.Array, undisturbed.apply({"params": dense_params}, batch.tokens_BS, batch.lengths_B))
    answers_BL = answers(table, logits_BL, batch.tasks_B)
    return batch._replace(targets_BL=share * answers_BL + (1 - share) * batch.targets_BL)


def make_train_step(
    model: TextClassifier,
    table: LabelTable,
    optimizer: optax.GradientTransformationExtraArgs,
    config: LossConfig,
    *,
    draw_focus: DrawFocus | None = None,
    dense: DenseTeacher | None = None,
    layout: Layout | None = None,
    batch_size: int | None = None,
) -> TrainStep:
    """Builds the step; it compiles once for each batch shape and takes over the memory of the state it is given.

    Args:
      model: with its training dtype and dropout.
      table: of the taxonomy whose labels the logits are.
      optimizer: from `make_optimizer`.
      config: of the loss.
      draw_focus: (key, steps done, rows) → the tokens that each row keeps; None trains the dense classifier.
      dense: a classifier whose answers each step computes and mixes into the targets; None leaves the targets as they
        are.
      layout: of the devices that state and batches are divided over; None computes on the default device.
      batch_size: of the whole batch, where each process passes its own rows only; None where it passes all.
    """
    loss = functools.partial(loss_fn, model=model, table=table, config=config, draw_focus=draw_focus)
    shardings = None
    if layout is not None:
        shardings = (layout.shardings(abstract_state(model, optimizer)), layout.replicated)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def step(
        state: TrainState, batch: Arrays, dense_params: Any, schedule: dict[str, Schedule]
    ) -> tuple[TrainState, StepMetrics]:
        if dense is not None:
            batch = mix_dense_answers(batch, dense_params, dense.share, model, table)
        (value, of_teachers), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, state.step)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, **schedule)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(value, optax.tree.norm(gradients), *of_teachers)
        return TrainState(params, opt_state, state.step + 1), metrics

    dense_params = None if dense is None else dense.params

    def run(state: TrainState, batch: Batch, schedule: Schedule | None = None) -> tuple[TrainState, StepMetrics]:
        given = {} if schedule is None else {"schedule": schedule}
        if layout is None:
            return step(state, arrays_of(batch), dense_params, given)
        with layout.active():
            return step(state, layout.put_batch(arrays_of(batch), batch_size), dense_params, given)

    return run


def init_state(params: Any, optimizer: optax.GradientTransformation, layout: Layout | None = None) -> TrainState:
    """The state before the first step; with a layout, `params` are sharded by it, and the rest is sharded alike."""
    if layout is not None:
        step = layout.create(lambda: jnp.zeros((), jnp.int32))
        return TrainState(params, layout.create(optimizer.init, params), step)
    params = jax.tree.map(jnp.asarray, params)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def abstract_state(
    model: TextClassifier, optimizer: optax.GradientTransformation, layout: Layout | None = None
) -> TrainState:
    """The shapes and dtypes of a state, and its shardings where a layout is given; no array is made."""

    def init() -> TrainState:
        tokens_BS, lengths_B = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        return init_state(cast(dict, model.init(rngs, tokens_BS, lengths_B))["params"], optimizer)

    shapes = jax.eval_shape(init)
    if layout is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        layout.shardings(shapes),
    )
