"""Helpers of tests in several packages: a tiny classifier, and a tiny pretrained encoder with toy texts."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from classer.data.prepare.local import prepare
from classer.data.prepare.plan import PrepareConfig, PreparePlan
from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.data.tokenizer import WordPieceTokenizer
from classer.model.bundle import Bundle
from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig
from classer.model.decode import Calibration
from classer.model.precision import Precision
from classer.model.quantize import flatten
from classer.train.config import CurriculumStage

Result = TypeVar("Result")
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TOPICS = {
    "food": ("bread", "cheese", "soup", "apple"),
    "sport": ("goal", "match", "team", "race"),
    "weather": ("rain", "storm", "snow", "wind"),
}
FILLERS = ("the", "is", "a", "my", "has", "not", "where", ".", "?")
VOCAB = [*SPECIALS, *FILLERS, "card", "arrived", "money", *(word for words in TOPICS.values() for word in words)]
TAXONOMY = Taxonomy(
    (
        Task("topic", TaskKind.MULTICLASS, tuple(Label(f"topic {i}") for i in range(7))),
        Task("tags", TaskKind.MULTILABEL, (Label("urgent"), Label("angry"), Label("spam"))),
    )
)

TREE = Task(
    "where",
    TaskKind.HIERARCHICAL,
    (
        Label("inside"),
        Label("food", parent="inside"),
        Label("outside"),
        Label("sport", parent="outside"),
        Label("weather", parent="outside"),
    ),
)
TOY_TASKS = (
    Task("topic", TaskKind.BINARY, tuple(map(Label, TOPICS))[:2]),
    Task("topics", TaskKind.MULTILABEL, tuple(map(Label, TOPICS))),
    TREE,
)
# A curriculum over the toy tasks.
CURRICULUM = (
    CurriculumStage("first", kinds=("binary",), epochs=4),
    CurriculumStage(
        "second",
        kinds=("multilabel",),
        tasks=("where",),
        replay=0.2,
        weights={"topics": 3},
        epochs=30,
        learning_rate=3e-3,
    ),
)


def printed(call: Callable[[], Result]) -> tuple[Result, list[str]]:
    """The result of a call, and the lines that it printed on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        result = call()
    return result, stdout.getvalue().splitlines()


def with_devices(count: int) -> dict[str, str]:
    """Environment variables that give a child process `count` virtual CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}


def make_bundle(folder: Path) -> Bundle:
    """An unsaved float32 bundle with a tiny random encoder of at most 48 tokens, and two tasks."""
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    config = EncoderConfig(len(VOCAB), num_layers=2, d_model=32, num_heads=2, d_ff=64, max_positions=48)
    model = TextClassifier(config, TAXONOMY.num_labels)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))["params"]
    weights = flatten(params)
    weights["head.kernel"] = 20 * weights["head.kernel"]  # otherwise all texts get almost equal logits
    return Bundle(
        encoder=config,
        taxonomy=TAXONOMY,
        tokenizer=WordPieceTokenizer(folder / "vocab.txt"),
        weights=weights,
        precision=Precision.float32,
        calibration={"topic": Calibration(1.5), "tags": Calibration(0.8, (0.3, 0.5, 0.7))},
        golden_texts=("my card has not arrived",),
        card="A test's bundle.",
        max_length=48,
    )


def with_gates(bundle: Bundle) -> Bundle:
    """The bundle with gates of random directions, as if trained for focus."""
    rng = np.random.default_rng(0)
    encoder = dataclasses.replace(bundle.encoder, gated=True)
    gates = {
        f"encoder.layer_{i}.gate.direction": rng.normal(size=encoder.d_model).astype(np.float32)
        for i in range(encoder.num_layers)
    }
    return dataclasses.replace(bundle, encoder=encoder, weights={**bundle.weights, **gates})


def write_encoder(folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Writes a random BERT in Hugging Face's layout with `transformers`, and a licence.

    Every weight differs from its initial value. `sizes` are fields of `transformers.BertConfig`.
    """
    import torch
    import transformers

    defaults: dict[str, Any] = {
        "vocab_size": len(VOCAB),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 48,
    }
    torch.manual_seed(seed)
    model = transformers.BertModel(transformers.BertConfig(**(defaults | sizes)))
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Biases and norms are initially 0 and 1, which would hide an exchange of two of them.
            noise = torch.randn(value.shape) * 0.1
            value.copy_(1 + noise if name.endswith("LayerNorm.weight") else noise)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    (folder / "LICENSE").write_text("A licence.\n")
    return folder


def toy_text(labels: Sequence[str], rng: np.random.Generator) -> str:
    """A text with one word for each label among three to six other words."""
    words = [str(rng.choice(TOPICS[label])) for label in labels]
    words += [str(word) for word in rng.choice(FILLERS, size=rng.integers(3, 7))]
    rng.shuffle(words)
    return " ".join(words)


def write_toy_data(file: Path, kind: TaskKind, count: int, *, seed: int = 0) -> Path:
    """Writes `count` toy examples of a kind of task as JSONL; single words determine the labels."""
    rng = np.random.default_rng(seed)
    names = list(TOPICS)[:2] if kind is TaskKind.BINARY else list(TOPICS)
    with file.open("w") as out:
        for i in range(count):
            labels = [names[i % len(names)]] if kind.exclusive else [name for name in names if rng.random() < 0.4]
            row = {"text": toy_text(labels, rng)}
            row |= {"label": labels[0]} if kind.exclusive else {"labels": labels}
            out.write(json.dumps(row) + "\n")
    return file


def write_task(folder: Path, task: Task, **splits: int) -> None:
    """Writes a task's folder; `splits` gives the number of toy examples in each split."""
    (folder / task.name).mkdir()
    (folder / task.name / "task.json").write_text(json.dumps(task.to_json()))
    kind = TaskKind.MULTICLASS if task.kind is TaskKind.HIERARCHICAL else task.kind
    for seed, (split, count) in enumerate(splits.items()):
        write_toy_data(folder / task.name / f"{split}.jsonl", kind, count, seed=seed)


@contextlib.contextmanager
def rows_trained_on() -> Iterator[dict[str, collections.Counter[int]]]:
    """Counts the rows that reach the training step: name of the phase's folder → task number → rows."""
    import pytest

    from classer.train.trainer import Trainer  # here, as tests of serving do not need it

    counts: dict[str, collections.Counter[int]] = {}
    run, make_step = Trainer.run, Trainer._step
    phases: list[str] = []

    def running(trainer: Any, phase: Any, weights: Any) -> Any:
        phases.append(phase.folder.name)
        return run(trainer, phase, weights)

    def counting(trainer: Any, phase: Any) -> Any:
        step = make_step(trainer, phase)

        def counted(state: Any, batch: Any, *schedule: Any) -> Any:
            counts.setdefault(phases[-1], collections.Counter()).update(batch.tasks_B[batch.weights_B > 0].tolist())
            return step(state, batch, *schedule)

        return counted

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "run", running)
        patched.setattr(Trainer, "_step", counting)
        yield counts


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """Records JAX's compilations within the block: a name such as "jit(function)" for each."""
    names: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.match(r"Finished XLA compilation of (\S+) in", record.getMessage()):
                names.append(found[1])

    listener, logger = Listener(), logging.getLogger("jax")
    logger.addHandler(listener)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(listener)


TOY_LENGTH = 16


@contextlib.contextmanager
def no_progress(stage: str, unit: str, total: int | None) -> Iterator[Any]:
    """A `progress` of `prepare` without a progress bar."""
    yield SimpleNamespace(update=lambda n: None)


def write_shards(folder: Path, tokenizer: Path, **config: Any) -> Path:
    """Writes shards like `classer prepare`, of different toy texts of two tasks, truncated to `TOY_LENGTH` tokens."""
    one = write_toy_data(folder / "toy.jsonl", TaskKind.MULTICLASS, 300)
    other = write_toy_data(folder / "tags.jsonl", TaskKind.MULTILABEL, 300, seed=1)
    fields = {"dev_fraction": 0.2, "near_duplicates": 0, "records_per_shard": 100, "max_length": TOY_LENGTH}
    plan = PreparePlan.make(PrepareConfig(**{**fields, **config}), [one, other], [], tokenizer, folder / "shards")
    prepare(plan, progress=no_progress)
    return folder / "shards"
