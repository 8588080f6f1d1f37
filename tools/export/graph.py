"""Building an ONNX graph node by node: names, constants and operators, nothing about classifiers.

Operators are those of the default ONNX domain at `OPSET`, so that any conforming runtime runs the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# LayerNormalization came with 17, Gelu with 20; runtimes of 2024 know both. IR 9 is the oldest that may hold it.
OPSET = 20
IR_VERSION = 9
# A protobuf message ends at 2 GB; beyond this, weights stand in a file of their own.
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
    """A graph under construction. Values are known by their names, which `op` and `constant` hand out."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._small: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._scope = ""
        self._count = 0

    def scope(self, name: str) -> None:
        """What the names of the operators that follow begin with: the layer they belong to."""
        self._scope = f"{name}/" if name else ""

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Adds an operator of one output and returns the output's name (`name`, or one of its own)."""
        return self.ops(kind, *inputs, names=(name,), **attributes)[0]

    def ops(self, kind: str, *inputs: str, names: Sequence[str | None], **attributes: Any) -> list[str]:
        """Adds an operator of several outputs, as many as there are `names`; None for a name of its own."""
        self._count += 1
        node_name = f"{self._scope}{kind}_{self._count}"
        outputs = [name or f"{node_name}:{i}" for i, name in enumerate(names)]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=node_name, **attributes))
        return outputs

    def constant(self, value: Any, dtype: str | None = None, name: str | None = None) -> str:
        """Adds a constant, once for all uses of the same one where it has no name."""
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
        """Reshapes; numbers as `Reshape` takes them (0 keeps an axis, -1 is what is left), names are int64 (1,)."""
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
          inputs, outputs: name → element type and shape; a name in a shape is a dimension that may vary.
          metadata: what the model says of itself.
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
        # With the shapes named in the file, runtimes see which tensors are alike, and fuse more.
        return onnx.shape_inference.infer_shapes(model) if model.ByteSize() <= MAX_INLINE_BYTES else model
