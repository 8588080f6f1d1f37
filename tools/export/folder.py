"""The files that every export holds beside its model, and the manifest with their checksums.

export.json        format, versions, precision, focus, the size and SHA-256 of every other file, a hash of the manifest
taxonomy.json      tasks and labels, in the order of the columns of logits and probabilities
calibration.json   temperature and thresholds of each task
tokenizer/         vocab.txt and the tokenizer's settings
golden.json        texts, their token ids, and the probabilities that Classer's own programs compute for them
README.md          how to load the export; LICENSE and NOTICE of the pretrained encoder are copied beside it
"""

from __future__ import annotations

import dataclasses
import datetime
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from classer import __version__
from classer.data.errors import InputError
from classer.data.taxonomy import Taxonomy
from classer.data.tokenizer import WordPieceTokenizer
from classer.model.bundle import Bundle
from classer.model.decode import Calibration
from classer.model.manifest import FolderKind, read_json, write_json
from classer.model.precision import Precision

EXPORT_MANIFEST = "export.json"
_KIND = FolderKind(
    noun="export",
    format="classer-export",
    format_version=1,
    manifest=EXPORT_MANIFEST,
    needed=(
        "taxonomy.json",
        "calibration.json",
        "golden.json",
        "README.md",
        "tokenizer/vocab.txt",
        "tokenizer/tokenizer_config.json",
    ),
    written_by="`classer export` writes exports.",
)


@dataclasses.dataclass(frozen=True)
class GoldenText:
    """A text with its expected token ids and probabilities.

    Attributes:
      text: the text.
      ids: its token ids, truncated to the export's `max_length`.
      probabilities: the probability of each label, in the order of the taxonomy.
    """

    text: str
    ids: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Export:
    """An export's folder, read and checked.

    Attributes:
      path: the folder.
      target: the name of the format (`formats.FORMATS`).
      precision: the model's precision: float32, float16, bfloat16 or int8.
      focus: the share of tokens that each layer keeps, in the syntax of `Focus.parse`.
      max_length: maximum tokens of a text, special tokens included; longer texts are truncated.
      lengths: the sequence lengths that have a program, ascending; empty if the length is dynamic.
      bundle: version of the source bundle.
      created: the day of the export (UTC).
      versions: versions of Classer and of the packages that wrote the export.
      taxonomy, calibration, tokenizer, golden: the contents of the files of these names.
    """

    path: Path
    target: str
    precision: Precision
    focus: str
    max_length: int
    lengths: tuple[int, ...]
    bundle: str
    created: datetime.date
    versions: Mapping[str, str]
    taxonomy: Taxonomy
    calibration: Mapping[str, Calibration]
    tokenizer: WordPieceTokenizer
    golden: tuple[GoldenText, ...]


def write_shared(folder: Path, bundle: Bundle, golden: Sequence[GoldenText], readme: str) -> None:
    """Writes the files that all formats share, except the manifest, into an existing folder."""
    bundle.tokenizer.save(folder / "tokenizer")
    write_json(folder / "taxonomy.json", bundle.taxonomy.to_json())
    write_json(folder / "calibration.json", {name: c.to_json() for name, c in bundle.calibration.items()})
    write_json(folder / "golden.json", [dataclasses.asdict(row) for row in golden])
    (folder / "README.md").write_text(readme, encoding="utf-8")
    for licence in bundle.licences:
        shutil.copyfile(licence, folder / licence.name)


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    """Writes the manifest; to be called last, as it holds the checksums of all other files.

    Args:
      folder: the export's folder.
      fields: the fields of `Export` that no other file holds.
    """
    created = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = {"classer": __version__, **fields["versions"]}
    _KIND.write(folder, {**fields, "created": created, "versions": versions})


def read_export(path: Path) -> Export:
    """Reads an export's folder after checking every file's checksum. Does not open the model.

    Raises:
      InputError: the folder is no export, was written by a newer Classer, or is damaged, changed or incomplete.
    """
    manifest = _KIND.read(path)
    unknown = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    if unknown := sorted(unknown - manifest["files"].keys() - {EXPORT_MANIFEST}):
        raise InputError(f"{path} was changed: it holds {unknown[0]}, which its manifest does not name.")
    taxonomy = Taxonomy.from_json(read_json(path / "taxonomy.json"), source=str(path / "taxonomy.json"))
    calibration = read_json(path / "calibration.json")
    source = str(path / "calibration.json")
    try:
        return Export(
            path=path,
            **{name: manifest[name] for name in ("target", "focus", "max_length", "bundle", "versions")},
            precision=Precision(manifest["precision"]),
            lengths=tuple(manifest["lengths"]),
            created=datetime.date.fromisoformat(manifest["created"]),
            taxonomy=taxonomy,
            calibration={
                task.name: Calibration.from_json(calibration[task.name], source=source) for task in taxonomy.tasks
            },
            tokenizer=WordPieceTokenizer.from_folder(path / "tokenizer"),
            golden=_read_golden(path / "golden.json", taxonomy),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: what its files say does not fit together ({e!r}); export the bundle anew.") from None


def _read_golden(file: Path, taxonomy: Taxonomy) -> tuple[GoldenText, ...]:
    rows = tuple(GoldenText(row["text"], tuple(row["ids"]), tuple(row["probabilities"])) for row in read_json(file))
    if not rows or any(len(row.probabilities) != taxonomy.num_labels for row in rows):
        raise InputError(f"{file} must hold texts, each with one probability for every label of the taxonomy.")
    if not all(np.isfinite(row.probabilities).all() for row in rows):
        raise InputError(f"{file} holds a probability that is not finite.")
    return rows
