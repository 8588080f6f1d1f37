"""A classifier as an ONNX graph, with the same weights and the same order as `model/encoder.py` and `layers.py`.

Batch and length are dynamic. INT8 matches Classer's own programs: int8 kernels with one scale per channel from the
bundle, activations quantised at run time with one scale per token, int32 products (MatMulInteger). Half precisions
match too: weights and activations in the dtype; norms, scores, softmax and pooling in float32.

Outside attention and the selection of tokens, the tokens of all texts share one axis (N). Quantisation is per token,
and ONNX Runtime fuses a residual sum of three axes with its norm into an operator that is slower than the two.

Axes: B batch, S sequence, K kept sequence, N = B × K, D model width, F outputs, H heads, L labels of all tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx

from classer.data.taxonomy import Task, TaskKind
from classer.model.bundle import Bundle
from classer.model.focus import MASKED_SCORE, MIN_KEPT, SURE, UNITS, Focus
from classer.model.precision import Precision

from .decoding import tree_of
from .graph import Graph

# AQT maps a token's largest magnitude to 127.5 and rounds it down to 127. QuantizeLinear would saturate -127.5 at -128.
# A bound slightly below 127.5 rounds both ends to a magnitude of 127 and leaves all other values unchanged.
INT8_BOUND = 127.49995
INT8_ZERO = 128  # the zero point of activations, which are uint8: runtimes have fast kernels for uint8 × int8
SMALLEST_BOUND = 1e-30
GATE_EPS = 1e-6


class _Tokens(NamedTuple):
    """The tokens that a layer reads, like `model.focus.KeptTokens`; positions are None while they are 0 to S - 1."""

    weights_BK: str
    bias_B11K: str
    positions_BK: str | None


def build_model(bundle: Bundle, dtype: Precision, focus: Focus, *, compressed: bool = False) -> onnx.ModelProto:
    """The classifier's graph: input_ids and attention_mask (int64, batch × length) → logits and probabilities.

    Args:
      bundle: float32 or INT8.
      dtype: dtype of activations between the products: float32, float16 or bfloat16.
      focus: the share of tokens that each layer keeps.
      compressed: writes INT8 kernels as DequantizeLinear before float products instead of MatMulInteger, for runtimes
        that recognise this pattern and quantise activations themselves.
    """
    return _Builder(bundle, dtype, focus, compressed).build()


class _Builder:
    def __init__(self, bundle: Bundle, dtype: Precision, focus: Focus, compressed: bool) -> None:
        self.g = Graph()
        self.bundle = bundle
        self.config = bundle.encoder
        self.weights = bundle.weights
        self.dtype = dtype
        self.focus = focus
        self.compressed = compressed

    def build(self) -> onnx.ModelProto:
        g, c = self.g, self.config
        self.batch, self.length = g.dimension("input_ids", 0), g.dimension("input_ids", 1)
        if self.bundle.precision == Precision.int8 and not self.compressed:
            self.one = g.cast(g.op("Greater", g.op("Squeeze", self.length), g.constant(0, "int64")), "float32")
        mask_BS = g.cast("attention_mask", "float32")
        self.lengths_B1 = g.op("ReduceSum", "attention_mask", g.constant([1], "int64"), keepdims=1)
        tokens = _Tokens(mask_BS, self._bias(mask_BS), None)
        x_ND = self._embeddings()
        for i in range(c.num_layers):
            g.scope(f"layer_{i}")
            x_ND, tokens = self._layer(x_ND, tokens, i)
        g.scope("")
        if c.pre_norm:
            x_ND = self._norm(x_ND, "encoder.final_norm")
        self._head(x_ND, tokens)
        shape, labels = ("batch", "length"), self.bundle.taxonomy.num_labels
        return g.model(
            {"input_ids": ("int64", shape), "attention_mask": ("int64", shape)},
            dict.fromkeys(("logits", "probabilities"), ("float32", ("batch", labels))),
            {"bundle": self.bundle.version, "focus": str(self.focus)},
        )

    def _to_compute(self, x: str) -> str:
        return x if self.dtype == Precision.float32 else self.g.cast(x, self.dtype)

    def _to_float(self, x: str) -> str:
        return x if self.dtype == Precision.float32 else self.g.cast(x, "float32")

    def _weight(self, name: str, dtype: str | None = None) -> str:
        return self.g.constant(self.weights[name], dtype, name)

    def _bias(self, mask_BK: str) -> str:
        """The attention bias of keys, float32 (B, 1, 1, K): 0, and `MASKED_SCORE` where the mask is 0."""
        g = self.g
        bias_BK = g.op("Mul", g.op("Sub", g.constant(1, "float32"), mask_BK), g.constant(MASKED_SCORE, "float32"))
        return g.unsqueeze(bias_BK, 1, 2)

    def _embeddings(self) -> str:
        g, c = self.g, self.config
        g.scope("embeddings")
        x_BSD = self._lookup("token", "input_ids")
        if c.rope_base is None:
            places_S = g.op("Range", g.constant(0, "int64"), g.op("Squeeze", self.length), g.constant(1, "int64"))
            x_BSD = g.op("Add", x_BSD, self._lookup("position", places_S))
        if c.num_segments:
            table = self.weights["encoder.embeddings.segment.table"].astype(np.float32)
            if self.bundle.precision == Precision.int8:
                table = table * self.weights["encoder.embeddings.segment.table_scale"][:, None]
            x_BSD = g.op("Add", x_BSD, g.constant(table[0], name="encoder.embeddings.segment"))
        x_ND = g.reshape(x_BSD, -1, c.d_model)
        return self._to_compute(self._layer_or_rms_norm(x_ND, "encoder.embeddings.norm"))

    def _by_text(self, x_ND: str, *inner: int) -> str:
        """(N, …) → (B, K, *inner); `inner` defaults to the model width D."""
        return self.g.reshape(x_ND, self.batch, -1, *(inner or (self.config.d_model,)))

    def _lookup(self, table: str, ids: str) -> str:
        """Rows of an embedding table, float32."""
        g, name = self.g, f"encoder.embeddings.{table}.table"
        if self.bundle.precision == Precision.int8:
            rows = g.cast(g.op("Gather", self._weight(name), ids), "float32")
            scale = g.op("Gather", g.constant(self.weights[f"{name}_scale"][:, None], name=f"{name}_scale"), ids)
            return g.op("Mul", rows, scale)
        return self._to_float(g.op("Gather", self._weight(name, self.dtype), ids))

    def _norm(self, x: str, name: str) -> str:
        return self._to_compute(self._layer_or_rms_norm(self._to_float(x), name))

    def _layer_or_rms_norm(self, x: str, name: str) -> str:
        """LayerNorm or RMSNorm over the last axis, float32 → float32."""
        g, c = self.g, self.config
        scale_D = self._weight(f"{name}.scale")
        if c.norm == "layer":
            biases = [self._weight(f"{name}.bias")] if c.biases else []
            return g.op("LayerNormalization", x, scale_D, *biases, axis=-1, epsilon=c.norm_eps)
        return g.op("Mul", g.op("Div", x, self._root_mean_square(x, c.norm_eps)), scale_D)

    def _root_mean_square(self, x: str, eps: float) -> str:
        g = self.g
        square = g.op("Pow", x, g.constant(2, "float32"))
        mean = g.op("ReduceMean", square, g.constant([-1], "int64"), keepdims=1)
        return g.op("Sqrt", g.op("Add", mean, g.constant(eps, "float32")))

    def _layer(self, x_ND: str, tokens: _Tokens, i: int) -> tuple[str, _Tokens]:
        """One layer, as in `layers.EncoderLayer`."""
        g, c, name = self.g, self.config, f"encoder.layer_{i}"
        normed_ND = self._norm(x_ND, f"{name}.attention_norm") if c.pre_norm and i else x_ND
        x_ND = g.op("Add", x_ND, self._attention(normed_ND, tokens, i))
        if not c.pre_norm:
            x_ND = self._norm(x_ND, f"{name}.attention_norm")
        if self.focus.units[i] < (self.focus.units[i - 1] if i else UNITS):
            x_ND, tokens = self._gather(x_ND, tokens, i)
        if c.pre_norm:
            normed_ND = self._norm(x_ND, f"{name}.feed_forward_norm")
            return g.op("Add", x_ND, self._feed_forward(normed_ND, f"{name}.feed_forward")), tokens
        x_ND = g.op("Add", x_ND, self._feed_forward(x_ND, f"{name}.feed_forward"))
        return self._norm(x_ND, f"{name}.feed_forward_norm"), tokens

    def _attention(self, x_ND: str, tokens: _Tokens, i: int) -> str:
        g, c, name = self.g, self.config, f"encoder.layer_{i}.attention"
        qkv_NE = self._dense(x_ND, f"{name}.qkv", scale_first=c.head_dim**-0.5)
        parts = g.ops("Split", qkv_NE, names=(None, None, None), axis=-1, num_outputs=3)
        query, key, value = (
            g.op("Transpose", self._by_text(part, c.num_heads, c.head_dim), perm=(0, 2, 1, 3)) for part in parts
        )
        if c.rope_base is not None:
            base = c.local_rope_base if c.is_local(i) else c.rope_base
            cos, sin = self._angles(tokens.positions_BK, base)
            query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)
        scores_BHST = self._to_float(g.op("MatMul", query, g.op("Transpose", key, perm=(0, 1, 3, 2))))
        scores_BHST = g.op("Add", scores_BHST, tokens.bias_B11K)
        if c.is_local(i):
            scores_BHST = g.op(
                "Where", self._beyond(tokens.positions_BK), g.constant(MASKED_SCORE, "float32"), scores_BHST
            )
        weights_BHST = self._to_compute(g.op("Softmax", scores_BHST, axis=-1))
        mixed_BSHK = g.op("Transpose", g.op("MatMul", weights_BHST, value), perm=(0, 2, 1, 3))
        return self._dense(g.reshape(mixed_BSHK, -1, c.d_model), f"{name}.out")

    def _positions(self, positions_BK: str | None) -> str:
        """Positions of the tokens in their text, float32 (1 or B, K)."""
        g = self.g
        if positions_BK is not None:
            return g.cast(positions_BK, "float32")
        places_S = g.op("Range", g.constant(0, "int64"), g.op("Squeeze", self.length), g.constant(1, "int64"))
        return g.unsqueeze(g.cast(places_S, "float32"), 0)

    def _angles(self, positions_BK: str | None, base: float) -> tuple[str, str]:
        """Cosine and sine of the angles in `layers.rotate`, each float32 (1 or B, 1, K, head width / 2)."""
        g, half = self.g, self.config.head_dim // 2
        frequencies = np.float32(base) ** (-np.arange(half, dtype=np.float32) / half)
        places_BK1 = g.unsqueeze(self._positions(positions_BK), 2)
        angles_B1KK = g.unsqueeze(g.op("Mul", places_BK1, g.constant(frequencies)), 1)
        return g.op("Cos", angles_B1KK), g.op("Sin", angles_B1KK)

    def _rotate(self, x_BHSK: str, cos: str, sin: str) -> str:
        g = self.g
        first, second = g.ops("Split", self._to_float(x_BHSK), names=(None, None), axis=-1, num_outputs=2)
        turned = (
            g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin)),
            g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin)),
        )
        return self._to_compute(g.concat(*turned, axis=-1))

    def _beyond(self, positions_BK: str | None) -> str:
        """Whether a key lies outside of a query's window, bool (1 or B, 1, K, K)."""
        g, places = self.g, self._positions(positions_BK)
        distance = g.op("Abs", g.op("Sub", g.unsqueeze(places, 2), g.unsqueeze(places, 1)))
        return g.unsqueeze(g.op("Greater", distance, g.constant(self.config.local_window, "float32")), 1)

    def _feed_forward(self, x_ND: str, name: str) -> str:
        g, c = self.g, self.config
        hidden_NF = self._to_float(self._dense(x_ND, f"{name}.up"))
        if c.activation == "gelu":
            hidden_NF = g.op("Gelu", hidden_NF)
        else:
            gate_NF, value_NF = g.ops("Split", hidden_NF, names=(None, None), axis=-1, num_outputs=2)
            silu = c.activation == "swiglu"
            gate_NF = g.op("Mul", gate_NF, g.op("Sigmoid", gate_NF)) if silu else g.op("Gelu", gate_NF)
            hidden_NF = g.op("Mul", gate_NF, value_NF)
        return self._dense(self._to_compute(hidden_NF), f"{name}.down")

    def _dense(self, x_ND: str, name: str, scale_first: float = 1.0) -> str:
        """A linear layer, float or INT8.

        `scale_first` multiplies the first third of the outputs. It folds attention's 1 / √(head width) into the query's
        weights or scales, where it costs nothing.
        """
        g = self.g
        kernel_DF = self.weights[f"{name}.kernel"]
        factor_F = np.ones(kernel_DF.shape[1], np.float32)
        if scale_first != 1.0:
            factor_F[: len(factor_F) // 3] = scale_first
        if kernel_DF.dtype != np.int8:
            y_NF = g.op("MatMul", x_ND, g.constant(kernel_DF * factor_F, self.dtype, f"{name}.kernel"))
        else:
            scale_F = g.constant(self.weights[f"{name}.kernel_scale"] * factor_F, name=f"{name}.kernel_scale")
            if self.compressed:
                kernel = g.op("DequantizeLinear", self._weight(f"{name}.kernel"), scale_F, axis=1)
                y_NF = g.op("MatMul", x_ND, kernel)
            else:
                y_NF = self._int8_product(x_ND, self._weight(f"{name}.kernel"), scale_F)
        if not self.config.biases:
            return y_NF
        return g.op("Add", y_NF, g.constant(self.weights[f"{name}.bias"] * factor_F, self.dtype, f"{name}.bias"))

    def _int8_product(self, x_ND: str, kernel_DF: str, scale_F: str) -> str:
        """A product by MatMulInteger, with activations quantised by one scale per token from its largest magnitude.

        ONNX Runtime fuses the product with the scales of its outputs only if a scalar that is not a constant multiplies
        them: hence `self.one`, which is always 1.
        """
        g = self.g
        last = g.constant([-1], "int64")
        high, low = (g.op(kind, x_ND, last, keepdims=1) for kind in ("ReduceMax", "ReduceMin"))
        # The lower bound makes a token of zeros, which no text has, give zeros instead of NaN.
        largest_N1 = g.op("Max", high, g.op("Neg", low), g.constant(SMALLEST_BOUND, "float32"))
        scale_N1 = g.op("Mul", largest_N1, g.constant(1 / INT8_BOUND, "float32"))
        scale_N = g.reshape(scale_N1, -1)
        zero = g.constant(INT8_ZERO, "uint8")
        zero_N = g.op("Expand", zero, g.op("Shape", scale_N))
        x_ND = g.op("QuantizeLinear", x_ND, scale_N, zero_N, axis=0)
        sums_NF = g.cast(g.op("MatMulInteger", x_ND, kernel_DF, zero), "float32")
        return g.op("Mul", g.op("Mul", sums_NF, g.op("Mul", self.one, scale_F)), scale_N1)

    def _gather(self, x_ND: str, tokens: _Tokens, i: int) -> tuple[str, _Tokens]:
        """The highest-scored tokens of each row, as in `focus.gather`; both resolve ties to the earlier token."""
        g, units, x_BSD = self.g, self.focus.units[i], self._by_text(x_ND)
        columns = g.dimension(x_BSD, 1)
        scores_BS = self._gate(x_BSD, tokens, i)
        kept_B1, width = self._kept_length(self.lengths_B1, units), self._kept_length(self.length, units)
        _, best_BK = g.ops("TopK", scores_BS, width, names=(None, None), axis=1)
        ranks_K = g.op("Range", g.constant(0, "int64"), g.op("Squeeze", width), g.constant(1, "int64"))
        mine_BK = g.op("Less", ranks_K, kept_B1)
        best_BK = g.op("Where", mine_BK, best_BK, g.op("Sub", columns, g.constant([1], "int64")))
        places_BK, _ = g.ops("TopK", best_BK, width, names=(None, None), axis=1, largest=0)  # ascending
        x_BKD = g.op("GatherND", x_BSD, g.unsqueeze(places_BK, 2), batch_dims=1)
        positions_BK = places_BK
        if tokens.positions_BK is not None:
            positions_BK = g.op("GatherElements", tokens.positions_BK, places_BK, axis=1)
        weights_BK = g.cast(mine_BK, "float32")
        return g.reshape(x_BKD, -1, self.config.d_model), _Tokens(weights_BK, self._bias(weights_BK), positions_BK)

    def _gate(self, x_BSD: str, tokens: _Tokens, i: int) -> str:
        """The scores of tokens (B, S), as in `layers.Gate` and `focus.token_scores`."""
        g, x_BSD = self.g, self._to_float(x_BSD)
        direction_D1 = self.weights[f"encoder.layer_{i}.gate.direction"][:, None] * self.config.d_model**0.5
        normed_BSD = g.op("Div", x_BSD, self._root_mean_square(x_BSD, GATE_EPS))
        direction = g.constant(direction_D1, "float32", f"encoder.layer_{i}.gate.direction")
        gate_BS = g.op("Squeeze", g.op("MatMul", normed_BSD, direction), g.constant([2], "int64"))
        left_B1 = g.op("ReduceSum", tokens.weights_BK, g.constant([1], "int64"), keepdims=1)
        last_B1 = g.op("Sub", g.cast(left_B1, "int64"), g.constant(1, "int64"))
        columns = g.op("Squeeze", g.dimension(x_BSD, 1))
        place_S = g.op("Range", g.constant(0, "int64"), columns, g.constant(1, "int64"))
        special_BS = g.op("Or", g.op("Equal", place_S, g.constant(0, "int64")), g.op("Equal", place_S, last_B1))
        scores_BS = g.op("Where", special_BS, g.constant(SURE, "float32"), gate_BS)
        return g.op("Where", g.op("Greater", place_S, last_B1), g.constant(-SURE, "float32"), scores_BS)

    def _kept_length(self, length: str, units: int) -> str:
        """`focus.kept_length` on an int64 tensor."""
        g = self.g
        raised = g.op("Add", g.op("Mul", length, g.constant(units, "int64")), g.constant(UNITS - 1, "int64"))
        share = g.op("Div", raised, g.constant(UNITS, "int64"))
        return g.op("Min", length, g.op("Max", share, g.constant(MIN_KEPT, "int64")))

    def _head(self, x_ND: str, tokens: _Tokens) -> None:
        g, x_BKD = self.g, self._by_text(self._to_float(x_ND))
        sum_BD = g.op("Squeeze", g.op("MatMul", g.unsqueeze(tokens.weights_BK, 1), x_BKD), g.constant([1], "int64"))
        count_B1 = g.op("ReduceSum", tokens.weights_BK, g.constant([1], "int64"), keepdims=1)
        pooled_BD = g.op("Div", sum_BD, g.op("Max", count_B1, g.constant(1, "float32")))
        product_BL = g.op("MatMul", pooled_BD, self._weight("head.kernel"))
        logits_BL = g.op("Add", product_BL, self._weight("head.bias"), name="logits")
        parts = []
        for task in self.bundle.taxonomy.tasks:
            g.scope(f"task_{len(parts)}")
            place = self.bundle.taxonomy.slice_of(task.name)
            temperature = g.constant(self.bundle.calibration[task.name].temperature, "float32")
            scaled_BL = g.op("Div", g.slice(logits_BL, place.start, place.stop, 1), temperature)
            parts.append(self._probabilities(task, scaled_BL))
        g.op("Concat", *parts, name="probabilities", axis=1)

    def _probabilities(self, task: Task, scaled_BL: str) -> str:
        """The probabilities of one task, as in `decoding.traced_probabilities`."""
        g = self.g
        if task.kind is TaskKind.MULTILABEL:
            return g.op("Sigmoid", scaled_BL)
        if task.kind is not TaskKind.HIERARCHICAL:
            return g.op("Softmax", scaled_BL, axis=1)
        tree, one = tree_of(task), [0, 0, 0, 1]
        filled_BL = g.op("Pad", scaled_BL, g.constant(one, "int64"), g.constant(MASKED_SCORE, "float32"))
        siblings_BGM = g.op("Softmax", g.op("Gather", filled_BL, g.constant(tree.members_GM), axis=1), axis=-1)
        siblings_BM = g.reshape(siblings_BGM, 0, tree.members_GM.size)
        given_parent_BL = g.op("Gather", siblings_BM, g.constant(tree.place_L), axis=1)
        filled_BL = g.op("Pad", given_parent_BL, g.constant(one, "int64"), g.constant(1, "float32"))
        path_BLP = g.op("Gather", filled_BL, g.constant(tree.path_LP), axis=1)
        return g.op("ReduceProd", path_BLP, g.constant([2], "int64"), keepdims=0)
