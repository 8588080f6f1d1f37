"""A pretrained BERT-family encoder → the native architecture, in closed form. `train.convert` heals it afterwards.

BERT normalises after each residual sum, u = a + f(a), a' = γ ⊙ LN(u) + β. The native architecture keeps a residual
stream r that is only ever added to, and normalises what its sublayers read: RMSNorm(r) ⊙ s. Both meet when r is kept
proportional to u ⊘ s, where s is the product of the γ's before: a sublayer's task is then to write
ρ u ⊘ s − r, with ρ the stream's root mean square. Every kernel is fitted to that by ridge regression on activations of
real texts, layer by layer, each on the outputs of the student's layers before it, so that errors do not accumulate.
Biases need no parameters: the activations' mean is far from zero, so that a linear map can produce a constant.

- GELU(x) ≈ x σ(1.702 x) (Hendrycks & Gimpel 2016, section 2) is SwiGLU with the gate's kernel × 1.702 and a value
  branch that is the constant 1 / 1.702. Of the hidden units the most active stay, 2/3 of them (Shazeer 2020): as many
  parameters as before.
- Rotary positions turn the fast dimensions of queries and keys against one another. A head's scores do not change when
  both are rotated alike, so its principal directions are moved to the dimensions that turn slowest.

Axes: B batch, S sequence, N real tokens, D model width, H heads, K head width, F feed-forward width, I layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from ..data.errors import InputError
from . import ops
from .config import EncoderConfig, native_like
from .focus import MASKED_SCORE
from .layers import Attention, Embeddings
from .precision import Precision
from .quantize import Weights, unflatten

GELU_SLOPE = 1.702
RIDGE = 1e-4  # share of the mean square of the inputs
# Scales below this share of their median are raised to it, because activations are divided by them.
LEAST_SCALE = 0.2


class Converted(NamedTuple):
    """An encoder of the native architecture that imitates another.

    Attributes:
      config, weights: the encoder.
      scale_ID, bias_ID: RMSNorm(the stream after layer i) ⊙ scale + bias approximates the teacher's layer i.
    """

    config: EncoderConfig
    weights: Weights
    scale_ID: np.ndarray
    bias_ID: np.ndarray


def convert_encoder(
    teacher: EncoderConfig, weights: Weights, tokens_BS: np.ndarray, lengths_B: np.ndarray, d_ff: int | None = None
) -> Converted:
    """Fits a native encoder of the same depth and width to a pretrained one.

    Args:
      teacher, weights: the pretrained encoder, of the BERT family.
      tokens_BS, lengths_B: real texts; about 20,000 tokens are enough.
      d_ff: hidden units to keep; by default two thirds of the teacher's.

    Raises:
      InputError: the teacher has norms before its sublayers, or no biases: it is not of the BERT family.
    """
    if teacher.pre_norm or teacher.activation != "gelu" or teacher.rope_base is not None:
        raise InputError(
            "Only encoders of the BERT family can be converted: GELU, learned positions, norms after sums."
        )
    student = native_like(teacher, d_ff)
    batch = _Batch(tokens_BS.shape, lengths_B)
    ours: Weights = {
        "encoder.embeddings.token.table": _embeddings(teacher, weights, tokens_BS.shape[1]),
        "encoder.embeddings.norm.scale": np.ones(teacher.d_model, np.float32),
    }
    table_VD = ours["encoder.embeddings.token.table"]
    ours["encoder.embeddings.norm.scale"] *= np.sqrt(np.square(table_VD).mean())
    a_ND, r_ND = (
        _apply(Embeddings(config, jnp.float32, Precision.float32), table, "encoder.embeddings", tokens_BS)[batch.real_N]
        for config, table in ((teacher, weights), (student, ours))
    )
    scales, biases = [], []
    for i in range(teacher.num_layers):
        theirs = _TeacherLayer.of(teacher, weights, i, a_ND, batch)
        r_ND = _fit_layer(student, ours, i, r_ND, a_ND, theirs, batch)
        a_ND = theirs.output_ND
        scale_D, bias_D = _affine(_rms_norm(r_ND), a_ND)
        scales.append(scale_D)
        biases.append(bias_D)
    ours["encoder.final_norm.scale"] = scales[-1]
    return Converted(student, ours, np.stack(scales), np.stack(biases))


class _Batch(NamedTuple):
    """The texts that kernels are fitted on. All computations but attention read their real tokens only, one a row."""

    shape: tuple[int, ...]
    lengths_B: np.ndarray

    @property
    def real_N(self) -> np.ndarray:
        return (np.arange(self.shape[1]) < self.lengths_B[:, None]).reshape(-1)

    def attend(self, config: EncoderConfig, weights: Weights, name: str, x_ND: np.ndarray) -> np.ndarray:
        """The outputs of the attention of that name, for real tokens."""
        real_N = self.real_N
        padded_ND = np.zeros((len(real_N), config.d_model), np.float32)
        padded_ND[real_N] = x_ND
        positions_BS = np.broadcast_to(np.arange(self.shape[1], dtype=np.int32), self.shape)
        bias_BS = np.where(real_N, 0.0, MASKED_SCORE).reshape(self.shape).astype(np.float32)
        attention = Attention(config, Precision.float32, 0.0)
        return _apply(attention, weights, name, padded_ND, bias_BS, positions_BS, False)[real_N]


class _TeacherLayer(NamedTuple):
    """Intermediate activations of one layer of the teacher. A `sum` is u = a + f(a), before the norm."""

    qkv_NE: np.ndarray
    attention_sum_ND: np.ndarray
    middle_ND: np.ndarray
    up_NF: np.ndarray
    feed_forward_sum_ND: np.ndarray
    output_ND: np.ndarray

    @classmethod
    def of(cls, config: EncoderConfig, weights: Weights, i: int, a_ND: np.ndarray, batch: _Batch) -> _TeacherLayer:
        name = f"encoder.layer_{i}"

        def linear(x_NP: np.ndarray, layer: str) -> np.ndarray:
            return _matmul(x_NP, weights[f"{name}.{layer}.kernel"]) + weights[f"{name}.{layer}.bias"]

        def norm(x_ND: np.ndarray, layer: str) -> np.ndarray:
            scale, bias = weights[f"{name}.{layer}.scale"], weights[f"{name}.{layer}.bias"]
            return np.asarray(ops.layer_norm(jnp.asarray(x_ND), scale, bias, config.norm_eps))

        attended_ND = batch.attend(config, weights, f"{name}.attention", a_ND)
        middle_ND = norm(a_ND + attended_ND, "attention_norm")
        up_NF = linear(middle_ND, "feed_forward.up")
        sum_ND = middle_ND + linear(np.asarray(ops.gelu(jnp.asarray(up_NF))), "feed_forward.down")
        output_ND = norm(sum_ND, "feed_forward_norm")
        return cls(linear(a_ND, "attention.qkv"), a_ND + attended_ND, middle_ND, up_NF, sum_ND, output_ND)


def _fit_layer(
    student: EncoderConfig,
    ours: Weights,
    i: int,
    r_ND: np.ndarray,
    a_ND: np.ndarray,
    theirs: _TeacherLayer,
    batch: _Batch,
) -> np.ndarray:
    """Fits one layer's kernels and adds them to `ours`. Returns the residual stream after the layer."""
    name = f"encoder.layer_{i}"
    scale_D, _ = _affine(_rms_norm(r_ND), a_ND)
    x_ND = r_ND
    if i:  # the first layer reads the embeddings, which are normalised
        ours[f"{name}.attention_norm.scale"] = scale_D
        x_ND = _rms_norm(r_ND) * scale_D
    qkv_DE = _slowest_first(_fit(x_ND, theirs.qkv_NE), x_ND, student)
    ours[f"{name}.attention.qkv.kernel"] = qkv_DE
    ours[f"{name}.attention.out.kernel"] = np.eye(student.d_model, dtype=np.float32)
    mixed_ND = batch.attend(student, ours, f"{name}.attention", x_ND)
    out_DD = _fit(mixed_ND, _stream_of(theirs.attention_sum_ND, scale_D, r_ND) - r_ND)
    ours[f"{name}.attention.out.kernel"] = out_DD
    r_ND = r_ND + _matmul(mixed_ND, out_DD)

    scale_D, _ = _affine(_rms_norm(r_ND), theirs.middle_ND)
    ours[f"{name}.feed_forward_norm.scale"] = scale_D
    x_ND = _rms_norm(r_ND) * scale_D
    target_ND = _stream_of(theirs.feed_forward_sum_ND, scale_D, r_ND) - r_ND
    hidden_NF = np.asarray(ops.gelu(jnp.asarray(theirs.up_NF)))
    reach_F = np.linalg.norm(_fit(hidden_NF, target_ND), axis=1) * hidden_NF.std(axis=0)
    units = np.sort(np.argsort(-reach_F)[: student.d_ff])
    gate_DF = _fit(x_ND, GELU_SLOPE * theirs.up_NF[:, units])
    value_DF = _fit(x_ND, np.full((len(x_ND), len(units)), 1 / GELU_SLOPE, np.float32))
    ours[f"{name}.feed_forward.up.kernel"] = np.concatenate([gate_DF, value_DF], axis=1)
    hidden_NF = np.asarray(ops.silu(jnp.asarray(_matmul(x_ND, gate_DF)))) * _matmul(x_ND, value_DF)
    down_FD = _fit(hidden_NF, target_ND)
    ours[f"{name}.feed_forward.down.kernel"] = down_FD
    return r_ND + _matmul(hidden_NF, down_FD)


def _embeddings(teacher: EncoderConfig, weights: Weights, length: int) -> np.ndarray:
    """The teacher's normalised embedding of each token at the mean of the first positions, float32 (V, D)."""
    name = "encoder.embeddings"
    token_VD = weights[f"{name}.token.table"] + weights[f"{name}.position.table"][:length].mean(axis=0)
    if teacher.num_segments:
        token_VD = token_VD + weights[f"{name}.segment.table"][0]
    scale_D, bias_D = weights[f"{name}.norm.scale"], weights[f"{name}.norm.bias"]
    return np.asarray(ops.layer_norm(jnp.asarray(token_VD), scale_D, bias_D, teacher.norm_eps))


def _stream_of(u_ND: np.ndarray, scale_D: np.ndarray, r_ND: np.ndarray) -> np.ndarray:
    """The target of the residual stream for the teacher's sum u: ρ u ⊘ s, with the median length for every token."""
    spread_N1 = u_ND.std(axis=-1, keepdims=True)
    length = np.median(np.sqrt(np.square(r_ND).mean(axis=-1, keepdims=True)) * spread_N1)
    return length * u_ND / spread_N1 / scale_D


def _slowest_first(qkv_DE: np.ndarray, x_ND: np.ndarray, config: EncoderConfig) -> np.ndarray:
    """Rotates each head's queries and keys alike, their principal directions to the slowest rotary dimensions."""
    D, H, K = config.d_model, config.num_heads, config.head_dim
    half = K // 2
    # Pair j is (j, j + half) and turns by position · base^(−j / half): the last pair is the slowest.
    slowest = [dim for pair in reversed(range(half)) for dim in (pair, pair + half)]
    query_DHK, key_DHK = (qkv_DE[:, part * D : (part + 1) * D].reshape(D, H, K) for part in (0, 1))
    gram_DD = _matmul(x_ND.T, x_ND) / len(x_ND)
    result_DE = qkv_DE.copy()
    for h in range(H):
        energies = [kernel[:, h].T @ gram_DD @ kernel[:, h] for kernel in (query_DHK, key_DHK)]
        energy_KK = sum(energy / max(np.trace(energy), 1e-12) for energy in energies)
        _, directions_KK = np.linalg.eigh(energy_KK)  # ascending
        basis_KK = np.zeros_like(directions_KK)
        basis_KK[:, slowest] = directions_KK[:, ::-1]
        for part, kernel in ((0, query_DHK), (1, key_DHK)):
            result_DE[:, part * D + h * K : part * D + (h + 1) * K] = kernel[:, h] @ basis_KK
    return result_DE


def _rms_norm(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.sqrt(np.square(x_ND).mean(axis=-1, keepdims=True) + 1e-6)


def _affine(x_ND: np.ndarray, y_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale and bias with which each dimension of x varies as y's does; no scale is near zero.

    Not those of a regression: where x predicts y badly they would be too small to divide by.
    """
    scale_D = y_ND.std(axis=0) / np.maximum(x_ND.std(axis=0), 1e-6)
    scale_D = np.maximum(scale_D, LEAST_SCALE * np.median(scale_D))
    return scale_D, y_ND.mean(axis=0) - scale_D * x_ND.mean(axis=0)


def _fit(x_NP: np.ndarray, y_NQ: np.ndarray) -> np.ndarray:
    """The kernel (P, Q) with which x fits y best, by ridge regression."""
    gram_PP = _matmul(x_NP.T, x_NP).astype(np.float64)
    gram_PP[np.diag_indices_from(gram_PP)] += RIDGE * np.trace(gram_PP) / len(gram_PP)
    return scipy.linalg.solve(gram_PP, _matmul(x_NP.T, y_NQ), assume_a="pos").astype(np.float32)


@jax.jit
def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest")


def _matmul(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The product by XLA, which uses all cores, or the accelerator."""
    return np.asarray(_product(x, y))


def _apply(module: Any, weights: Weights, name: str, *inputs: Any) -> np.ndarray:
    """Calls one module with the weights below its name."""
    mine = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
    params = unflatten(mine)
    return np.asarray(cast(jax.Array, jax.jit(module.apply)({"params": params}, *inputs)))
