"""The output of a preparation: shards, their lengths, rejects, drops, the tokenizer and the manifest.

The manifest is written last and atomically, so a folder with a manifest is complete.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..buckets import BUCKETS
from ..errors import InputError
from ..fetch import sha256_of
from ..files import atomic_write
from ..records import write_array_records
from ..taxonomy import Task
from ..tokenizer import WordPieceTokenizer
from .plan import PreparePlan, read_manifest
from .sources import Reject
from .steps import Dropped, LabelCounts, TokenizedRow, length_stats, place_of

SPLITS = ("train", "dev")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard: its files, and the number of truncated texts."""

    split: str
    index: int
    records: int
    truncated: int
    file: str
    lengths_file: str
    tasks_file: str


def shard_name(split: str, index: int, num_shards: int) -> str:
    return f"{split}-{index:05d}-of-{num_shards:05d}"


def write_shard(out: Path, split: str, index: int, num_shards: int, rows: Sequence[TokenizedRow]) -> Shard:
    """Writes a shard, ordered by its rows' keys; the order of the argument has no effect."""
    rows = sorted(rows, key=lambda row: row.key)
    name = shard_name(split, index, num_shards)
    file, lengths_file, tasks_file = f"{name}.array_record", f"{name}.lengths.npy", f"{name}.tasks.npy"
    write_array_records(out / file, [row.record for row in rows])
    np.save(out / lengths_file, np.array([row.length for row in rows], np.uint16))
    np.save(out / tasks_file, np.array([row.task for row in rows], np.uint16))
    return Shard(split, index, len(rows), sum(row.truncated for row in rows), file, lengths_file, tasks_file)


def already_made(plan: PreparePlan, inputs: dict[str, Any], progress: Callable[[int], object]) -> bool:
    """Whether `out` already holds the complete result of this plan.

    Raises:
      InputError: it holds unrelated files, or another plan's result, or one of the files is missing or changed.
    """
    if not (plan.out / "manifest.json").exists():
        there = sorted(path.name for path in plan.out.iterdir()) if plan.out.exists() else []
        if there and plan.work.name not in there:
            raise InputError(f"{plan.out} holds other files ({there[0]}); name a new folder with --out.")
        return False
    manifest = read_manifest(plan.out)
    for field in inputs:
        if manifest["inputs"].get(field) != inputs[field]:
            raise InputError(
                f"{plan.out} was prepared from other inputs or settings ({_difference(manifest['inputs'], inputs)}); "
                f"name a new folder with --out, or remove this one."
            )
    for entry in manifest["files"]:
        path = plan.out / entry["file"]
        if not path.is_file() or sha256_of(path) != entry["sha256"]:
            raise InputError(f"{path} is missing or has changed since it was made; remove {plan.out} and prepare anew.")
        progress(entry["bytes"])
    return True


def finish(
    plan: PreparePlan,
    inputs: dict[str, Any],
    tasks: Sequence[Task],
    label_counts: Sequence[LabelCounts],
    counts: dict[str, int],
    shards: Iterable[Shard],
    rejects: Iterable[Reject],
    dropped: Iterable[Dropped],
) -> dict[str, Any]:
    """Writes all files other than the shards, checks that the counts add up, and returns the manifest."""
    out = plan.out
    shards = sorted(shards, key=lambda shard: (SPLITS.index(shard.split), shard.index))
    kept = sum(shard.records for shard in shards)
    lost = counts["rejected"] + counts["duplicates"] + counts["contaminated"] + counts["near_duplicates"]
    if counts["read"] != kept + lost:
        raise RuntimeError(f"{counts['read']} rows were read, but {kept} kept and {lost} left out.")
    _write_lines(out / "rejects.jsonl", _rejects_json(plan, rejects))
    _write_lines(out / "dropped.jsonl", _drops_json(plan, dropped))
    tokenizer = WordPieceTokenizer.from_folder(plan.tokenizer)
    tokenizer.save(out / "tokenizer")
    names = [name for shard in shards for name in (shard.file, shard.lengths_file, shard.tasks_file)]
    names += ["rejects.jsonl", "dropped.jsonl", "tokenizer/vocab.txt", "tokenizer/tokenizer_config.json"]
    manifest = {
        "inputs": inputs,
        "counts": {**counts, "kept": kept},
        "tasks": [
            task.to_json() | {"rows": found.rows, "label_counts": [found.counts[name] for name in task.label_names]}
            for task, found in zip(tasks, label_counts, strict=True)
        ],
        "vocab_size": tokenizer.vocab_size,
        "splits": {split: _split_json(out, [s for s in shards if s.split == split]) for split in SPLITS},
        "files": [
            {"file": name, "bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)} for name in names
        ],
    }
    with atomic_write(out / "manifest.json") as part:
        part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(plan.work)
    return manifest


def _split_json(out: Path, shards: Sequence[Shard]) -> dict[str, Any]:
    lengths = [np.load(out / shard.lengths_file) for shard in shards]
    lengths_N = np.concatenate(lengths) if lengths else np.zeros(0, np.uint16)
    return {
        "shards": [
            {"file": s.file, "lengths": s.lengths_file, "tasks": s.tasks_file, "records": s.records} for s in shards
        ],
        "lengths": length_stats(lengths_N, sum(shard.truncated for shard in shards), BUCKETS),
    }


def _rejects_json(plan: PreparePlan, rejects: Iterable[Reject]) -> Iterator[str]:
    for reject in rejects:
        fields = {"file": str(plan.sources[reject.file].path), "row": reject.row, "reason": reject.reason}
        yield json.dumps(fields, ensure_ascii=False)


def _drops_json(plan: PreparePlan, dropped: Iterable[Dropped]) -> Iterator[str]:
    for drop in dropped:
        file, row = place_of(drop.rank)
        fields = {"file": str(plan.sources[file].path), "row": row, "reason": drop.reason}
        if drop.reason == "contaminated":
            fields["evaluation_text"] = drop.of
        else:
            of_file, of_row = place_of(drop.of)
            fields |= {"of_file": str(plan.sources[of_file].path), "of_row": of_row}
        yield json.dumps(fields | {"similarity": round(drop.similarity, 3)}, ensure_ascii=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def clear(plan: PreparePlan) -> None:
    """Removes the files of an interrupted run from `out`. A work folder shows that there was one."""
    if plan.work.exists():
        for path in plan.out.iterdir():
            if re.fullmatch(r"(train|dev)-\d{5}-of-\d{5}\.(array_record|lengths\.npy|tasks\.npy)", path.name):
                path.unlink()
        # The folder itself stays: if this run is killed here, it marks the remaining files as an interrupted run's.
        for path in plan.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    plan.work.mkdir(parents=True, exist_ok=True)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [field for field in now if before.get(field) != now[field]]
    if changed == ["config"]:
        config = now["config"]
        changed = [f"{name} {before['config'].get(name)} → {config[name]}" for name in config]
        changed = [
            text for text, name in zip(changed, config, strict=True) if before["config"].get(name) != config[name]
        ]
    return ", ".join(changed)
