"""Rewriting of JAX functions into StableHLO's basic operators, for consumers that are older than JAX.

JAX lowers `erf` and `top_k` to composites, which TensorFlow 2.21 cannot read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# The replacement of a primitive: its operands and parameters → its results.
Replacement = Callable[..., Sequence[Any]]


def in_basic_operators(
    function: Callable[..., Any], *, like: Sequence[Any] | None = None, more: Mapping[str, Replacement] | None = None
) -> Callable[..., Any]:
    """An equivalent function in which primitives outside the basic operators are replaced.

    Args:
      function: takes arrays, or pytrees of arrays.
      like: arguments to trace with, if the types differ from those of the call; the replacements in `more` must handle
        the difference. By default the arguments of the call.
      more: replacements of further primitives, by the primitive's name.
    """
    replaced = {**_REPLACED, **(more or {})}

    def rewritten(*arguments: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*(arguments if like is None else like))
        outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), replaced)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return rewritten


def _evaluate(
    jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any], replaced: Mapping[str, Replacement]
) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
    for equation in jaxpr.eqns:
        inputs = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
        primitive, params = equation.primitive, equation.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if primitive.name in replaced:
            outputs = replaced[primitive.name](*inputs, **params)
        elif isinstance(inner, ClosedJaxpr):  # a nested call: jit, custom_jvp or custom_vjp
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, replaced)
        else:
            outputs = primitive.bind(*inputs, **primitive.get_bind_params(params))
            outputs = outputs if primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


# x · P(x²) / Q(x²), the rational approximation of XLA and Eigen for float32; beyond ±3.7439 erf rounds to ±1.
_ERF_P = (2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2, 1.8520832239976145e-1, 1.128379143519084)
_ERF_Q = (
    *(-1.1791602954361697e-7, 2.3547966471313185e-5, 1.0179625278914885e-3, 1.4070470171167667e-2),
    *(1.1098505178285362e-1, 4.9746925110067538e-1, 1.0),
)


def _erf(x: jax.Array, **_: Any) -> list[jax.Array]:
    x = jnp.clip(x, -3.7439211627767994, 3.7439211627767994)
    return [x * jnp.polyval(jnp.array(_ERF_P), x * x) / jnp.polyval(jnp.array(_ERF_Q), x * x)]


def _top_k(x: jax.Array, *, k: int, **_: Any) -> list[jax.Array]:
    """`top_k` by a stable sort: among equal values the one with the lower index comes first."""
    places = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    negated, order = lax.sort((-x, places), dimension=-1, is_stable=True, num_keys=1)
    return [-lax.slice_in_dim(negated, 0, k, axis=-1), lax.slice_in_dim(order, 0, k, axis=-1)]


_REPLACED: dict[str, Replacement] = {"erf": _erf, "top_k": _top_k}
