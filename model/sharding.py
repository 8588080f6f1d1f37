"""Sharding of a model over many devices: logical axes of every parameter, and one table from these to mesh axes.

The mesh has three axes. Along `data` and `fsdp` the rows of a batch are divided; along `fsdp` parameters and optimiser
moments too, each gathered where it is used (Zhao et al. 2023, https://arxiv.org/abs/2304.11277); along `tensor` the
heads, the feed-forward's hidden units and the labels (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). XLA
inserts the collectives from the shardings of inputs and outputs and the constraints that `constrain` sets in between.

Axes: B batch, N tokens, D model width, E outputs of several products side by side, F outputs of one, L labels, T tensor
shards.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..data.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
MeshAxes = tuple[str, ...]
PyTree = TypeVar("PyTree")

# The end of a parameter's name → its logical axes. `layers`, of scanned layers, comes before them.
_AXES: dict[str, tuple[str, ...]] = {
    "table": ("vocab", "embed"),
    "qkv.kernel": ("embed", "heads"),
    "qkv.bias": ("heads",),
    "out.kernel": ("heads", "embed"),
    "out.bias": ("vector",),
    "up.kernel": ("embed", "hidden"),
    "up.bias": ("hidden",),
    "down.kernel": ("hidden", "embed"),
    "down.bias": ("vector",),
    "head.kernel": ("pooled", "labels"),
    "head.bias": ("labels",),
    "norm.scale": ("vector",),
    "norm.bias": ("vector",),
    "direction": ("vector",),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """The axes of the mesh that divide each logical axis; without any, each device has the whole axis.

    Attributes:
      batch: rows of a batch, and their tokens.
      vocab: rows of embedding tables. Whole, because vocabularies seldom divide evenly.
      embed: the model width of matrices.
      heads: attention heads: the outputs of `qkv`, the inputs of `out`.
      hidden: units of the feed-forward: the outputs of `up`, the inputs of `down`.
      pooled: the model width of the label table.
      labels: of the label table at rest. Whole, because their number seldom divides evenly.
      logits: labels in the product with the table and in the loss, filled up by `fill_labels`.
      layers: scanned layers.
      vector: norms, gates and the biases of the model width: too small to be worth a collective.
    """

    batch: MeshAxes = ("data", "fsdp")
    vocab: MeshAxes = ()
    embed: MeshAxes = ("fsdp",)
    heads: MeshAxes = ("tensor",)
    hidden: MeshAxes = ("tensor",)
    pooled: MeshAxes = ("tensor", "fsdp")
    labels: MeshAxes = ()
    logits: MeshAxes = ("tensor",)
    layers: MeshAxes = ()
    vector: MeshAxes = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self.check_axis(field.name)

    def check_axis(self, axis: str) -> None:
        """Raises ValueError if the rule for a logical axis names an axis that the mesh does not have, or one twice."""
        self.spec((axis,), what=f"the rule for '{axis}'")

    def spec(self, axes: Sequence[str | None], *, what: str) -> PartitionSpec:
        """The partition of an array with these logical axes; None is an axis that stays whole.

        Raises:
          ValueError: the mesh lacks an axis, or one axis of it would divide two axes of the array. The message names
            `what`.
        """
        used: list[str] = []
        entries = []
        for axis in axes:
            mesh_axes: MeshAxes = () if axis is None else getattr(self, axis)
            for name in mesh_axes:
                if name not in MESH_AXES:
                    raise ValueError(f"{what}: the mesh has no axis '{name}'; it has {', '.join(MESH_AXES)}.")
                if name in used:
                    raise ValueError(
                        f"{what}: the mesh axis '{name}' would divide it twice ({' × '.join(map(str, axes))})."
                    )
                used.append(name)
            entries.append(mesh_axes or None)
        return PartitionSpec(*entries)


def logical_axes(name: str) -> tuple[str, ...]:
    """The logical axes of a parameter, such as ("embed", "hidden") of "encoder.layer_0.feed_forward.up.kernel".

    Raises:
      ValueError: no parameter of the model has such a name.
    """
    for ending, axes in _AXES.items():
        if name == ending or name.endswith(("." + ending, "_" + ending)):
            return ("layers", *axes) if ".layers." in f".{name}" else axes
    raise ValueError(f"The parameter '{name}' has no logical axes; give it some in model/sharding.py.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of devices, and the rules for sharding a model over it. `make_layout` makes one."""

    mesh: Mesh
    rules: Rules = Rules()

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """The sharding of arrays whose first axis is the batch."""
        return NamedSharding(self.mesh, self.rules.spec(("batch",), what="a batch"))

    @property
    def batch_shards(self) -> int:
        """The number of parts that a batch is divided into; a batch size must be a multiple of it."""
        return self._count("batch")

    def sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of a parameter.

        Args:
          name: its name, such as "encoder.layer_0.feed_forward.up.kernel".
          shape: of the whole parameter.

        Raises:
          InputError: an axis of it cannot be divided evenly over the mesh.
          ValueError: as `logical_axes` and `Rules.spec`.
        """
        axes = logical_axes(name)
        spec = self.rules.spec(axes, what=f"the parameter '{name}'")
        for axis, size in zip(axes, shape, strict=True):
            if size % (count := self._count(axis)):
                over = " × ".join(f"{a}={self.mesh.shape[a]}" for a in getattr(self.rules, axis))
                raise InputError(
                    f"The parameter '{name}' is {size} along its axis '{axis}', which cannot be divided evenly by "
                    f"{count} ({over}); choose a smaller {' or '.join(getattr(self.rules, axis))}."
                )
        return NamedSharding(self.mesh, spec)

    def shardings(self, tree: Any) -> Any:
        """The sharding of each leaf of a tree of parameters, or of a state that holds such trees.

        A leaf's name is its path of dictionary keys, so that an optimiser's moments are sharded like their parameters.
        A leaf without such keys (a count) is replicated.

        Args:
          tree: its leaves have shapes.
        """

        def of(path: tuple, leaf: Any) -> NamedSharding:
            name = ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
            return self.sharding(name, leaf.shape) if name else self.replicated

        return jax.tree_util.tree_map_with_path(of, tree)

    def create(self, make: Callable[..., PyTree], *arguments: Any) -> PyTree:
        """Calls a pure function, such as an initialiser, so that its result is sharded from the start."""
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make, *arguments)))(*arguments)

    def put(self, tree: Any) -> Any:
        """Shards parameters from host arrays; every process has them whole."""
        return jax.tree.map(_put, tree, self.shardings(tree))

    def check_divides(self, batch_size: int) -> None:
        """Raises InputError if a batch of this size cannot be divided evenly over the devices."""
        if batch_size % self.batch_shards:
            raise InputError(
                f"A batch of {batch_size} cannot be divided evenly over {self.batch_shards} devices (data × fsdp); "
                f"choose a batch size that is a multiple of {self.batch_shards}."
            )

    def rows(self, batch_size: int) -> np.ndarray:
        """The rows of a batch that this process's devices take, ascending.

        Raises:
          InputError: as `check_divides`.
        """
        self.check_divides(batch_size)
        parts = self.batch.addressable_devices_indices_map((batch_size,)).values()
        rows = np.zeros(batch_size, bool)
        for part in parts:
            if part is not None:
                rows[part] = True
        return np.flatnonzero(rows)

    def put_batch(self, batch: Any, batch_size: int | None = None) -> Any:
        """Divides a batch, or any tree of host arrays whose first axis is the batch, over the devices.

        Args:
          batch: all of its rows or, with `batch_size`, only those that `rows` names, in that order.
          batch_size: of the whole batch.
        """
        if batch_size is None:
            return jax.tree.map(lambda x: _put(x, self.batch), batch)
        rows = self.rows(batch_size)

        def put(x: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                start, stop, _ = index[0].indices(batch_size)
                first = int(np.searchsorted(rows, start))
                return x[first : first + stop - start]

            return jax.make_array_from_callback((batch_size, *x.shape[1:]), self.batch, part)

        return jax.tree.map(put, batch)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes this the layout of `constrain` and the other functions here, for functions traced within."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def _count(self, axis: str) -> int:
        return math.prod(self.mesh.shape[name] for name in getattr(self.rules, axis))


_active: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def make_layout(
    devices: Sequence[Any] | None = None, *, fsdp: int = 1, tensor: int = 1, rules: Rules | None = None
) -> Layout:
    """A layout over devices, by default those of all processes; `data` is their number / (`fsdp` × `tensor`).

    Raises:
      InputError: fsdp × tensor does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or tensor < 1 or len(devices) % (fsdp * tensor):
        raise InputError(
            f"{len(devices)} devices cannot be laid out with fsdp={fsdp} and tensor={tensor}; "
            "their product must divide the number of devices."
        )
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Layout(mesh, rules or Rules())


def is_divided() -> bool:
    """Whether a layout over several devices is active."""
    layout = _active.get()
    return layout is not None and layout.mesh.size > 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation's sharding by its logical axes; does nothing if no layout is active."""
    layout = _active.get()
    if layout is None:
        return x
    spec = layout.rules.spec(axes, what="an activation")
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def gathered(x: jax.Array, name: str) -> jax.Array:
    """A parameter in the sharding of its product: divided along heads and hidden units only."""
    return constrain(x, *(axis if axis in ("heads", "hidden") else None for axis in logical_axes(name)))


def interleave(x: jax.Array, name: str, parts: int) -> jax.Array:
    """Interleaves the shards of a parameter that holds several products side by side; see `deinterleave`.

    Divided as it is, [query | key | value] would put all queries on one device and their keys on another. With the T
    shards of the parts interleaved, each device has the same heads of all three. This moves weights, which are smaller
    than activations.

    Args:
      x: (…, E) with E = parts × F.
      name: the end of its name, such as "qkv.kernel".
      parts: how many products.
    """
    shards = _shards(logical_axes(name)[-1]) if parts > 1 else 1
    if shards == 1:
        return gathered(x, name)
    lead, width = x.shape[:-1], x.shape[-1] // parts
    whole = constrain(x, *(None,) * x.ndim).reshape(*lead, parts, shards, width // shards)
    return gathered(jnp.swapaxes(whole, -3, -2).reshape(x.shape), name)


def deinterleave(y_NE: jax.Array, name: str, parts: int) -> list[jax.Array]:
    """The products of an interleaved kernel, each (N, F)."""
    axis = logical_axes(name)[-1]
    shards = _shards(axis) if parts > 1 else 1
    if shards == 1:
        split = jnp.split(y_NE, parts, axis=1)
    else:
        y_NTPF = y_NE.reshape(len(y_NE), shards, parts, -1)
        split = [y_NTPF[:, :, part].reshape(len(y_NE), -1) for part in range(parts)]
    return [constrain(y_NF, "batch", axis) for y_NF in split]


def divide_labels(kernel_DL: jax.Array, bias_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The label table in the sharding of its product: divided by labels, filled up by `fill_labels`.

    At rest the table is divided along its width, which divides evenly, so that parameters, checkpoints and bundles have
    no fillers. Shards of the width are gathered over `fsdp`, then exchanged for shards of the labels (an all-to-all
    over `tensor`): no device ever holds the whole table.
    """
    kernel_DL = fill_labels(constrain(kernel_DL, "logits", None))
    return constrain(kernel_DL, None, "logits"), constrain(fill_labels(bias_L), "logits")


def fill_labels(x_L: jax.Array) -> jax.Array:
    """Appends zeros to the last axis, the labels, until it divides evenly.

    XLA can also divide an axis unevenly, but its scatters (the sums over siblings) then count the last shard's padding.
    """
    fill = -x_L.shape[-1] % _shards("logits")
    return jnp.pad(x_L, [(0, 0)] * (x_L.ndim - 1) + [(0, fill)]) if fill else x_L


def to_host(x: Any) -> np.ndarray:
    """The whole array on every process. If it is sharded over several processes, all must call this together."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        sharding = x.sharding
        assert isinstance(sharding, NamedSharding)
        x = jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(x)
    return np.asarray(x)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _shards(axis: str) -> int:
    layout = _active.get()
    return 1 if layout is None else layout._count(axis)
