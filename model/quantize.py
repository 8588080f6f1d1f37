"""INT8 weights and products. AQT (https://github.com/google/aqt) rounds the kernels; only this file knows it.

Weights are int8 with one float32 scale an output channel, activations are quantised on the fly with one scale a token,
and products are int8 × int8 → int32. Embedding tables are int8 with one scale a row. The label head, biases and norms
stay float32: they are small, and the head's logits are what is calibrated.

Weights are plain named arrays, as bundles store them: an int8 `kernel` (D, F) stands beside its `kernel_scale` (F,), an
int8 `table` (V, D) beside its `table_scale` (V,). Serving needs no AQT.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from .sharding import to_host

# Name → array: "encoder.layer_0.attention.qkv.kernel". What a bundle's safetensors file holds.
Weights = dict[str, np.ndarray]

INT8_MAX = 127
_TINY = np.finfo(np.float32).tiny


def int8_product(x_ND: jax.Array, kernel_DF: jax.Array, scale_F: jax.Array) -> jax.Array:
    """x · (kernel × scale) as int8 × int8 → int32, activations quantised on the fly with one scale a token.

    AQT computes the same (equal in float32), but at bfloat16 it rounds the int32 sums to bfloat16 before it scales
    them. That costs accuracy, and XLA for TPU may then fold the rounding into the product, so that the compiled program
    no longer shows that the product is int8.

    Args:
      x_ND: activations, float32 or bfloat16.
      kernel_DF: int8.
      scale_F: float32.

    Returns:
      (N, F) float32.
    """
    x32_ND = x_ND.astype(jnp.float32)
    bound_N1 = jnp.abs(x32_ND).max(axis=1, keepdims=True)
    scale_N1 = jnp.where(bound_N1 == 0, 1.0, bound_N1 / (INT8_MAX + 0.5))
    int8_ND = jnp.clip(jnp.round(x32_ND * (1 / scale_N1)), -INT8_MAX, INT8_MAX).astype(jnp.int8)
    sums_NF = lax.dot_general(int8_ND, kernel_DF, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return sums_NF.astype(jnp.float32) * scale_N1 * scale_F[None]


def flatten(params: Mapping[str, Any]) -> Weights:
    """Linen's nested parameters → named arrays, whole on this host; see `sharding.to_host`."""
    return {name: to_host(value) for name, value in traverse_util.flatten_dict(params, sep=".").items()}


def unflatten(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Named arrays → Linen's nested parameters."""
    return traverse_util.unflatten_dict(weights, sep=".")


def to_int8(weights: Weights) -> Weights:
    """Post-training quantisation of trained float32 weights: the encoder's kernels and tables, with their scales."""
    quantized = dict(weights)
    for name, value in weights.items():
        if is_quantized(name):
            round_to_int8 = _quantize_columns if name.endswith(".kernel") else _quantize_rows
            quantized[name], quantized[f"{name}_scale"] = round_to_int8(value)
    return quantized


def to_float32(weights: Weights) -> Weights:
    """The float32 weights that int8 ones stand for: int8 × scale."""
    floats = {}
    for name, value in weights.items():
        if value.dtype == np.int8:
            scale = weights[f"{name}_scale"]
            floats[name] = value.astype(np.float32) * (scale if name.endswith(".kernel") else scale[:, None])
        elif not name.endswith(("kernel_scale", "table_scale")):
            floats[name] = value
    return floats


def to_bfloat16(weights: Weights) -> Weights:
    """Rounds the encoder's kernels and tables once, instead of in every run; the other weights stay float32."""
    return {name: value.astype(jnp.bfloat16) if is_quantized(name) else value for name, value in weights.items()}


def is_quantized(name: str) -> bool:
    """Whether the weight of that name is int8 in an INT8 classifier: the encoder's kernels and tables are."""
    return name.startswith("encoder.") and name.endswith((".kernel", ".table"))


def count_products(hlo: str) -> collections.Counter[str]:
    """Counts a compiled program's matrix products by element types, such as {"s8×s8→s32": 24, "f32×f32→f32": 13}.

    Args:
      hlo: optimised HLO (`Program.as_text`). Its products are `dot`s, also within fusions, and calls of matrix
        libraries. An operand's type is that at the product: int8 weights converted to floats before it count as floats.
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


def _quantize_columns(kernel_DF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 by AQT with one scale a column: (D, F) float32 → (D, F) int8 and (F,) float32."""
    value_DF, scale_1F = _frozen_by_aqt(kernel_DF)
    return np.asarray(value_DF), np.asarray(scale_1F)[0]


@jax.jit
def _frozen_by_aqt(kernel_DF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What AQT freezes of a kernel in one product with it: int8 (D, F) and float32 scales (1, F)."""
    from aqt.jax.v2 import config as aqt_config
    from aqt.jax.v2.flax import aqt_flax
    from aqt.jax.v2.utils import QuantMode

    product = aqt_flax.AqtDotGeneral(
        aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None),
        lhs_quant_mode=QuantMode.TRAIN,
        rhs_quant_mode=QuantMode.CONVERT,
        rhs_freeze_mode=aqt_flax.FreezerMode.CALIBRATION_AND_VALUE,
        quant_collection="aqt",
    )
    x_1D = jnp.zeros((1, kernel_DF.shape[0]), jnp.float32)
    dimensions = (((1,), (0,)), ((), ()))
    # AQT asks for an RNG even where it rounds to nearest.
    rngs = {"params": jax.random.key(0)}
    _, written = product.apply({}, x_1D, kernel_DF, dimensions, precision=None, mutable=["aqt"], rngs=rngs)
    frozen: Any = written["aqt"]["qrhs"]
    return frozen["value"], frozen["scale"]


def _quantize_rows(table_VD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale a row: (V, D) float32 → (V, D) int8 and (V,) float32."""
    scale_V = np.maximum(np.abs(table_VD).max(axis=1) / INT8_MAX, _TINY)
    return np.rint(table_VD / scale_V[:, None]).astype(np.int8), scale_V.astype(np.float32)
