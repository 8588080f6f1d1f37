"""StableHLO through `jax.export`: programs with a dynamic batch for CPU, CUDA and TPU, and a file of weights.

Without a focus, one program takes any length. With a focus, the number of tokens that a layer keeps depends on the
length, so that lengths are static, with one program each. jax.export guarantees that a program can be read for six
months.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from safetensors.numpy import load_file, save_file

from classer.model.classifier import TextClassifier
from classer.model.precision import Precision
from classer.model.quantize import Weights, unflatten

from .decoding import traced_probabilities
from .folder import Export
from .formats import Request
from .runtime import Runtime, TokenRuntime

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = "weights.safetensors"


def program_name(length: int | None) -> str:
    return "program.stablehlo" if length is None else f"program-{length}.stablehlo"


def forward(request: Request) -> Any:
    """The function to export: (weights by name, tokens_BS, lengths_B) → logits_BL and probabilities_BL, float32."""
    bundle = request.bundle
    dtype = jnp.dtype(Precision.float32 if request.precision == Precision.int8 else request.precision)
    model = TextClassifier(bundle.encoder, bundle.taxonomy.num_labels, dtype, bundle.precision, focus=request.focus)

    def classify(weights: Weights, tokens_BS: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BL = cast(jax.Array, model.apply({"params": unflatten(weights)}, tokens_BS, lengths_B))
        return logits_BL, traced_probabilities(bundle.taxonomy, bundle.calibration, logits_BL)

    return classify


def write(request: Request, folder: Path) -> None:
    weights = {name: np.ascontiguousarray(value) for name, value in request.bundle.weights.items()}
    save_file(weights, folder / WEIGHTS)
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
    for length in request.lengths or (None,):
        B, S = jax_export.symbolic_shape(f"batch, {'length' if length is None else length}")
        arguments = (shapes, jax.ShapeDtypeStruct((B, S), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32))
        exported = jax_export.export(jax.jit(forward(request)), platforms=PLATFORMS)(*arguments)
        (folder / program_name(length)).write_bytes(exported.serialize())


def load(export: Export) -> Runtime:
    weights = jax.device_put(load_file(export.path / WEIGHTS))
    programs = {
        length: jax.jit(jax_export.deserialize(bytearray((export.path / program_name(length)).read_bytes())).call)
        for length in export.lengths or (None,)
    }

    def run(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        program = programs[tokens_BS.shape[1] if export.lengths else None]
        return np.asarray(program(weights, tokens_BS, lengths_B)[1])

    return TokenRuntime.of(export, run)


def usage(request: Request) -> str:
    name = program_name(request.lengths[-1] if request.lengths else None)
    length = request.lengths[-1] if request.lengths else 6
    return f"""\
import jax, numpy as np; from jax import export; from safetensors.numpy import load_file
program = export.deserialize(bytearray(open("{name}", "rb").read()))
weights = load_file("{WEIGHTS}")
tokens, lengths = np.zeros((1, {length}), np.int32), np.full(1, 6, np.int32)  # padded token ids, and how many are real
logits, probabilities = jax.jit(program.call)(weights, tokens, lengths)"""
