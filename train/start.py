"""Initial weights: a pretrained encoder, a native size with random weights, or trained classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.errors import InputError
from ..data.taxonomy import Taxonomy
from ..data.tokenizer import WordPieceTokenizer
from ..model.bundle import MANIFEST, load_bundle
from ..model.config import NATIVE_SIZES, EncoderConfig, native
from ..model.precision import Precision
from ..model.pretrained import MINILM, fetch_encoder, load_encoder
from ..model.quantize import Weights


class Start(NamedTuple):
    """Initial weights, with the encoder's config and tokenizer.

    Attributes:
      encoder: the encoder's config.
      weights: by name: the encoder's, and of a bundle the head's; none to begin with random ones.
      tokenizer: text → ids.
      licences: files to keep beside the weights.
      taxonomy: whose labels the head gives; None without a head.
    """

    encoder: EncoderConfig
    weights: Weights
    tokenizer: WordPieceTokenizer
    licences: tuple[Path, ...]
    taxonomy: Taxonomy | None


def choose_start(name: str) -> Start:
    """Loads a recipe's `encoder`: a bundle, several with commas between, a native size, or a pretrained encoder.

    Raises:
      InputError: as `fetch_encoder`, `load_encoder` and `load_bundle`; an INT8 bundle, which cannot be trained; bundles
        that have no mean; an encoder with fewer tokens than its vocabulary.
    """
    local = Path(name)
    if "," in name and not local.exists():
        names = [one.strip() for one in name.split(",")]
        if not all(names):
            raise InputError(f"The encoder '{name}' has a comma with nothing on one side; name a bundle on each.")
        return _mean(names, [choose_start(one) for one in names])
    if (local / MANIFEST).is_file():
        bundle = load_bundle(local)
        if bundle.precision != Precision.float32:
            raise InputError(f"{local} is an INT8 bundle, which cannot be trained; name the float32 one beside it.")
        return Start(bundle.encoder, bundle.weights, bundle.tokenizer, bundle.licences, bundle.taxonomy)
    if name in NATIVE_SIZES and not local.is_dir():
        folder = fetch_encoder(MINILM)
        tokenizer = WordPieceTokenizer.from_folder(folder)
        encoder, weights = native(name, vocab_size=tokenizer.vocab_size), {}
    else:
        folder = fetch_encoder(name)
        encoder, weights = load_encoder(folder)
        tokenizer = WordPieceTokenizer.from_folder(folder)
    if tokenizer.vocab_size > encoder.vocab_size:
        raise InputError(
            f"{folder}: vocab.txt has {tokenizer.vocab_size:,} tokens, but the encoder only {encoder.vocab_size:,}; "
            "they do not belong together."
        )
    licences = tuple(folder / file for file in ("LICENSE", "NOTICE") if (folder / file).is_file())
    return Start(encoder, weights, tokenizer, licences, None)


def _mean(names: Sequence[str], starts: Sequence[Start]) -> Start:
    """The mean of trained classifiers' weights, which is often better than each where all began with one encoder.

    See Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482, §3: this is their uniform soup.
    """
    first = starts[0]
    for name, start in zip(names, starts, strict=True):
        if start.taxonomy is None or first.taxonomy is None:
            raise InputError(f"{name} is no bundle; only trained classifiers have a mean.")
        for what, own, of_first in (
            ("a different encoder", start.encoder, first.encoder),
            ("other tasks or labels", start.taxonomy.to_json(), first.taxonomy.to_json()),
            ("another vocabulary", start.tokenizer.vocab, first.tokenizer.vocab),
        ):
            if own != of_first:
                raise InputError(f"{name} has no mean with {names[0]}: it has {what}.")
    weights = {
        key: np.mean([start.weights[key] for start in starts], axis=0, dtype=np.float64).astype(value.dtype)
        for key, value in first.weights.items()
    }
    return first._replace(weights=weights)
