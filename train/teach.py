"""Soft labels: the probabilities that teachers give every text.

Axes: N texts, L labels of one task, D the width of a teacher, V of all teachers' vectors, S sequence.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from ..data.errors import InputError
from ..data.extras import missing_packages
from ..data.files import atomic_write
from ..data.readers import infer_task, read_examples, read_task_folder, read_texts
from ..data.soft_labels import (
    TeacherScore,
    teachers_file,
    vectors_file,
    write_soft_labels,
    write_teachers,
    write_vectors,
)
from ..data.taxonomy import Task, with_ancestors
from ..model.bundle import MANIFEST, load_bundle
from .distributed import say

_BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class TeachJob:
    """One run of `classer teach`.

    Attributes:
      teacher: Classer bundles, or sequence classifiers of Hugging Face transformers (a folder or a name on the hub;
        needs the extra `teachers`); the answers of several are averaged.
      data: texts: a CSV, TSV or JSONL file (also with .gz or .zst), a Parquet file, a folder with task.json, or - for
        JSON Lines from standard input.
      out: the JSON Lines file to write; must not exist. A file beside it that ends in `.teachers.json` says who
        answered, and how well.
      weights: one factor a teacher; none for equal ones.
      split: which split of the folder.
      text_column: the column or field that holds the text.
      label_column: the column or field that holds the label or labels; by default `label` or `labels`. The labels of a
        file say what the task is.
      task: name of the bundles' task, if it differs from the data's.
      max_length: tokens that a transformers teacher reads of a text.
      relations: also write the teachers' pooled vectors of each text, in a file beside `out` that ends in
        `.vectors.npz`, for `classer train --relation-share`.
    """

    teacher: tuple[str, ...]
    data: Path
    out: Path
    weights: tuple[float, ...] = ()
    split: str = "train"
    text_column: str = "text"
    label_column: str | None = None
    task: str | None = None
    max_length: int = 256
    relations: bool = False

    def __post_init__(self) -> None:
        if not self.teacher:
            raise InputError("No teacher was named; give one or several with --teacher.")
        if self.weights and len(self.weights) != len(self.teacher):
            raise InputError(f"{len(self.teacher)} teachers, but {len(self.weights)} weights; give one each, or none.")
        if not all(weight > 0 for weight in self.weights):
            raise InputError("A teacher's weight must be above 0; leave it out instead.")
        if self.max_length < 8:
            raise InputError(f"max_length is {self.max_length}; a text needs 8 tokens at least.")


class Answers(NamedTuple):
    """What a teacher makes of N texts.

    Attributes:
      probs_NL: of the task's labels, as `decode.probabilities` gives them.
      pooled_ND: the means of its last hidden states, over each text's tokens.
    """

    probs_NL: np.ndarray
    pooled_ND: np.ndarray


class Teacher(Protocol):
    """Answers texts."""

    def __call__(self, texts: Sequence[str]) -> Answers: ...


def teach(job: TeachJob) -> None:
    """Writes the teachers' mean answers to `job.out`; a file that is there is whole.

    Raises:
      InputError: the data, a teacher or the file cannot be used; a teacher's labels are not the task's.
    """
    files = vectors_file(job.out), teachers_file(job.out), job.out
    for file in files:
        if file.exists():
            raise InputError(f"{file} exists already and was not touched; name a new file with --out.")
    task, examples = _read(job)
    labels_of = dict(reversed(examples))  # of a text that stands twice, the first's
    texts = list(dict.fromkeys(text for text, _ in examples))
    weights = np.array(job.weights or [1.0] * len(job.teacher))
    weights /= weights.sum()
    say(f"{len(texts):,} texts, task '{task.name}', {task.kind}, {len(task.labels):,} labels.")
    mean_NL = np.zeros((len(texts), len(task.labels)), np.float32)
    scores, vectors = [], []
    for name, weight in zip(job.teacher, weights.tolist(), strict=True):
        teacher, losses, pooled = _load(name, task, job), [], []
        with tqdm(total=len(texts), desc=name, unit="text", mininterval=1) as bar:
            for start in range(0, len(texts), _BATCH_SIZE * 8):
                chunk = texts[start : start + _BATCH_SIZE * 8]
                probs_NL, pooled_ND = teacher(chunk)
                probs_NL = _within(task, probs_NL)
                mean_NL[start : start + len(chunk)] += weight * probs_NL
                losses += _losses(task, probs_NL, [labels_of[text] for text in chunk])
                if job.relations:
                    pooled.append(_weighted(pooled_ND, weight))
                bar.update(len(chunk))
        scores.append(TeacherScore(name, weight, float(np.mean(losses)) if losses else None, len(losses)))
        vectors.append(pooled)
        say(str(scores[-1]))
    job.out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed from the last to the first: where the answers are, the other files are too.
    with contextlib.ExitStack() as stack:
        answers, teachers = (stack.enter_context(atomic_write(file)) for file in (job.out, teachers_file(job.out)))
        if job.relations:
            pooled_NV = np.concatenate([np.concatenate(chunks) for chunks in vectors], axis=1)
            write_vectors(stack.enter_context(atomic_write(vectors_file(job.out))), texts, pooled_NV)
        write_teachers(teachers, scores)
        write_soft_labels(answers, task, texts, mean_NL)
    say(f"{job.out}: the answers of {', '.join(job.teacher)}.")


def _weighted(pooled_ND: np.ndarray, weight: float) -> np.ndarray:
    """Scaled so that, beside other teachers', inner products are the weighted mean of their cosine similarities."""
    norms_N1 = np.linalg.norm(pooled_ND, axis=1, keepdims=True)
    return (weight**0.5 * pooled_ND / np.maximum(norms_N1, 1e-12)).astype(np.float16)


def _within(task: Task, probs_NL: np.ndarray) -> np.ndarray:
    """An exclusive task's probabilities without what a teacher gave other labels, an inner label's from its leaves."""
    if not task.kind.exclusive:
        return probs_NL
    # Above 0, so that leaves of which a teacher says nothing at all are alike, and do not divide by 0.
    leaves_NL = np.where(task.leaves_L, np.maximum(probs_NL, np.finfo(np.float32).tiny), 0.0)
    return with_ancestors(task.parent_L, leaves_NL / leaves_NL.sum(axis=1, keepdims=True))


def _losses(task: Task, probs_NL: np.ndarray, labels_N: Sequence[Sequence[str]]) -> list[float]:
    """Of each text that has labels, the negative log-likelihood of these; of a multilabel task of the others too."""
    losses = []
    for probs_L, labels in zip(probs_NL, labels_N, strict=True):
        if not labels:
            continue
        places = [task.index[label] for label in labels]
        likely = probs_L[places]
        if not task.kind.exclusive:
            likely = np.concatenate([likely, 1 - np.delete(probs_L, places)])
        losses.append(-float(np.log(np.maximum(likely, 1e-9)).sum()))
    return losses


def _read(job: TeachJob) -> tuple[Task, list[tuple[str, Sequence[str]]]]:
    """The task, and each text with its labels, none where they are not known."""
    if job.data.is_dir():
        folder = read_task_folder(job.data, (job.split,), text_column=job.text_column, label_column=job.label_column)
        if job.split not in folder.splits:
            raise InputError(f"{job.data} has no split '{job.split}'; it has {', '.join(sorted(folder.there))}.")
        return folder.task, [(example.text, example.labels) for example in folder.splits[job.split]]
    bundles = [name for name in job.teacher if (Path(name) / MANIFEST).is_file()]
    if bundles:  # a bundle knows the task; the texts need no labels
        taxonomy = load_bundle(Path(bundles[0])).taxonomy
        if job.task is None and len(taxonomy.tasks) > 1:
            names = ", ".join(task.name for task in taxonomy.tasks)
            raise InputError(f"{bundles[0]} has several tasks; name one with --task: {names}.")
        task = next(iter(taxonomy.tasks)) if job.task is None else taxonomy.task(job.task)
        return task, [(text, ()) for text in read_texts(job.data, text_column=job.text_column)]
    name = job.task or job.data.name.split(".")[0]
    examples = read_examples(job.data, text_column=job.text_column, label_column=job.label_column, task=name)
    return infer_task(name, examples)[0], [(example.text, example.labels) for example in examples]


def _load(name: str, task: Task, job: TeachJob) -> Teacher:
    if (Path(name) / MANIFEST).is_file():
        return _bundle_teacher(Path(name), task, job.task or task.name)
    return _transformers_teacher(name, task, job.max_length)


def _bundle_teacher(path: Path, task: Task, name: str) -> Teacher:
    bundle = load_bundle(path)
    # A file's own name is not what the bundle's only task need be called.
    theirs = bundle.taxonomy.tasks[0] if len(bundle.taxonomy.tasks) == 1 else bundle.taxonomy.task(name)
    columns = _columns(str(path), theirs.label_names, task.label_names)
    kernel_DL, bias_L = bundle.weights["head.kernel"], bundle.weights["head.bias"]
    predictor = bundle.predictor()

    def answer(texts: Sequence[str]) -> Answers:
        ids = bundle.tokenizer.encode(texts, bundle.max_length).ids
        pooled_ND = predictor.pooled(ids)
        logits_NL = pooled_ND @ kernel_DL + bias_L  # the head is float32 in every precision
        return Answers(bundle.probabilities(theirs.name, logits_NL)[:, columns], pooled_ND)

    return answer


def _transformers_teacher(name: str, task: Task, max_length: int) -> Teacher:
    torch, transformers = import_torch(f"The teacher {name}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
        model.to(torch_device(torch))
    except (OSError, ValueError) as e:
        first = str(e).splitlines()[0]
        raise InputError(
            f"The teacher {name} is neither a bundle nor a sequence classifier of transformers: {first}"
        ) from None
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    answerable = [label for label, leaf in zip(task.label_names, task.leaves_L, strict=True) if leaf]
    columns = _columns(name, names, answerable)
    hidden: list[Any] = []
    model.base_model.register_forward_hook(lambda _, __, output: hidden.append(output[0]))

    def answer(texts: Sequence[str]) -> Answers:
        probs_NL, pooled = np.zeros((len(texts), len(task.labels)), np.float32), []
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH_SIZE):
                batch = list(texts[start : start + _BATCH_SIZE])
                inputs = tokenizer(batch, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
                logits_NL = model(**inputs.to(model.device)).logits.float()
                probs = torch.softmax(logits_NL, -1) if task.kind.exclusive else torch.sigmoid(logits_NL)
                probs_NL[start : start + len(batch), task.leaves_L] = probs.cpu().numpy()[:, columns]
                real_NS1 = inputs["attention_mask"][..., None]
                pooled.append(((hidden.pop().float() * real_NS1).sum(1) / real_NS1.sum(1)).cpu().numpy())
        return Answers(probs_NL, np.concatenate(pooled))

    return answer


def import_torch(what: str) -> tuple[Any, Any]:
    """(torch, transformers), or an InputError that says how to get them."""
    try:
        import torch
        import transformers
    except ImportError:
        raise missing_packages(what, "torch and transformers", "teachers") from None
    return torch, transformers


def torch_device(torch: Any) -> Any:
    """The CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _columns(teacher: str, theirs: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where a teacher's outputs have the wanted labels."""
    places = {name: i for i, name in enumerate(theirs)}
    missing = [name for name in wanted if name not in places]
    if missing:
        raise InputError(
            f"The teacher {teacher} does not know the label '{missing[0]}' ({len(missing)} of {len(wanted)} are "
            f"missing); its own are {', '.join(list(theirs)[:5])}…"
        )
    return [places[name] for name in wanted]
