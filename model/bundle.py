"""Bundles: what is deployed. A directory of safetensors and JSON, checked in full when it is loaded.

bundle.json          format version, precision, the size and SHA-256 of every other file, and a hash over these
encoder.json         the encoder's config
taxonomy.json        tasks and labels, in the order of the logits
calibration.json     temperature and thresholds of each task
golden.json          a few texts and the probabilities that the bundle gave them when it was written
weights.safetensors  parameters by name
tokenizer/           vocab.txt and its settings
README.md            the model card; LICENSE and NOTICE of the pretrained encoder stand beside it
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..data.errors import InputError
from ..data.files import staged_folder
from ..data.taxonomy import Taxonomy
from ..data.tokenizer import WordPieceTokenizer
from .classifier import TextClassifier
from .config import EncoderConfig
from .decode import Calibration, probabilities
from .focus import Focus
from .manifest import FolderKind, read_json, write_json
from .precision import Precision
from .predict import Predictor
from .quantize import Weights, is_quantized, to_int8

logger = logging.getLogger(__name__)

MANIFEST = "bundle.json"
_WEIGHTS = "weights.safetensors"
_KIND = FolderKind(
    noun="bundle",
    format="classer-bundle",
    format_version=2,
    manifest=MANIFEST,
    needed=(
        "encoder.json",
        "taxonomy.json",
        "calibration.json",
        "golden.json",
        _WEIGHTS,
        "tokenizer/vocab.txt",
        "README.md",
    ),
    written_by="`classer train` writes bundles, to OUT/bundle.",
)

# The largest accepted difference of a golden probability: machines differ in the last bits of their arithmetic. INT8
# rounds activations, so that one last bit can move a value by a whole step.
GOLDEN_TOLERANCE: Mapping[Precision, float] = {Precision.float32: 1e-3, Precision.int8: 3e-2}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A trained classifier with everything that inference needs.

    Attributes:
      encoder: the encoder's config.
      taxonomy: tasks and labels, in the order of the logits.
      tokenizer: text → ids.
      weights: named arrays (see `quantize`).
      precision: of the weights, float32 or int8.
      calibration: by task name.
      max_length: tokens that a text is cut to, special tokens included.
      golden_texts: a few texts; their probabilities are stored, and checked at every load.
      card: the model card, Markdown.
      licences: files to keep beside the weights.
      version: a short hash of the content, which the manifest repeats; empty before it is saved.
      path: the folder; None before it is saved.
    """

    encoder: EncoderConfig
    taxonomy: Taxonomy
    tokenizer: WordPieceTokenizer
    weights: Weights
    precision: Precision
    calibration: Mapping[str, Calibration]
    max_length: int
    golden_texts: tuple[str, ...]
    card: str
    licences: tuple[Path, ...] = ()
    version: str = ""
    path: Path | None = None

    def predictor(self, compute_dtype: Precision = Precision.float32, focus: Focus | None = None) -> Predictor:
        """Puts the weights on the default device, ready to compile programs.

        Args:
          compute_dtype: of activations, float32 or bfloat16.
          focus: the share of tokens that each layer keeps; None keeps all.

        Raises:
          InputError: `focus` drops tokens, but the model was not trained for focus.
        """
        return Predictor(self.encoder, self.taxonomy.num_labels, self.weights, self.precision, compute_dtype, focus)

    def probabilities(self, task_name: str, logits_NL: np.ndarray) -> np.ndarray:
        """Calibrated probabilities of one task's labels from logits over the whole taxonomy."""
        task_logits_NL = logits_NL[:, self.taxonomy.slice_of(task_name)]
        return probabilities(self.taxonomy.task(task_name), task_logits_NL, self.calibration[task_name])


def save_bundle(bundle: Bundle, path: Path) -> Bundle:
    """Writes a bundle to a new folder, atomically.

    Args:
      bundle: what to write.
      path: a folder that does not exist yet.

    Returns:
      The bundle with its `version` and `path`.

    Raises:
      InputError: `path` exists.
    """
    if path.exists():
        raise InputError(f"{path} exists already; a bundle is written to a new folder.")
    with staged_folder(path) as staging:
        version = _write_files(bundle, staging)
    return dataclasses.replace(bundle, version=version, path=path)


def _write_files(bundle: Bundle, folder: Path) -> str:
    """Writes all of a bundle's files, the manifest last, and returns its version."""
    save_file({name: np.ascontiguousarray(value) for name, value in bundle.weights.items()}, folder / _WEIGHTS)
    bundle.tokenizer.save(folder / "tokenizer")
    write_json(folder / "encoder.json", bundle.encoder.to_json())
    write_json(folder / "taxonomy.json", bundle.taxonomy.to_json())
    write_json(folder / "calibration.json", {name: c.to_json() for name, c in bundle.calibration.items()})
    golden = [
        {"text": text, "probabilities": rows}
        for text, rows in zip(bundle.golden_texts, _golden_probabilities(bundle), strict=True)
    ]
    write_json(folder / "golden.json", golden)
    (folder / "README.md").write_text(bundle.card, encoding="utf-8")
    for licence in bundle.licences:
        shutil.copyfile(licence, folder / licence.name)

    return _KIND.write(folder, {"precision": bundle.precision, "max_length": bundle.max_length})


def load_bundle(path: Path) -> Bundle:
    """Reads a bundle after checking every file's checksum, every weight's shape and the golden probabilities.

    Raises:
      InputError: not a bundle, written by a newer Classer, damaged or incomplete, or its golden probabilities differ
        on this machine.
    """
    manifest = _read_manifest(path)
    precision = Precision(manifest["precision"])
    encoder = EncoderConfig.from_json(read_json(path / "encoder.json"), source=str(path / "encoder.json"))
    taxonomy = Taxonomy.from_json(read_json(path / "taxonomy.json"), source=str(path / "taxonomy.json"))
    if manifest["max_length"] > encoder.max_positions:
        raise InputError(
            f"{path / MANIFEST}: max_length is {manifest['max_length']}, but the encoder has only "
            f"{encoder.max_positions} positions."
        )
    try:
        weights = load_file(path / _WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path / _WEIGHTS} cannot be read: {e}") from None
    if manifest["format_version"] == 1 and encoder.gated:
        # Gates of format 1 chose tokens before a layer, today's choose after its attention. Dense, the two are equal.
        encoder = dataclasses.replace(encoder, gated=False)
        weights = {name: value for name, value in weights.items() if not name.startswith("encoder.gate_")}
    _check_weights(weights, encoder, taxonomy, precision, path / _WEIGHTS)
    golden = _read_golden(path / "golden.json", taxonomy)
    bundle = Bundle(
        encoder=encoder,
        taxonomy=taxonomy,
        tokenizer=WordPieceTokenizer.from_folder(path / "tokenizer"),
        weights=weights,
        precision=precision,
        calibration=_read_calibration(path / "calibration.json", taxonomy),
        max_length=manifest["max_length"],
        golden_texts=tuple(row["text"] for row in golden),
        card=(path / "README.md").read_text(encoding="utf-8"),
        licences=tuple(path / name for name in _LICENCES if (path / name).is_file()),
        version=manifest["version"],
        path=path,
    )
    _check_golden(bundle, golden, path)
    return bundle


_LICENCES = ("LICENSE", "NOTICE")
GOLDEN_LENGTH = 64  # golden texts are cut to this many tokens: one small program checks them all


def quantize_bundle(bundle: Bundle) -> Bundle:
    """The INT8 version of a float32 bundle, not yet saved.

    The empty text is dropped from the golden texts: classifiers were not trained on it, and where they are undecided,
    the last bits of another machine's arithmetic may move an INT8 probability by a tenth.

    Raises:
      InputError: it is INT8 already.
    """
    if bundle.precision == Precision.int8:
        raise InputError(f"{bundle.path} is INT8 already; quantise a float32 bundle.")
    return dataclasses.replace(
        bundle,
        weights=to_int8(bundle.weights),
        precision=Precision.int8,
        golden_texts=tuple(filter(None, bundle.golden_texts)),
        version="",
        path=None,
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _KIND.read(path)
    for field, kind in (("precision", str), ("max_length", int)):
        if not isinstance(manifest.get(field), kind):
            raise InputError(f"{path / MANIFEST}: the field '{field}' is missing or is not a {kind.__name__}.")
    if manifest["precision"] not in GOLDEN_TOLERANCE:
        raise InputError(
            f"{path / MANIFEST}: precision '{manifest['precision']}' is none of those known "
            f"({', '.join(GOLDEN_TOLERANCE)})."
        )
    return manifest


def _check_weights(
    weights: Weights, encoder: EncoderConfig, taxonomy: Taxonomy, precision: Precision, source: Path
) -> None:
    """Raises InputError unless names, shapes and dtypes are those of the model that the configs describe."""
    model = TextClassifier(encoder, taxonomy.num_labels)
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))
    expected = {
        ".".join(str(key.key) for key in path): (value.shape, "float32")
        for path, value in jax.tree_util.tree_leaves_with_path(init["params"])
    }
    if precision == Precision.int8:
        for name, (shape, _) in list(expected.items()):
            if is_quantized(name):
                axis = -1 if name.endswith(".kernel") else 0
                expected[name] = (shape, "int8")
                expected[f"{name}_scale"] = ((shape[axis],), "float32")
    for name, (shape, dtype) in expected.items():
        if name not in weights:
            raise InputError(f"{source} has no tensor '{name}'.")
        if weights[name].shape != shape:
            raise InputError(f"{source}: '{name}' has shape {weights[name].shape}; the config says {shape}.")
        if weights[name].dtype != dtype:
            raise InputError(
                f"{source}: '{name}' is {weights[name].dtype}; in a bundle of precision {precision} it is {dtype}."
            )
    if unknown := sorted(weights.keys() - expected.keys()):
        raise InputError(f"{source} has a tensor '{unknown[0]}', which a model of precision {precision} has not.")


def _read_calibration(file: Path, taxonomy: Taxonomy) -> dict[str, Calibration]:
    """The calibration of every task of the taxonomy, by name."""
    data = read_json(file)
    calibration = {}
    for task in taxonomy.tasks:
        if not isinstance(data, dict) or task.name not in data:
            raise InputError(f"{file} has no calibration of the task '{task.name}'.")
        fitted = calibration[task.name] = Calibration.from_json(data[task.name], source=str(file))
        given, needed = fitted.thresholds, len(task.labels)
        if given is not None and len(given) != needed:
            raise InputError(f"{file}: the task '{task.name}' has {needed} labels, but {len(given)} thresholds.")
        if given is None and not task.kind.exclusive:
            logger.warning("%s has no thresholds of the multilabel task '%s'; 0.5 is used for all.", file, task.name)
            calibration[task.name] = dataclasses.replace(fitted, thresholds=(0.5,) * needed)
    return calibration


def _read_golden(file: Path, taxonomy: Taxonomy) -> list[dict[str, Any]]:
    golden = read_json(file)
    widths = {task.name: len(task.labels) for task in taxonomy.tasks}
    try:
        fits = all(
            isinstance(row["text"], str) and {name: len(p) for name, p in row["probabilities"].items()} == widths
            for row in golden
        )
    except (TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise InputError(f"{file} must hold texts, each with one probability for every label of the taxonomy.")
    return golden


def _golden_probabilities(bundle: Bundle) -> list[dict[str, list[float]]]:
    """Task name → probabilities, for each golden text."""
    texts = bundle.golden_texts
    length = min(GOLDEN_LENGTH, bundle.max_length)
    ids = bundle.tokenizer.encode(texts, length).ids
    logits_NL = bundle.predictor().logits(ids, batch_size=max(1, len(texts)), buckets=(length,))
    by_task = {task.name: bundle.probabilities(task.name, logits_NL) for task in bundle.taxonomy.tasks}
    return [{name: [float(p) for p in rows[i]] for name, rows in by_task.items()} for i in range(len(texts))]


def _check_golden(bundle: Bundle, golden: list[dict[str, Any]], path: Path) -> None:
    tolerance = GOLDEN_TOLERANCE[bundle.precision]
    got = _golden_probabilities(bundle)
    for number, (row, ours) in enumerate(zip(golden, got, strict=True), start=1):
        for task, expected in row["probabilities"].items():
            difference = float(np.abs(np.subtract(expected, ours[task])).max())
            if not difference <= tolerance:  # also when NaN
                raise InputError(
                    f"{path} computes something else here: a probability of golden text {number} (task '{task}') "
                    f"differs by {difference:.4f}, more than {tolerance}. The bundle or this installation is broken."
                )
