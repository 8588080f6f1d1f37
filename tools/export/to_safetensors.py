"""safetensors in Hugging Face's layout for BERT and ModernBERT encoders; other encoders in Classer's own layout.

The head is in a file of its own, head.safetensors: Hugging Face's classifiers have no head with mean pooling.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from classer.model.classifier import mean_pool
from classer.model.config import EncoderConfig
from classer.model.precision import Precision
from classer.model.predict import Predictor
from classer.model.pretrained import load_encoder, save_encoder
from classer.model.quantize import Weights

from .decoding import traced_probabilities
from .folder import Export
from .formats import Request, check_installed
from .runtime import Run, Runtime, TokenRuntime

MODEL, HEAD = "model.safetensors", "head.safetensors"


def family(config: EncoderConfig) -> str:
    """The model_type of the encoder in `transformers`: "bert" or "modernbert"; "classer" if neither fits."""
    shape = (config.norm, config.pre_norm, config.biases, config.activation, config.rope_base is not None)
    if shape == ("layer", False, True, "gelu", False) and config.num_segments:
        return "bert"
    if shape == ("layer", True, False, "geglu", True) and not config.num_segments and config.local_window:
        return "modernbert"
    return "classer"


def write(request: Request, folder: Path) -> None:
    bundle = request.bundle
    config, weights = bundle.encoder, bundle.weights
    kind = family(config)
    if kind == "classer":
        save_encoder(folder, config, weights)
        (folder / "CONFIG.md").write_text(_config_page(config), encoding="utf-8")
    else:
        raw, theirs = (_bert if kind == "bert" else _modernbert)(config, weights)
        raw |= {"model_type": kind, "dtype": "float32", "pad_token_id": bundle.tokenizer.pad_id}
        (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
        whole = {name: np.ascontiguousarray(value) for name, value in theirs.items()}
        save_file(whole, folder / MODEL, metadata={"format": "pt"})
    bundle.tokenizer.save(folder)
    settings = {"do_lower_case": bundle.tokenizer.lowercase, "model_max_length": bundle.max_length}
    settings |= {"tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
    head = {"weight": np.ascontiguousarray(weights["head.kernel"].T), "bias": weights["head.bias"]}
    save_file(head, folder / HEAD)


def load(export: Export) -> Runtime:
    raw = json.loads((export.path / "config.json").read_text(encoding="utf-8"))
    run = _load_classer(export) if raw["model_type"] == "classer" else _load_transformers(export)
    return TokenRuntime.of(export, run)


def _load_transformers(export: Export) -> Run:
    check_installed(("torch", "transformers"), "transformers")
    import torch
    import transformers

    options = {"add_pooling_layer": False} if _is_bert(export.path) else {}
    model = transformers.AutoModel.from_pretrained(export.path, attn_implementation="eager", **options).eval()
    head = load_file(export.path / HEAD)

    def run(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        mask_BS = np.arange(tokens_BS.shape[1]) < lengths_B[:, None]
        with torch.inference_mode():
            hidden_BSD = model(torch.tensor(tokens_BS), attention_mask=torch.tensor(mask_BS)).last_hidden_state
        pooled_BD = np.asarray(mean_pool(hidden_BSD.numpy(), mask_BS.astype(np.float32)))
        logits_BL = pooled_BD @ head["weight"].T + head["bias"]
        return np.asarray(traced_probabilities(export.taxonomy, export.calibration, logits_BL))

    return run


def _load_classer(export: Export) -> Run:
    config, weights = load_encoder(export.path)
    head = load_file(export.path / HEAD)
    whole = {**weights, "head.kernel": np.ascontiguousarray(head["weight"].T), "head.bias": head["bias"]}
    predictor = Predictor(config, export.taxonomy.num_labels, whole, Precision.float32)

    def run(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        logits_BL = predictor.compile(*tokens_BS.shape)(tokens_BS, lengths_B)
        return np.asarray(traced_probabilities(export.taxonomy, export.calibration, logits_BL))

    return run


def usage(request: Request) -> str:
    kind = family(request.bundle.encoder)
    if kind == "classer":
        return f"""\
from pathlib import Path; from safetensors.numpy import load_file; from classer.model.pretrained import load_encoder
config, weights = load_encoder(Path("."))  # CONFIG.md says what each field of the config means
head = load_file("{HEAD}")  # logits = the mean of the last layer's vectors over the real tokens @ weight.T + bias"""
    options = ", add_pooling_layer=False" if kind == "bert" else ""
    return f"""\
from safetensors.torch import load_file; from transformers import AutoModel, AutoTokenizer
head = load_file("{HEAD}"); batch = AutoTokenizer.from_pretrained(".")(["a text"], return_tensors="pt")
hidden = AutoModel.from_pretrained("."{options}).eval()(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]; pooled = (hidden * mask).sum(1) / mask.sum(1)
logits = pooled @ head["weight"].T + head["bias"]"""


def _is_bert(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "bert"


def _bert(config: EncoderConfig, ours: Weights) -> tuple[dict[str, Any], Weights]:
    """Hugging Face's config.json and weights of a BERT; the inverse of `pretrained._rename_bert`."""
    raw = {
        "architectures": ["BertModel"],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_segments,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
    }
    theirs: Weights = {}

    def norm(name: str, theirs_name: str) -> None:
        theirs[f"{theirs_name}.LayerNorm.weight"] = ours[f"encoder.{name}.scale"]
        theirs[f"{theirs_name}.LayerNorm.bias"] = ours[f"encoder.{name}.bias"]

    def dense(name: str, theirs_names: list[str]) -> None:
        kernels = np.split(ours[f"encoder.{name}.kernel"], len(theirs_names), axis=1)
        biases = np.split(ours[f"encoder.{name}.bias"], len(theirs_names))
        for theirs_name, kernel, bias in zip(theirs_names, kernels, biases, strict=True):
            theirs[f"{theirs_name}.weight"], theirs[f"{theirs_name}.bias"] = kernel.T, bias

    for name, theirs_name in (("token", "word"), ("position", "position"), ("segment", "token_type")):
        theirs[f"embeddings.{theirs_name}_embeddings.weight"] = ours[f"encoder.embeddings.{name}.table"]
    norm("embeddings.norm", "embeddings")
    for i in range(config.num_layers):
        layer, attention = f"encoder.layer.{i}", f"encoder.layer.{i}.attention"
        dense(f"layer_{i}.attention.qkv", [f"{attention}.self.{part}" for part in ("query", "key", "value")])
        dense(f"layer_{i}.attention.out", [f"{attention}.output.dense"])
        norm(f"layer_{i}.attention_norm", f"{attention}.output")
        dense(f"layer_{i}.feed_forward.up", [f"{layer}.intermediate.dense"])
        dense(f"layer_{i}.feed_forward.down", [f"{layer}.output.dense"])
        norm(f"layer_{i}.feed_forward_norm", f"{layer}.output")
    return raw, theirs


def _modernbert(config: EncoderConfig, ours: Weights) -> tuple[dict[str, Any], Weights]:
    """Hugging Face's config.json and weights of a ModernBERT; the inverse of `pretrained._rename_modernbert`."""
    raw = {
        "architectures": ["ModernBertModel"],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_positions,
        "norm_eps": config.norm_eps,
        "hidden_activation": "gelu",
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "local_attention": 2 * config.local_window,
        "global_rope_theta": config.rope_base,
        "local_rope_theta": config.local_rope_base,
        "global_attn_every_n_layers": config.global_every,
    }
    theirs = {
        "embeddings.tok_embeddings.weight": ours["encoder.embeddings.token.table"],
        "embeddings.norm.weight": ours["encoder.embeddings.norm.scale"],
        "final_norm.weight": ours["encoder.final_norm.scale"],
    }
    for i in range(config.num_layers):
        layer, name = f"layers.{i}", f"encoder.layer_{i}"
        theirs[f"{layer}.attn.Wqkv.weight"] = ours[f"{name}.attention.qkv.kernel"].T
        theirs[f"{layer}.attn.Wo.weight"] = ours[f"{name}.attention.out.kernel"].T
        theirs[f"{layer}.mlp.Wi.weight"] = ours[f"{name}.feed_forward.up.kernel"].T
        theirs[f"{layer}.mlp.Wo.weight"] = ours[f"{name}.feed_forward.down.kernel"].T
        theirs[f"{layer}.mlp_norm.weight"] = ours[f"{name}.feed_forward_norm.scale"]
        if i:
            theirs[f"{layer}.attn_norm.weight"] = ours[f"{name}.attention_norm.scale"]
    return raw, theirs


def _config_page(config: EncoderConfig) -> str:
    """CONFIG.md: the meaning of each field of the native config, with this encoder's values."""
    values = "\n".join(f"- `{field.name}`: {getattr(config, field.name)}" for field in dataclasses.fields(config))
    return f"# The encoder's config\n\n{inspect.getdoc(EncoderConfig)}\n\n## This encoder\n\n{values}\n"
