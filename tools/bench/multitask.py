"""One model of many tasks against one model per task and TF-IDF + linear SVM; the curriculum against mixed tasks.

    .venv/bin/python tools/bench/multitask.py --data DATASETS --out runs/many --runs svm single curriculum mixed flat

DATASETS holds the folders of the tasks of `FEW`. Of each a sample is drawn, which all runs share; `--whole` takes all
of most of them, for which a GPU is needed. The model of all tasks sees as many examples as those of one task together,
so it costs what they cost:

- svm: TF-IDF + linear SVM, which reads whole texts;
- single: a model a task, so many epochs as its `Sample` says;
- curriculum: binary tasks, then multiclass and multilabel ones, then trees, earlier ones replayed;
- mixed: the same steps, every task from the first to the last;
- flat: the trees' leaves without the tree.

A finished run is kept, an interrupted one is resumed. The last output is the table of all finished runs, also
written to OUT/table.md.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from classer.data.errors import InputError
from classer.data.files import staged_folder
from classer.data.readers import read_task_folder
from classer.data.taxonomy import TaskKind
from classer.tools.cli.main import run
from classer.train.baseline import tfidf_svm


class Sample(NamedTuple):
    """The number of training examples of a task, 0 for all, and of epochs over them."""

    texts: int
    epochs: int


class Scale(NamedTuple):
    """Settings that all runs share: samples of the tasks, the most examples of held-out splits, and the recipe."""

    tasks: dict[str, Sample]
    held_out: dict[str, int]
    batch_size: int
    options: tuple[str, ...]


# Long texts cost most, so they are fewest on a CPU.
FEW = Scale(
    {
        "imdb": Sample(2500, 2),
        "toxic_comments": Sample(4000, 2),
        "sms_spam": Sample(0, 4),
        "banking77": Sample(0, 5),
        "ag_news": Sample(4000, 2),
        "hate_speech_davidson": Sample(5000, 2),
        "sib200": Sample(4000, 2),
        "goemotions": Sample(10_000, 3),
        "clinc150": Sample(0, 2),
        "newsgroups20": Sample(4000, 1),
        "customer_support": Sample(0, 2),
        "products": Sample(0, 2),
    },
    held_out={"dev": 1000, "test": 2000},
    batch_size=32,
    options=("--max-length", "192", "--learning-rate", "1e-4"),
)
WHOLE = Scale(
    {
        "imdb": Sample(0, 2),
        "toxic_comments": Sample(0, 3),
        "sms_spam": Sample(0, 4),
        "banking77": Sample(0, 8),
        "ag_news": Sample(0, 2),
        "hate_speech_davidson": Sample(0, 2),
        "sib200": Sample(20_000, 2),
        "goemotions": Sample(0, 3),
        "clinc150": Sample(0, 6),
        "newsgroups20": Sample(0, 4),
        "customer_support": Sample(0, 3),
        "products": Sample(0, 4),
    },
    held_out={"dev": 1000},
    batch_size=64,
    options=("--max-length", "512", "--learning-rate", "1.5e-4", "--remat"),
)
TASKS = tuple(FEW.tasks)
TREES = ("clinc150", "newsgroups20", "customer_support", "products")
# Learnt nowhere: the answers of another task's head.
TRANSFERS = {"hatecheck": "toxic_comments"}
RECIPE = ("--dropout", "0.1", "--dev-fraction", "0.05", "--patience", "0")
STAGES = (("binary", ("binary",), 0.0), ("flat", ("multiclass", "multilabel"), 0.2), ("trees", ("hierarchical",), 0.2))

Run = Literal["svm", "single", "curriculum", "mixed", "flat"]


@dataclasses.dataclass(frozen=True)
class MultitaskArguments:
    """
    Attributes:
      data: the folder of the tasks' folders.
      out: the folder for the sample, the runs and the table.
      runs: the runs to carry out.
      tasks: which of the tasks `svm`, `single` and `flat` are carried out for; by default all.
      seeds: of `curriculum` and `mixed`.
      share: of the epochs of each `Sample`.
      whole: take all examples, of up to 512 tokens; say so each time that the folder `out` is used.
    """

    data: Path
    out: Path
    runs: tuple[Run, ...] = ()
    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = (0,)
    share: float = 1.0
    whole: bool = False

    @property
    def scale(self) -> Scale:
        return WHOLE if self.whole else FEW


def main(a: MultitaskArguments) -> None:
    if unknown := set(a.tasks) - set(TASKS):
        raise InputError(f"There is no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}.")
    if not a.share > 0:
        raise InputError(f"--share must be above 0; it is {a.share}.")
    sample = a.out / "data"
    if not sample.exists():
        draw_sample(a, sample)
    for task in a.tasks if "svm" in a.runs else ():
        baseline(sample / task, a.out / f"svm-{task}.json")
    for task in a.tasks if "single" in a.runs else ():
        train(a, sample / task, a.out / "single" / task, "--epochs", epochs(a, task))
    for task in [task for task in TREES if task in a.tasks and "flat" in a.runs]:
        flat = flatten(sample / task, a.out / "data-flat" / task)
        train(a, flat, a.out / "flat" / task, "--epochs", epochs(a, task))
    for seed in a.seeds:
        for name, stages in (("curriculum", curriculum(a, sample)), ("mixed", mixed(a, sample))):
            if name in a.runs:
                file = a.out / f"{name}.json"
                file.write_text(json.dumps(stages, indent=1) + "\n", encoding="utf-8")
                train(a, sample, a.out / f"{name}-{seed}", "--curriculum", file, "--seed", seed)
    table = draw_table(a, sample)
    (a.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


def draw_sample(a: MultitaskArguments, sample: Path) -> None:
    """Copies each task's folder, with a sample of its examples in the order of the file."""
    with staged_folder(sample) as part:
        _fill_sample(a, part)


def _fill_sample(a: MultitaskArguments, part: Path) -> None:
    for task in (*TASKS, *TRANSFERS):
        most = a.scale.held_out | ({"train": a.scale.tasks[task].texts} if task in TASKS else {})
        (part / task).mkdir(parents=True, exist_ok=True)
        (part / task / "task.json").write_bytes((a.data / task / "task.json").read_bytes())
        for file in (a.data / task).glob("*.jsonl.gz"):
            split = file.name.split(".")[0]
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                rows = list(lines)
            size = most.get(split) or len(rows)
            kept = np.sort(np.random.default_rng(0).permutation(len(rows))[:size])
            (part / task / f"{split}.jsonl").write_text("".join(rows[i] for i in kept), encoding="utf-8")


def flatten(folder: Path, flat: Path) -> Path:
    """A tree's task with its leaves alone."""
    flat.mkdir(parents=True, exist_ok=True)
    task = read_task_folder(folder, ()).task
    leaves = [{"name": name} for name, leaf in zip(task.label_names, task.leaves_L, strict=True) if leaf]
    described = {"name": task.name, "kind": TaskKind.MULTICLASS, "labels": leaves}
    (flat / "task.json").write_text(json.dumps(described), encoding="utf-8")
    for file in folder.glob("*.jsonl"):
        (flat / file.name).write_bytes(file.read_bytes())
    return flat


def baseline(folder: Path, out: Path) -> None:
    if out.exists():
        return
    data = read_task_folder(folder, ("train", "test"))
    started = time.monotonic()
    score = tfidf_svm(data.splits["train"], data.splits["test"], data.task)
    seconds = time.monotonic() - started
    print(f"{folder.name}: SVM {score.accuracy:.2%}, macro-F1 {score.macro_f1:.3f}, {seconds:.0f} s", flush=True)
    out.write_text(json.dumps(dataclasses.asdict(score) | {"minutes": seconds / 60}) + "\n", encoding="utf-8")


def train(a: MultitaskArguments, data: Path, out: Path, *options: Any) -> None:
    if (out / "bundle").exists():
        return
    recipe = (*RECIPE, *a.scale.options, "--batch-size", a.scale.batch_size)
    words = ["train", "--data", data, "--out", out, *recipe, *options, "--restartable"]
    command = [str(Path(sys.executable).with_name("classer")), *map(str, words)]
    print(f"\n{shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


def epochs(a: MultitaskArguments, task: str) -> int:
    return max(1, round(a.scale.tasks[task].epochs * a.share))


def curriculum(a: MultitaskArguments, sample: Path) -> list[dict[str, Any]]:
    """The stages of `STAGES`, each of its tasks' epochs; together as many steps as the models of one task."""
    by_kind = {kind: number for number, (_, kinds, _) in enumerate(STAGES) for kind in kinds}
    rows = np.zeros(len(STAGES))
    for task in TASKS:
        kind = read_task_folder(sample / task, ()).task.kind
        rows[by_kind[kind]] += num_rows(a, sample, task)
    seen = rows / [1 - replay for _, _, replay in STAGES]
    steps = a.share * rows.sum() / a.scale.batch_size * seen / seen.sum()
    weights = {task: drawn.epochs for task, drawn in a.scale.tasks.items()}
    return [
        {"name": name, "kinds": kinds, "replay": replay, "weights": weights, "steps": round(float(count))}
        for (name, kinds, replay), count in zip(STAGES, steps, strict=True)
    ]


def mixed(a: MultitaskArguments, sample: Path) -> list[dict[str, Any]]:
    """One stage of all tasks, with as many steps as the curriculum has."""
    steps = sum(stage["steps"] for stage in curriculum(a, sample))
    weights = {task: drawn.epochs for task, drawn in a.scale.tasks.items()}
    return [{"name": "mixed", "weights": weights, "steps": steps}]


def num_rows(a: MultitaskArguments, sample: Path, task: str) -> int:
    """Training examples of a task times its epochs."""
    with (sample / task / "train.jsonl").open(encoding="utf-8") as lines:
        return sum(1 for _ in lines) * a.scale.tasks[task].epochs


def draw_table(a: MultitaskArguments, sample: Path) -> str:
    """Float32 test scores in %: accuracy, of multilabel tasks macro-F1."""
    several = [f"{name}-{seed}" for name in ("curriculum", "mixed") for seed in range(10)]
    several = [name for name in several if (a.out / name / "bundle").exists()]
    columns = ["svm", "single", "flat", *several]
    lines = [f"| task | texts | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    means: dict[str, list[float]] = {name: [] for name in columns}
    for task in (*TASKS, *TRANSFERS):
        described = read_task_folder(sample / task, ()).task
        key = "accuracy" if described.kind.exclusive else "macro_f1"
        files = {
            "svm": a.out / f"svm-{task}.json",
            "single": a.out / "single" / task / "results-float32" / "metrics.json",
            "flat": a.out / "flat" / task / "results-float32" / "metrics.json",
        } | {name: a.out / name / "results-float32" / task / "metrics.json" for name in several}
        found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
        if task in TRANSFERS:
            found = {name: transfer(a, sample / task, name) for name in several}
        scores = {name: 100 * result[key] for name, result in found.items()}
        for name, score in scores.items():
            if task in TASKS:
                means[name].append(score)
        cells = [f"{scores[name]:.2f}" if name in scores else "" for name in columns]
        texts = max((result["n"] for result in found.values()), default=0)
        lines.append(f"| {task}{'' if described.kind.exclusive else ' (macro-F1)'} | {texts:,} | {' | '.join(cells)} |")
    cells = [f"{np.mean(means[name]):.2f}" if len(means[name]) == len(TASKS) else "" for name in columns]
    lines.append(f"| mean of {len(TASKS)} | | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def transfer(a: MultitaskArguments, folder: Path, name: str) -> dict[str, Any]:
    """The metrics of a task that nothing was trained on."""
    results = a.out / name / "results-float32" / folder.name
    if not results.exists():
        command = [Path(sys.executable).with_name("classer"), "evaluate", a.out / name / "bundle-float32"]
        command += ["--data", folder, "--task", TRANSFERS[folder.name], "--out", results]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return json.loads((results / "metrics.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run(lambda argv: main(tyro.cli(MultitaskArguments, args=list(argv), description=__doc__)), sys.argv[1:]))
