"""Folders with a manifest: the size and SHA-256 of every other file, and a hash over these.

Bundles and exports are such folders.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.errors import InputError
from ..data.fetch import sha256_of


@dataclasses.dataclass(frozen=True)
class FolderKind:
    """A kind of folder with a manifest.

    Attributes:
      noun: its name in error messages.
      format, format_version: fields of the manifest.
      manifest: the manifest's file name.
      needed: files that every such folder has.
      written_by: a sentence for error messages that names the command that writes such folders.
    """

    noun: str
    format: str
    format_version: int
    manifest: str
    needed: tuple[str, ...]
    written_by: str

    def write(self, folder: Path, fields: Mapping[str, Any]) -> str:
        """Writes the manifest, which must be the last file, and returns its version, a hash of its content.

        Args:
          folder: holds every other file.
          fields: the manifest's fields beside formats and files.
        """
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        manifest: dict[str, Any] = {
            "format": self.format,
            "format_version": self.format_version,
            **fields,
            "files": {
                file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                for file in files
            },
        }
        manifest["version"] = content_hash(manifest)
        write_json(folder / self.manifest, manifest)
        return manifest["version"]

    def read(self, path: Path) -> dict[str, Any]:
        """The manifest, after checking it and every file that it names.

        Raises:
          InputError: not such a folder, written by a newer Classer, damaged, changed or incomplete.
        """
        file, noun = path / self.manifest, self.noun
        if not file.is_file():
            what = "does not exist" if not path.exists() else f"holds no {self.manifest}"
            raise InputError(f"{path} is no {noun}: it {what}. {self.written_by}")
        manifest = read_json(file)
        if not isinstance(manifest, dict) or manifest.get("format") != self.format:
            article = "an" if noun[0] in "aeiou" else "a"
            raise InputError(f"{file} is not the manifest of {article} {noun} (its 'format' is not '{self.format}').")
        version = manifest.get("format_version")
        if not isinstance(version, int):
            raise InputError(f"{file}: 'format_version' must be a whole number.")
        if version > self.format_version:
            raise InputError(
                f"{path} has {noun} format {version}; this Classer reads up to {self.format_version}. "
                "Upgrade Classer to load it."
            )
        if manifest.get("version") != content_hash(manifest):
            raise InputError(f"{path} is damaged or was changed: {self.manifest} is not as it was written.")
        files = manifest.get("files")
        if not isinstance(files, dict):
            raise InputError(f"{file} lists no files.")
        if missing := [name for name in self.needed if name not in files]:
            raise InputError(f"{file} lists no file '{missing[0]}'; the {noun} is incomplete.")
        for name, expected in files.items():
            self._check_file(path, name, expected)
        return manifest

    def _check_file(self, path: Path, name: str, expected: Any) -> None:
        file, manifest = path / name, path / self.manifest
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{manifest} names a file outside the {self.noun}.")
        if not isinstance(expected, dict) or not expected.keys() >= {"bytes", "sha256"}:
            raise InputError(f"{manifest} gives no size and SHA-256 of {name}.")
        if not file.is_file():
            raise InputError(f"{path} is damaged: {name} is missing.")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise InputError(f"{path} is damaged: {name} has {size} bytes where its manifest says {expected['bytes']}.")
        if sha256_of(file) != expected["sha256"]:
            raise InputError(f"{path} is damaged or was changed: the SHA-256 of {name} is not the one in its manifest.")


def content_hash(manifest: Mapping[str, Any]) -> str:
    """A hash of the manifest's other fields; as these hold checksums, it covers every file."""
    fields = {name: value for name, value in manifest.items() if name != "version"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """Parses a JSON file; raises InputError if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{file} cannot be read as JSON: {e}") from None
