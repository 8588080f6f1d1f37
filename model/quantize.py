"""INT8 by AQT (https://github.com/google/aqt), in this one file, so that a successor can replace it here.

Weights are int8 with one float32 scale an output channel, activations are quantised on the fly with one scale a token,
and products are int8 × int8 → int32. Embedding tables are int8 with one scale a row. The label head, biases and norms
stay float32: they are small, and the head's logits are what is calibrated.

Outside this file nothing knows AQT: `convert` gives plain named arrays, which bundles store, and `variables` turns
those into what the Linen modules read.
"""

from __future__ import annotations

import collections
import enum
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import lax

from .sharding import to_host

Precision = Literal["float32", "int8"]

# Name → array: "encoder.layer_0.attention.qkv.kernel". What a bundle's safetensors file holds.
Weights = dict[str, np.ndarray]

INT8_MAX = 127
_AQT = "aqt"  # AQT's collection, and the name of its submodule in a Dense layer
_TINY = np.finfo(np.float32).tiny


class Quantization(enum.Enum):
    """What the linear layers compute with."""

    NONE = "none"  # float weights
    CONVERT = "convert"  # one pass over the float weights that also writes int8 ones
    SERVE = "serve"  # int8 weights, int32 products


class _Int8Weights(nn.Module):
    """What AQT froze of a kernel: int8 (D, F) and its scales, float32 (1, F)."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        value_DF = self.variable(_AQT, "value", jnp.zeros, self.shape, jnp.int8).value
        return value_DF, self.variable(_AQT, "scale", jnp.zeros, (1, self.shape[1]), jnp.float32).value


class _ServedProduct(nn.Module):
    """int8 × int8 → int32 of frozen weights and activations that are quantised on the fly, one scale a token.

    AQT computes the same (equal in float32), but at bfloat16 it rounds the int32 sums to bfloat16 before it scales
    them, which costs accuracy and lets XLA for TPU fold the rounding into the product, so that nothing proves int8.
    """

    @nn.compact
    def __call__(self, x_ND: jax.Array, kernel_DF: jax.Array, *_: Any, **__: Any) -> jax.Array:
        value_DF, scale_1F = _Int8Weights((kernel_DF.shape[0], kernel_DF.shape[1]), name="qrhs")()
        x32_ND = x_ND.astype(jnp.float32)
        bound_N1 = jnp.abs(x32_ND).max(axis=1, keepdims=True)
        scale_N1 = jnp.where(bound_N1 == 0, 1.0, bound_N1 / (INT8_MAX + 0.5))
        int8_ND = jnp.clip(jnp.round(x32_ND * (1 / scale_N1)), -INT8_MAX, INT8_MAX).astype(jnp.int8)
        sums_NF = lax.dot_general(int8_ND, value_DF, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        return sums_NF.astype(jnp.float32) * scale_N1 * scale_1F


def dot_general(mode: Quantization) -> Callable[..., jax.Array]:
    """A stand-in for `lax.dot_general`, to be called inside a Linen module, which then holds its variables.

    Converting is AQT's; serving needs no AQT.
    """
    if mode is Quantization.SERVE:
        return _ServedProduct(name=_AQT)
    from aqt.jax.v2 import config as aqt_config
    from aqt.jax.v2.flax import aqt_flax
    from aqt.jax.v2.utils import QuantMode

    return aqt_flax.AqtDotGeneral(
        aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None),
        lhs_quant_mode=QuantMode.TRAIN,  # activations are quantised on the fly in every mode
        rhs_quant_mode=QuantMode.CONVERT,
        rhs_freeze_mode=aqt_flax.FreezerMode.CALIBRATION_AND_VALUE,
        quant_collection=_AQT,
        name=_AQT,
    )


def flatten(params: Mapping[str, Any]) -> Weights:
    """Linen's nested parameters → named arrays, whole on this host; see `sharding.to_host`."""
    return {name: to_host(value) for name, value in traverse_util.flatten_dict(params, sep=".").items()}


def convert(model: nn.Module, weights: Weights) -> Weights:
    """Quantises trained float weights: post-training quantisation.

    Args:
      model: the same classifier with `Quantization.CONVERT`.
      weights: its float32 weights.

    Returns:
      Weights in which each linear kernel is int8 (D, F) beside `kernel_scale` (F,) and each embedding table int8 (V, D)
      beside `table_scale` (V,); value ≈ int8 × scale.
    """
    tokens_BS, lengths_B = jnp.zeros((1, 8), jnp.int32), jnp.full((1,), 8, jnp.int32)
    # AQT quantises weights as it sees them pass by, and asks for an RNG even where it rounds to nearest.
    apply = jax.jit(functools.partial(model.apply, mutable=[_AQT]))
    rngs = {"params": jax.random.key(0)}
    _, written = apply(jax.device_put(variables(weights, "float32")), tokens_BS, lengths_B, rngs=rngs)
    converted = dict(weights)
    for name, value in flatten(written[_AQT]).items():
        layer, _, part = name.rpartition(f".{_AQT}.qrhs.")
        if part == "value":
            converted[f"{layer}.kernel"] = value
        else:
            converted[f"{layer}.kernel_scale"] = value[0]
    for name in [name for name in weights if name.endswith(".table")]:
        converted[name], converted[f"{name}_scale"] = _quantize_rows(weights[name])
    return converted


def dequantize(weights: Weights) -> Weights:
    """The float32 weights that `convert`'s stand for: int8 × scale."""
    floats = {}
    for name, value in weights.items():
        if value.dtype == np.int8:
            scale = weights[f"{name}_scale"]
            floats[name] = value.astype(np.float32) * (scale if name.endswith(".kernel") else scale[:, None])
        elif not name.endswith(("kernel_scale", "table_scale")):
            floats[name] = value
    return floats


def count_products(hlo: str) -> collections.Counter[str]:
    """What the matrix products of a compiled program take and give, such as {"s8×s8→s32": 24, "f32×f32→f32": 13}.

    Args:
      hlo: optimised HLO (`Program.as_text`). Products are its `dot`s, also within fusions, and its calls of matrix
        libraries. An operand counts as what enters the product itself: int8 weights that are converted to floats
        before it are floats.
    """
    types: dict[str, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    for line in hlo.splitlines():
        if (found := _INSTRUCTION.match(line)) is None:
            continue
        name, result, operation, operands = found.groups()
        types[name] = result
        if operation == "dot" or (operation == "custom-call" and _MATMUL_CALL.search(line)):
            # Some versions of XLA write an operand's type before its name.
            lhs, rhs = [types[operand] for operand in _OPERAND.findall(operands)[:2]]
            counts[f"{lhs}×{rhs}→{result}"] += 1
    return counts


# "  ROOT %dot.1 = s32[32,64]{1,0} dot(%a, %b), …" → name, element type (a tuple's first), operation, operands
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = \(?(\w+)\[[^ ]* (?:[^(]*\) )?([\w-]+)\(([^)]*)\)")
_MATMUL_CALL = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)', re.IGNORECASE)
_OPERAND = re.compile(r"%?([A-Za-z_][\w.-]*)(?=,|$)")


def variables(weights: Weights, precision: Precision) -> dict[str, Any]:
    """Named arrays → the variable collections that the Linen modules read."""
    if precision == "float32":
        return {"params": traverse_util.unflatten_dict(weights, sep=".")}
    params, frozen = {}, {}
    for name, value in weights.items():
        layer, _, part = name.rpartition(".")
        if part == "kernel" and value.dtype == np.int8:
            frozen[f"{layer}.{_AQT}.qrhs.value"] = value
        elif part == "kernel_scale":
            frozen[f"{layer}.{_AQT}.qrhs.scale"] = value[None]
        else:
            params[name] = value
    return {
        "params": traverse_util.unflatten_dict(params, sep="."),
        _AQT: traverse_util.unflatten_dict(frozen, sep="."),
    }


def _quantize_rows(table_VD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale a row: (V, D) float32 → (V, D) int8 and (V,) float32."""
    scale_V = np.maximum(np.abs(table_VD).max(axis=1) / INT8_MAX, _TINY)
    return np.rint(table_VD / scale_V[:, None]).astype(np.int8), scale_V.astype(np.float32)
