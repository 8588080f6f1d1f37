"""OpenVINO: IR (model.xml and model.bin) made from our ONNX graph.

INT8 stores the bundle's int8 kernels and scales as compressed weights, which OpenVINO's CPU plugin runs with int8
products. The plugin quantises activations at run time, in groups of its own choice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino

from classer.model.precision import Precision

from . import onnx_model
from .folder import Export
from .formats import Request
from .runtime import Run, Runtime, TokenRuntime

MODEL = "model.xml"


def write(request: Request, folder: Path) -> None:
    activations = Precision.float32 if request.precision == Precision.int8 else request.precision
    graph = onnx_model.build_model(request.bundle, activations, request.focus, compressed=True)
    onnx.save_model(graph, folder / "model.onnx")
    openvino.save_model(openvino.Core().read_model(folder / "model.onnx"), folder / MODEL, compress_to_fp16=False)
    (folder / "model.onnx").unlink()


def load(export: Export) -> Runtime:
    return TokenRuntime.of(export, run_on_cpu(export.path / MODEL))


def run_on_cpu(file: Path) -> Run:
    """Compiles an IR or ONNX file for the CPU, without lowering float32 to a half precision."""
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()

    def run(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        mask_BS = np.arange(tokens_BS.shape[1]) < lengths_B[:, None]
        feeds = {"input_ids": tokens_BS.astype(np.int64), "attention_mask": mask_BS.astype(np.int64)}
        return np.array(request.infer(feeds)["probabilities"])

    return run


def usage(request: Request) -> str:
    return f"""\
import numpy as np, openvino, tokenizers
encode = tokenizers.BertWordPieceTokenizer("tokenizer/vocab.txt", lowercase={request.bundle.tokenizer.lowercase})
encode.enable_truncation({request.max_length}); encode.enable_padding(); batch = encode.encode_batch(["a text"])
feeds = {{"input_ids": np.array([e.ids for e in batch]), "attention_mask": np.array([e.attention_mask for e in batch])}}
probabilities = openvino.Core().compile_model("{MODEL}", "CPU")(feeds)["probabilities"]"""
