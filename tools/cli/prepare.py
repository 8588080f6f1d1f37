"""The command `classer prepare`: raw labelled text → training shards."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from classer.data.errors import InputError
from classer.data.prepare.plan import PrepareConfig, PreparePlan

InputPaths = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="INPUT …")]


@dataclasses.dataclass(frozen=True)
class PrepareArguments(PrepareConfig):
    """
    Attributes:
      inputs: files (CSV, TSV, JSONL, Parquet, Arrow), folders of them, folders with task.json, and datasets of Hugging
        Face saved to disk; splits other than `train` are taken as evaluation sets.
      out: a new folder for the shards, or one of an earlier run of the same inputs.
      evaluation: files or folders of texts that must not be trained on.
      tokenizer: a folder with vocab.txt and tokenizer_config.json, or an encoder as `classer train --encoder` takes it.
      workers: processes that compare and tokenise.
      runner: run on Apache Beam: the name of a runner and its options, such as "FlinkRunner --parallelism=8", or
        DirectRunner for this machine. Every worker must reach all files under the same paths.
    """

    inputs: InputPaths = ()
    out: Path = tyro.MISSING
    evaluation: tuple[Path, ...] = ()
    tokenizer: str = "sentence-transformers/all-MiniLM-L6-v2"
    workers: int = 1
    runner: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise InputError("classer prepare needs at least one input: a file or folder of labelled texts.")
        if self.workers < 1:
            raise InputError(f"--workers is {self.workers}; it must be at least 1.")


def prepare(argv: Sequence[str]) -> None:
    """Turn labelled texts into cleaned, deduplicated, tokenised training shards."""
    a = tyro.cli(PrepareArguments, prog="classer prepare", args=list(argv), description=prepare.__doc__)
    config = PrepareConfig(**{field.name: getattr(a, field.name) for field in dataclasses.fields(PrepareConfig)})
    plan = PreparePlan.make(config, a.inputs, a.evaluation, _tokenizer_folder(a.tokenizer), a.out)
    print(f"{len(plan.sources)} files of {len(plan.task_names)} tasks, {len(plan.evaluation)} evaluation files.")
    if a.runner is None:
        from classer.data.prepare.local import prepare as run

        manifest, new = run(plan, workers=a.workers, progress=show_progress)
    else:
        from classer.data.prepare.on_beam import prepare as run_on_beam

        manifest, new = run_on_beam(plan, runner=a.runner, progress=show_progress)
    if not new:
        print(f"{a.out} holds exactly this already, whole; nothing was done.")
    print(manifest_summary(manifest))
    print(f"Shards and manifest: {a.out}")


def manifest_summary(manifest: dict[str, Any]) -> str:
    """A summary of a manifest: how many rows were kept and left out, and the lengths of each split."""
    counts = manifest["counts"]
    lines = [f"{counts['read']:,} rows read"]
    for name, said in (
        ("rejected", "rejected (rejects.jsonl says why)"),
        ("duplicates", "equal to an earlier text"),
        ("contaminated", "in an evaluation set"),
        ("near_duplicates", "near-duplicates of an earlier text"),
        ("kept", "kept"),
    ):
        lines.append(f"  {counts[name]:>12,}  {counts[name] / max(counts['read'], 1):6.2%}  {said}")
    for task in manifest["tasks"]:
        lines.append(f"task '{task['name']}': {task['kind']}, {len(task['labels'])} labels, {task['rows']:,} texts")
    for split, found in manifest["splits"].items():
        lengths = found["lengths"]
        if lengths["records"]:
            lines.append(
                f"{split}: {lengths['records']:,} texts, {len(found['shards'])} shards, {lengths['tokens']:,} tokens; "
                f"median {lengths['median']}, 99 % up to {lengths['p99']}, {lengths['truncated']:,} cut"
            )
    return "\n".join(lines)


def show_progress(stage: str, unit: str, total: int | None) -> contextlib.AbstractContextManager[Any]:
    from tqdm import tqdm

    return tqdm(desc=stage, unit=unit if unit == "B" else f" {unit}", total=total, unit_scale=True, file=sys.stderr)


def _tokenizer_folder(name: str) -> Path:
    if (Path(name) / "vocab.txt").is_file():
        return Path(name)
    from classer.model.pretrained import fetch_encoder

    return fetch_encoder(name)
