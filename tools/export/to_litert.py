"""LiteRT: model.tflite, with one signature a length: `tokens_64` takes `input_ids` (1, 64) and `lengths` (1,) by name.

INT8 stores the bundle's own int8 kernels and uses LiteRT's dynamic-range quantisation, which quantises activations at
run time with one scale per row. The graph quantises activations first and passes them on as whole numbers in float.
Each row ends with two more values, 127.5 and -127.5, which meet zeros in the kernel. XNNPACK, which runs these models
on CPUs, derives its step from a row's smallest and largest value: the step is then 1, and its int8 values are ours.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from jax import lax
from jax.experimental import jax2tf

from classer.model.precision import Precision
from classer.model.quantize import INT8_MAX

from .basic import in_basic_operators
from .folder import Export
from .formats import Request
from .runtime import Runtime, TokenRuntime
from .to_stablehlo import forward

tf: Any = tensorflow  # its stubs do not know what `tf.function` makes

MODEL = "model.tflite"
ROW_ENDS = (INT8_MAX + 0.5, -INT8_MAX - 0.5)


def signature_name(length: int) -> str:
    return f"tokens_{length}"


def write(request: Request, folder: Path) -> None:
    module = _TokenModule(request)
    with tempfile.TemporaryDirectory() as saved:
        tf.saved_model.save(module, saved, signatures=module.programs)
        converter = tf.lite.TFLiteConverter.from_saved_model(saved, signature_keys=list(module.programs))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # it prints every operator
            model = converter.convert()
    (folder / MODEL).write_bytes(_with_int8_kernels(model) if request.precision == Precision.int8 else model)


class _TokenModule(tf.Module):
    """The classifier as TensorFlow functions, one per length, with int8 kernels stored as floats (see `_product`)."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        weights = dict(sorted(request.bundle.weights.items()))  # JAX sorts keys; TensorFlow keeps insertion order
        kernels = {name for name, value in weights.items() if name.endswith(".kernel") and value.dtype == np.int8}
        # Two rows of zeros, for `ROW_ENDS`; only `_product` reads the shape of a kernel.
        padded = {name: np.pad(weights[name].astype(np.float32), ((0, 2), (0, 0))) for name in kernels}
        self.variables_by_name = {
            name: tf.Variable(padded.get(name, value), name=name) for name, value in weights.items()
        }
        shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
        self.programs = {signature_name(length): self._program(request, shapes, length) for length in request.lengths}

    def _program(self, request: Request, shapes: dict[str, jax.ShapeDtypeStruct], length: int) -> Any:
        like = (shapes, jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32))
        more = {"dot_general": _product, "top_k": _top_k, "sort": _sort}
        classify = jax2tf.convert(
            jax.jit(in_basic_operators(forward(request), like=like, more=more)),
            native_serialization_platforms=["cpu"],
            with_gradient=False,
        )
        spec = [tf.TensorSpec([1, length], tf.int32, "input_ids"), tf.TensorSpec([1], tf.int32, "lengths")]

        @tf.function(input_signature=spec, autograph=False)
        def run(input_ids: Any, lengths: Any) -> dict[str, Any]:
            logits, probabilities = classify(self.variables_by_name, input_ids, lengths)
            return {"logits": logits, "probabilities": probabilities}

        return run


def _product(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Any, **_: Any) -> list[jax.Array]:
    """Products in the layout of LiteRT's FULLY_CONNECTED (transposed kernel), the only operator that it quantises.

    Products of int8 activations and kernels become products of whole numbers in float, with `ROW_ENDS` appended to
    each row of activations; see the module's docstring.
    """
    (over_lhs, over_rhs), (batch_lhs, batch_rhs) = dimension_numbers
    if lhs.dtype == jnp.int8:
        ends = jnp.broadcast_to(jnp.asarray(ROW_ENDS, jnp.float32), (lhs.shape[0], 2))
        lhs = jnp.concatenate([lhs.astype(jnp.float32), ends], axis=1)
    if not batch_lhs and rhs.ndim == 2 and tuple(over_rhs) == (0,):
        rhs, over_rhs = rhs.T, (1,)
    return [lax.dot_general(lhs, rhs, ((over_lhs, over_rhs), (batch_lhs, batch_rhs)))]


def _top_k(x: jax.Array, *, k: int, **_: Any) -> list[jax.Array]:
    places = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return [one[..., :k] for one in _sorted(-x, [x, places])]


def _sort(*operands: jax.Array, dimension: int, num_keys: int, **_: Any) -> list[jax.Array]:
    if num_keys != 1 or dimension != operands[0].ndim - 1:
        raise NotImplementedError("LiteRT's sort is by one key, along the last axis.")
    return _sorted(operands[0], operands)


def _sorted(key: jax.Array, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """A stable sort along the last axis without a sort operator, which LiteRT lacks.

    The new index of an entry is the number of entries before it in the order of `key`.
    """
    size = key.shape[-1]
    mine, other = key[..., :, None], key[..., None, :]
    places = jnp.arange(size)
    before = (other < mine) | ((other == mine) & (places[None, :] < places[:, None]))
    goes_to = before.astype(jnp.int32).sum(axis=-1)
    comes_from = goes_to[..., None, :] == places[:, None]
    return [jnp.where(comes_from, one[..., None, :], jnp.zeros((), one.dtype)).sum(axis=-1) for one in operands]


def _with_int8_kernels(model: bytes) -> bytes:
    """Converts the float kernels that hold whole numbers to int8 with a scale of 1."""
    graph: Any = flatbuffer_utils.convert_bytearray_to_object(bytearray(model))
    fully_connected = [
        max(code.builtinCode, code.deprecatedBuiltinCode) == schema.BuiltinOperator.FULLY_CONNECTED
        for code in graph.operatorCodes
    ]
    packed: set[int] = set()  # converted buffers; the programs of all lengths share them
    for subgraph in graph.subgraphs:
        for operator in subgraph.operators:
            tensor = subgraph.tensors[operator.inputs[1]] if fully_connected[operator.opcodeIndex] else None
            if tensor is None or tensor.type != schema.TensorType.FLOAT32:
                continue
            buffer = graph.buffers[tensor.buffer]
            if tensor.buffer not in packed:
                if buffer.data is None:  # not a constant
                    continue
                floats = np.frombuffer(bytes(buffer.data), np.float32)
                if np.abs(floats).max() > INT8_MAX or (floats != np.round(floats)).any():
                    continue
                buffer.data = np.frombuffer(floats.astype(np.int8).tobytes(), np.uint8)
                packed.add(tensor.buffer)
            tensor.type = schema.TensorType.INT8
            tensor.quantization = schema.QuantizationParametersT(scale=[1.0], zeroPoint=[0])
    return bytes(flatbuffer_utils.convert_object_to_bytearray(graph))


def load(export: Export) -> Runtime:
    interpreter = Interpreter(str(export.path / MODEL), num_threads=os.cpu_count())
    programs = {length: interpreter.get_signature_runner(signature_name(length)) for length in export.lengths}

    def run(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        program = programs[tokens_BS.shape[1]]
        rows = [slice(i, i + 1) for i in range(len(tokens_BS))]
        return np.concatenate(
            [program(input_ids=tokens_BS[row], lengths=lengths_B[row])["probabilities"] for row in rows]
        )

    return TokenRuntime.of(export, run)


def usage(request: Request) -> str:
    length = request.lengths[-1]
    return f"""\
import numpy as np
from ai_edge_litert.interpreter import Interpreter
classify = Interpreter("{MODEL}").get_signature_runner("{signature_name(length)}")
tokens, lengths = np.zeros((1, {length}), np.int32), np.full(1, 6, np.int32)  # padded token ids, and how many are real
probabilities = classify(input_ids=tokens, lengths=lengths)["probabilities"]"""
