"""ONNX: model.onnx; the weights of models too large for one file are in model.onnx.data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from classer.model.precision import Precision

from . import graph, onnx_model
from .folder import Export
from .formats import Request
from .runtime import Runtime, TokenRuntime

MODEL = "model.onnx"


def write(request: Request, folder: Path) -> None:
    """Writes the model and checks it with ONNX's own checker.

    Raises:
      onnx.checker.ValidationError: the graph is not valid ONNX.
    """
    activations = Precision.float32 if request.precision == Precision.int8 else request.precision
    model = onnx_model.build_model(request.bundle, activations, request.focus)
    apart = model.ByteSize() > graph.MAX_INLINE_BYTES
    onnx.save_model(model, folder / MODEL, save_as_external_data=apart, location=f"{MODEL}.data" if apart else None)
    onnx.checker.check_model(str(folder / MODEL), full_check=True)


def load(export: Export) -> Runtime:
    if export.precision == Precision.bfloat16:
        # ONNX Runtime supports bfloat16 on accelerators only; OpenVINO runs the same file on any CPU.
        from .to_openvino import run_on_cpu

        return TokenRuntime.of(export, run_on_cpu(export.path / MODEL))
    session = onnxruntime.InferenceSession(str(export.path / MODEL), providers=["CPUExecutionProvider"])

    def run(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        mask_BS = np.arange(tokens_BS.shape[1]) < lengths_B[:, None]
        feeds = {"input_ids": tokens_BS.astype(np.int64), "attention_mask": mask_BS.astype(np.int64)}
        (probabilities_BL,) = session.run(["probabilities"], feeds)
        return np.asarray(probabilities_BL)

    return TokenRuntime.of(export, run)


def usage(request: Request) -> str:
    return f"""\
import numpy as np, onnxruntime, tokenizers
encode = tokenizers.BertWordPieceTokenizer("tokenizer/vocab.txt", lowercase={request.bundle.tokenizer.lowercase})
encode.enable_truncation({request.max_length}); encode.enable_padding(); batch = encode.encode_batch(["a text"])
feeds = {{"input_ids": np.array([e.ids for e in batch]), "attention_mask": np.array([e.attention_mask for e in batch])}}
logits, probabilities = onnxruntime.InferenceSession("{MODEL}").run(None, feeds)"""
