"""The formats that a bundle can be exported to, by name. Their modules and runtimes are imported on first use."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from types import ModuleType

from classer.data.errors import InputError
from classer.data.extras import missing_packages
from classer.model.bundle import Bundle
from classer.model.focus import Focus
from classer.model.precision import Precision


@dataclasses.dataclass(frozen=True)
class Request:
    """The content of an export, independent of its format.

    Attributes:
      bundle: the bundle to export.
      precision: float32, float16, bfloat16 or int8.
      focus: the share of tokens that each layer keeps.
      max_length: maximum tokens of a text; longer texts are truncated.
      lengths: the sequence lengths to write programs for; empty if the length is dynamic.
    """

    bundle: Bundle
    precision: Precision
    focus: Focus
    max_length: int
    lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Format:
    """An export format. Its module has `write(request, folder)`, `load(export) -> Runtime` and `usage(request) -> str`.

    Attributes:
      module: the module's name in this package.
      precisions: supported precisions, the default for a float32 bundle first; int8 is for INT8 bundles.
      needs: packages required to write and verify the format.
      extra: the extra of Classer that installs these packages.
      focused: whether the format can express Focused Attention.
      static: whether sequence lengths are static: always (`True`), with a focus only (`"focused"`), or never (`False`).
      guaranteed_days: days for which the format's maintainer guarantees that a file can be read; None without a
        guarantee.
      weights_only: INT8 applies to the weights only; the runtime decides whether and how activations are quantised.
    """

    module: str
    precisions: tuple[Precision, ...]
    needs: tuple[str, ...]
    extra: str
    focused: bool = True
    static: bool | str = False
    guaranteed_days: int | None = None
    weights_only: bool = False

    def load_module(self) -> ModuleType:
        """Imports the format's module.

        Raises:
          InputError: a required package is not installed.
        """
        check_installed(self.needs, self.extra)
        return importlib.import_module(f"{__package__}.{self.module}")


float32, float16, bfloat16, int8 = Precision
FORMATS: dict[str, Format] = {
    "safetensors": Format("to_safetensors", (float32,), ("torch", "transformers"), extra="transformers", focused=False),
    # https://docs.jax.dev/en/latest/export/export.html, "Compatibility guarantees": six months.
    "stablehlo": Format(
        "to_stablehlo", (float32, bfloat16, int8), (), extra="train", static="focused", guaranteed_days=180
    ),
    "savedmodel": Format(
        "to_savedmodel", (float32, bfloat16, int8), ("tensorflow", "tensorflow_text"), extra="train", static="focused"
    ),
    "onnx": Format("to_onnx", (float32, float16, bfloat16), ("onnx", "onnxruntime", "openvino"), extra="onnx"),
    "onnx-int8": Format("to_onnx", (int8,), ("onnx", "onnxruntime"), extra="onnx"),
    "openvino": Format("to_openvino", (float32, int8), ("onnx", "openvino"), extra="openvino", weights_only=True),
    "litert": Format("to_litert", (float32, int8), ("tensorflow", "ai_edge_litert"), extra="litert", static=True),
}


def check_installed(packages: tuple[str, ...], extra: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise missing_packages("This format", " and ".join(missing), extra)


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise InputError(f"There is no format '{name}'; there are {', '.join(FORMATS)}.")
    return FORMATS[name]
