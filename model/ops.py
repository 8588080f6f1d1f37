"""Products and norms of the encoder, with backward passes in a form that XLA compiles to fast code.

Axes: N = batch × sequence (tokens, flattened), D = inputs, F = outputs.

Three rules make a training step on a CPU faster (`tools/bench/finetune.py` measures it) and cost nothing elsewhere:

- Activations stay two-dimensional, and every product contracts the last axis of its left side, the only form for which
  XLA:CPU uses its bfloat16 kernels.
- A weight gradient, xᵀg, contracts the first axis: xᵀ is laid out in memory before the product, which is 4× as fast.
- Sums over tokens (the gradients of biases and scales) are products with a row of ones, because XLA compiles sums to
  slow windowed reductions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from . import sharding


def _dot(lhs: jax.Array, rhs: jax.Array, lhs_axis: int, rhs_axis: int) -> jax.Array:
    """A product of two matrices over the axes given, accumulated and returned in float32."""
    return lax.dot_general(lhs, rhs, (((lhs_axis,), (rhs_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _weight_gradient(x_ND: jax.Array, g_NF: jax.Array) -> jax.Array:
    """xᵀg, float32 (D, F)."""

    def transposed(x_ND: jax.Array, g_NF: jax.Array) -> jax.Array:
        x_DN = with_layout_constraint(x_ND.T, Layout(major_to_minor=(0, 1)))
        return _dot(x_DN, g_NF, 1, 0)

    def direct(x_ND: jax.Array, g_NF: jax.Array) -> jax.Array:
        return _dot(x_ND, g_NF, 0, 0)

    if sharding.is_divided():  # XLA cannot shard a layout constraint: every device would gather all tokens
        return direct(x_ND, g_NF)
    return lax.platform_dependent(x_ND, g_NF, cpu=transposed, default=direct)


def _sum_tokens(x_NF: jax.Array) -> jax.Array:
    """Sum over the first axis, float32 (F,)."""
    return _dot(jnp.ones((1, x_NF.shape[0]), x_NF.dtype), x_NF, 1, 0)[0]


@jax.custom_vjp
def _linear(x_ND: jax.Array, kernel_DF: jax.Array, bias_F: jax.Array) -> jax.Array:
    return _linear_forward(x_ND, kernel_DF, bias_F)[0]


def _linear_forward(x_ND, kernel_DF, bias_F):
    # Without the barrier XLA fuses the cast into the product and then does not use the bfloat16 kernels.
    kernel_DF = lax.optimization_barrier(kernel_DF.astype(x_ND.dtype))
    return (_dot(x_ND, kernel_DF, 1, 0) + bias_F).astype(x_ND.dtype), (x_ND, kernel_DF)


def _linear_backward(residuals, g_NF):
    x_ND, kernel_DF = residuals
    x_ND, g_NF = lax.optimization_barrier((x_ND, g_NF))
    dx_ND = _dot(g_NF, kernel_DF, 1, 1).astype(x_ND.dtype)
    return dx_ND, _weight_gradient(x_ND, g_NF), _sum_tokens(g_NF)


_linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def _product(x_ND: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    return _product_forward(x_ND, kernel_DF)[0]


def _product_forward(x_ND, kernel_DF):
    kernel_DF = lax.optimization_barrier(kernel_DF.astype(x_ND.dtype))
    return _dot(x_ND, kernel_DF, 1, 0).astype(x_ND.dtype), (x_ND, kernel_DF)


def _product_backward(residuals, g_NF):
    return _linear_backward(residuals, g_NF)[:2]


_product.defvjp(_product_forward, _product_backward)


def linear(x_ND: jax.Array, kernel_DF: jax.Array, bias_F: jax.Array | None) -> jax.Array:
    """x · kernel + bias, computed in the dtype of x, accumulated in float32.

    Args:
      x_ND: activations, float32 or bfloat16.
      kernel_DF: float32 weights, cast to the dtype of x.
      bias_F: float32 bias, added to the float32 accumulator; None for none.

    Returns:
      (N, F) in the dtype of x.
    """
    return _product(x_ND, kernel_DF) if bias_F is None else _linear(x_ND, kernel_DF, bias_F)


@jax.custom_vjp
def layer_norm(x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis (Ba et al. 2016, https://arxiv.org/abs/1607.06450), statistics in float32.

    Args:
      x_ND: activations, float32 or bfloat16.
      scale_D, bias_D: float32.
      eps: added to the variance.

    Returns:
      (N, D) in the dtype of x.
    """
    return _layer_norm_forward(x_ND, scale_D, bias_D, eps)[0]


def _layer_norm_forward(x_ND, scale_D, bias_D, eps):
    x32_ND = x_ND.astype(jnp.float32)
    mean_N1 = x32_ND.mean(axis=-1, keepdims=True)
    rstd_N1 = lax.rsqrt(jnp.square(x32_ND - mean_N1).mean(axis=-1, keepdims=True) + eps)
    y_ND = (x32_ND - mean_N1) * rstd_N1 * scale_D + bias_D
    return y_ND.astype(x_ND.dtype), (x_ND, scale_D, mean_N1, rstd_N1)


def _layer_norm_backward(residuals, g_ND):
    x_ND, scale_D, mean_N1, rstd_N1 = residuals
    g32_ND = g_ND.astype(jnp.float32)
    normed_ND = (x_ND.astype(jnp.float32) - mean_N1) * rstd_N1
    dnormed_ND = g32_ND * scale_D
    along_N1 = (dnormed_ND * normed_ND).mean(axis=-1, keepdims=True)
    dx_ND = rstd_N1 * (dnormed_ND - dnormed_ND.mean(axis=-1, keepdims=True) - normed_ND * along_N1)
    dscale_D = _sum_tokens((g32_ND * normed_ND).astype(x_ND.dtype))
    return dx_ND.astype(x_ND.dtype), dscale_D, _sum_tokens(g_ND), None


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def gelu(x_NF: jax.Array) -> jax.Array:
    """x · Φ(x), by the error function in float32 (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415)."""
    x32_NF = x_NF.astype(jnp.float32)
    return (x32_NF * (0.5 + 0.5 * lax.erf(x32_NF * 2**-0.5))).astype(x_NF.dtype)


def silu(x_NF: jax.Array) -> jax.Array:
    """x · σ(x) in float32 (Elfwing et al. 2017, https://arxiv.org/abs/1702.03118)."""
    x32_NF = x_NF.astype(jnp.float32)
    return (x32_NF * jax.nn.sigmoid(x32_NF)).astype(x_NF.dtype)


def rms_norm(x_ND: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467), statistics in float32.

    Args:
      x_ND: activations, float32 or bfloat16.
      scale_D: float32.
      eps: added to the mean square.
    """
    x32_ND = x_ND.astype(jnp.float32)
    rstd_N1 = lax.rsqrt(jnp.square(x32_ND).mean(axis=-1, keepdims=True) + eps)
    return (x32_ND * rstd_N1 * scale_D).astype(x_ND.dtype)


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Zeroes elements at random and scales the others so that the mean stays (Srivastava et al. 2014, JMLR 15).

    Draws 8 random bits for an element, where `flax.linen.Dropout` draws 32, which took a sixth of a training step on a
    CPU.

    Args:
      x: any shape of at least one axis.
      key: a JAX key.
      rate: in [0, 1), rounded to a 256th.
    """
    num_dropped = round(rate * 256)
    *leading, last = x.shape
    words = jax.random.bits(key, (*leading, -(-last // 4)), jnp.uint32)
    levels = lax.bitcast_convert_type(words, jnp.uint8).reshape(*leading, -1)[..., :last]
    return jnp.where(levels < num_dropped, 0, x * (256 / (256 - num_dropped))).astype(x.dtype)
