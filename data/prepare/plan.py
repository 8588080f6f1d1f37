"""The configuration of a preparation, and the plan that its steps share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..buckets import BUCKETS
from ..errors import InputError
from ..fetch import sha256_of
from .minhash import band_rows
from .sources import Columns, SourceFile, find_evaluation, find_sources

# Increase it with every change that alters the shards of the same inputs.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Settings of a preparation.

    Attributes:
      max_length: the maximum number of tokens of a text, special tokens included; longer texts are truncated.
      dev_fraction: the share of texts set aside for development, chosen by the hash of the text.
      near_duplicates: similarity (Jaccard, of 5-character shingles) from which the later of two texts of one task is
        dropped; 0 drops equal texts only.
      records_per_shard: the approximate number of records in a shard.
      text_column: the column of the texts.
      label_column: the column of the labels; by default `label` or `labels`, whichever a row has.
      task: the task name for inputs without a task.json; by default the name of the file or folder.
    """

    max_length: int = 256
    dev_fraction: float = 0.01
    near_duplicates: float = 0.8
    records_per_shard: int = 131_072
    text_column: str = "text"
    label_column: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_length", 8, BUCKETS[-1]),
            ("dev_fraction", 0, 0.5),
            ("near_duplicates", 0, 1),
            ("records_per_shard", 1, 10_000_000),
        ):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} must be between {low} and {high:,}; it is {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class PreparePlan:
    """A preparation: settings, input files and output folder.

    Attributes:
      config: the settings.
      sources: the files, in the order that decides which of two duplicates is kept.
      evaluation: files of evaluation texts, which are removed from the training data.
      tokenizer: folder with vocab.txt and tokenizer_config.json.
      out: the output folder.
    """

    config: PrepareConfig
    sources: tuple[SourceFile, ...]
    evaluation: tuple[Path, ...]
    tokenizer: Path
    out: Path

    @classmethod
    def make(
        cls, config: PrepareConfig, inputs: Sequence[Path], evaluation: Sequence[Path], tokenizer: Path, out: Path
    ) -> PreparePlan:
        """Makes a plan from the inputs that the user names.

        Raises:
          InputError: as `find_sources`; or two inputs describe one task differently; or a file is both a training and
            an evaluation file.
        """
        sources, found = find_sources(inputs, config.task)
        held_out = [*found, *find_evaluation(evaluation)]
        known: dict[str, Any] = {}
        for source in sources:
            if known.setdefault(source.task, source.known) != source.known:
                raise InputError(f"{source.path}: the task '{source.task}' is described otherwise by an earlier input.")
        both = {source.path.resolve() for source in sources} & {path.resolve() for path in held_out}
        if both:
            raise InputError(f"{sorted(both)[0]} is named as an input and as an evaluation set; it can be one of both.")
        return cls(config, tuple(sources), tuple(dict.fromkeys(held_out)), tokenizer, out)

    @property
    def work(self) -> Path:
        """The folder of temporary files, removed at the end."""
        return self.out / ".work"

    @property
    def columns(self) -> Columns:
        return Columns(self.config.text_column, self.config.label_column)

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(source.task for source in self.sources))

    @property
    def band_rows(self) -> int:
        return band_rows(self.config.near_duplicates or 1.0)

    def inputs_json(self, progress: Callable[[int], object]) -> dict[str, Any]:
        """Everything that determines the output: the config, and a checksum of every file, each of which is read.

        Args:
          progress: called with the number of bytes read since the previous call.
        """

        def described(path: Path) -> dict[str, Any]:
            size = path.stat().st_size
            described = {"file": str(path), "bytes": size, "sha256": sha256_of(path)}
            progress(size)
            return described

        tokenizer = hashlib.sha256()
        for name in ("vocab.txt", "tokenizer_config.json"):
            tokenizer.update((self.tokenizer / name).read_bytes())
        return {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "sources": [{"task": source.task, **described(source.path)} for source in self.sources],
            "tasks": [
                source.known.to_json()
                for source in {source.task: source for source in self.sources}.values()
                if source.known
            ],
            "evaluation": [described(path) for path in self.evaluation],
            "tokenizer": tokenizer.hexdigest(),
        }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a prepared folder.

    Raises:
      InputError: there is no manifest, or it is malformed or of another format version.
    """
    file = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["inputs"]["format"]
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no prepared data (no manifest.json); make it with `classer prepare`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file} is no manifest of `classer prepare`.") from None
    if version != FORMAT:
        raise InputError(f"{file} is of format {version}, this Classer reads {FORMAT}; prepare the data anew.")
    return manifest
