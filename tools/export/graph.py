"""A builder of ONNX graphs: names, constants and operators. It is independent of classifiers.

Operators are those of the default ONNX domain at `OPSET`, so that any conforming runtime runs the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# LayerNormalization needs opset 17, Gelu opset 20; runtimes from 2024 on support both. Opset 20 needs at least IR 9.
OPSET = 20
IR_VERSION = 9
# A protobuf message is limited to 2 GB; models above this limit keep their weights in a separate file.
MAX_INLINE_BYTES = 1 << 30

ELEMENT_TYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


class Graph:
    """A graph under construction. Values are identified by their names, which `op` and `constant` return."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._small: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._scope = ""
        self._count = 0

    def scope(self, name: str) -> None:
        """Sets the prefix of the following operators' names, usually the layer; "" for none."""
        self._scope = f"{name}/" if name else ""

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Adds an operator with one output and returns the output's name: `name`, or a generated one."""
        return self.ops(kind, *inputs, names=(name,), **attributes)[0]

    def ops(self, kind: str, *inputs: str, names: Sequence[str | None], **attributes: Any) -> list[str]:
        """Adds an operator with one output for each of `names` and returns the outputs' names; None generates one."""
        self._count += 1
        node_name = f"{self._scope}{kind}_{self._count}"
        outputs = [name or f"{node_name}:{i}" for i, name in enumerate(names)]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=node_name, **attributes))
        return outputs

    def constant(self, value: Any, dtype: str | None = None, name: str | None = None) -> str:
        """Adds a constant and returns its name; equal constants without a name are stored once."""
        array = np.asarray(value)
        if dtype is not None:
            array = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        if name is None:
            key = (array.dtype.name, array.shape, array.tobytes())
            name = self._small.setdefault(key, f"constant_{len(self._small)}")
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def cast(self, x: str, dtype: str) -> str:
        return self.op("Cast", x, to=ELEMENT_TYPES[dtype])

    def dimension(self, x: str, axis: int) -> str:
        """The size of one axis, int64 (1,)."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def concat(self, *parts: str, axis: int = 0) -> str:
        return self.op("Concat", *parts, axis=axis)

    def reshape(self, x: str, *shape: int | str) -> str:
        """Reshapes `x`. Sizes are numbers as in `Reshape` (0 keeps an axis, -1 is inferred) or names of int64 (1,)."""
        if all(isinstance(size, int) for size in shape):
            return self.op("Reshape", x, self.constant(shape, "int64"))
        parts = [self.constant([size], "int64") if isinstance(size, int) else size for size in shape]
        return self.op("Reshape", x, self.concat(*parts))

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        return self.op("Slice", x, *(self.constant([value], "int64") for value in (start, end, axis)))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.constant(axes, "int64"))

    def model(
        self,
        inputs: dict[str, tuple[str, Sequence[int | str]]],
        outputs: dict[str, tuple[str, Sequence[int | str]]],
        metadata: dict[str, str],
    ) -> onnx.ModelProto:
        """The finished model.

        Args:
          inputs, outputs: name → element type and shape; a string in a shape names a dynamic dimension.
          metadata: the model's metadata properties.
        """
        given, made = (
            [
                helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape)
                for name, (dtype, shape) in values.items()
            ]
            for values in (inputs, outputs)
        )
        graph = helper.make_graph(self._nodes, "classifier", given, made, list(self._initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="classer")
        helper.set_model_props(model, metadata)
        # With the shapes stored in the file, runtimes see which tensors have equal shapes, and fuse more operators.
        return onnx.shape_inference.infer_shapes(model) if model.ByteSize() <= MAX_INLINE_BYTES else model
