"""What every export holds beside its model, and the manifest that vouches for all of it.

export.json        format, versions, precision, focus, the size and SHA-256 of every other file, a hash of all this
taxonomy.json      tasks and labels, in the order of the columns of logits and probabilities
calibration.json   temperature and thresholds of each task
tokenizer/         vocab.txt and its settings
golden.json        texts, their token ids, and the probabilities that Classer's own programs give
README.md          how to load it; LICENSE and NOTICE of the pretrained encoder stand beside it
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from classer import __version__
from classer.data.errors import InputError
from classer.data.fetch import sha256_of
from classer.data.taxonomy import Taxonomy
from classer.data.tokenizer import WordPieceTokenizer
from classer.model.bundle import Bundle
from classer.model.decode import Calibration

FORMAT = "classer-export"
FORMAT_VERSION = 1
MANIFEST = "export.json"
NEEDED = (
    "taxonomy.json",
    "calibration.json",
    "golden.json",
    "README.md",
    "tokenizer/vocab.txt",
    "tokenizer/tokenizer_config.json",
)


@dataclasses.dataclass(frozen=True)
class Golden:
    """A text with what is to come out for it.

    Attributes:
      text: the text.
      ids: its token ids, cut to the export's `max_length`.
      probabilities: of all labels of the taxonomy, in its order.
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
      precision: of the model: float32, float16, bfloat16 or int8.
      focus: what each layer keeps, as `Focus.parse` takes it.
      max_length: tokens that a text is cut to, special tokens included.
      lengths: the sequence lengths that there are programs for, ascending; empty where the length is open.
      bundle: version of the bundle it was made from.
      created: the day it was made (UTC).
      versions: of Classer and of the packages that made it.
      taxonomy, calibration, tokenizer, golden: what stands in the files.
    """

    path: Path
    target: str
    precision: str
    focus: str
    max_length: int
    lengths: tuple[int, ...]
    bundle: str
    created: datetime.date
    versions: Mapping[str, str]
    taxonomy: Taxonomy
    calibration: Mapping[str, Calibration]
    tokenizer: WordPieceTokenizer
    golden: tuple[Golden, ...]


def write_shared(folder: Path, bundle: Bundle, golden: Sequence[Golden], readme: str) -> None:
    """Writes what all formats share, all but the manifest, into an existing folder."""
    bundle.tokenizer.save(folder / "tokenizer")
    _write_json(folder / "taxonomy.json", bundle.taxonomy.to_json())
    _write_json(folder / "calibration.json", {name: c.to_json() for name, c in bundle.calibration.items()})
    _write_json(folder / "golden.json", [dataclasses.asdict(row) for row in golden])
    (folder / "README.md").write_text(readme, encoding="utf-8")
    for licence in bundle.licences:
        shutil.copyfile(licence, folder / licence.name)


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    """Writes the manifest, last: `fields` are those of `Export` that stand in no file of their own."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **fields,
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"classer": __version__, **fields["versions"]},
        "files": {
            file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in files
        },
    }
    _write_json(folder / MANIFEST, {**manifest, "version": content_hash(manifest)})


def read_export(path: Path) -> Export:
    """Reads an export's folder after checking every file's checksum; the model itself is not opened.

    Raises:
      InputError: no export, written by a newer Classer, damaged, changed or incomplete.
    """
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        _check_file(path, name, expected)
    unknown = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    if unknown := sorted(unknown - manifest["files"].keys() - {MANIFEST}):
        raise InputError(f"{path} was changed: it holds {unknown[0]}, which its manifest does not name.")
    taxonomy = Taxonomy.from_json(_read_json(path / "taxonomy.json"), source=str(path / "taxonomy.json"))
    calibration = _read_json(path / "calibration.json")
    source = str(path / "calibration.json")
    try:
        return Export(
            path=path,
            **{name: manifest[name] for name in ("target", "precision", "focus", "max_length", "bundle", "versions")},
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


def content_hash(manifest: Mapping[str, Any]) -> str:
    """A hash of the manifest's other fields, and through its checksums of every file."""
    fields = {name: value for name, value in manifest.items() if name != "version"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _read_manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        what = "does not exist" if not path.exists() else f"holds no {MANIFEST}"
        raise InputError(f"{path} is no export: it {what}. `classer export` writes exports.")
    manifest = _read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path / MANIFEST} is not the manifest of an export (its 'format' is not '{FORMAT}').")
    version = manifest.get("format_version")
    if not isinstance(version, int):
        raise InputError(f"{path / MANIFEST}: 'format_version' must be a whole number.")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has export format {version}; this Classer reads up to {FORMAT_VERSION}. "
            "Upgrade Classer to check it."
        )
    if manifest.get("version") != content_hash(manifest):
        raise InputError(f"{path} is damaged or was changed: {MANIFEST} is not as it was written.")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise InputError(f"{path / MANIFEST} lists no files.")
    if missing := [name for name in NEEDED if name not in files]:
        raise InputError(f"{path / MANIFEST} lists no file '{missing[0]}'; the export is incomplete.")
    return manifest


def _check_file(path: Path, name: str, expected: Any) -> None:
    file = path / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{path / MANIFEST} names a file outside the export.")
    if not isinstance(expected, dict) or not expected.keys() >= {"bytes", "sha256"}:
        raise InputError(f"{path / MANIFEST} gives no size and SHA-256 of {name}.")
    if not file.is_file():
        raise InputError(f"{path} is damaged: {name} is missing.")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise InputError(f"{path} is damaged: {name} has {size} bytes where its manifest says {expected['bytes']}.")
    if sha256_of(file) != expected["sha256"]:
        raise InputError(f"{path} is damaged or was changed: the SHA-256 of {name} is not the one in its manifest.")


def _read_golden(file: Path, taxonomy: Taxonomy) -> tuple[Golden, ...]:
    rows = tuple(Golden(row["text"], tuple(row["ids"]), tuple(row["probabilities"])) for row in _read_json(file))
    if not rows or any(len(row.probabilities) != taxonomy.num_labels for row in rows):
        raise InputError(f"{file} must hold texts, each with one probability for every label of the taxonomy.")
    if not all(np.isfinite(row.probabilities).all() for row in rows):
        raise InputError(f"{file} holds a probability that is not finite.")
    return rows


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{file} cannot be read as JSON: {e}") from None
