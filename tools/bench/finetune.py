"""Fine-tuning speed: Classer's training step beside Hugging Face + PyTorch, on the same batches in one process.

    .venv/bin/python tools/bench/finetune.py --data ../shared/datasets/banking77

Both sides fine-tune the same pretrained encoder with mean pooling and a linear head: bfloat16 activations over float32
parameters (PyTorch: CPU autocast), AdamW (PyTorch: fused), gradients clipped by their global norm, the same dropout
on embeddings, attention weights and sublayers. They take turns of a few steps, so that a noisy machine is as noisy for
both; quote the ratio. Both profit from the allocator's settings of `classer train`; `--no-tuned-allocator` measures
without.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tyro
from tqdm import tqdm

from classer.data.pipeline import Batch, Batches, epoch_batches
from classer.data.readers import read_task_folder
from classer.data.taxonomy import Task, Taxonomy
from classer.data.tokenizer import WordPieceTokenizer
from classer.model.pretrained import MINILM, fetch_encoder, load_encoder
from classer.tools.cli.main import run, tune_allocator
from classer.train.config import Recipe
from classer.train.tokenized import join_tasks, tokenize


@dataclasses.dataclass(frozen=True)
class FinetuneArguments:
    """
    Attributes:
      data: a folder with task.json and the split `train`.
      encoder: a folder, or a name on the Hugging Face hub.
      max_length: tokens that a text is cut to.
      batch_size: examples per step.
      dropout: rate on both sides.
      steps: steps per turn.
      turns: turns of each side.
      warm_up: steps of each side before the measurement; all batch shapes should occur.
      threads: threads of PyTorch.
      tuned_allocator: set glibc's allocator as `classer train` does.
    """

    data: Path
    encoder: str = MINILM
    max_length: int = 64
    batch_size: int = 32
    dropout: float = 0.1
    steps: int = 15
    turns: int = 10
    warm_up: int = 30
    threads: int = os.cpu_count() or 1
    tuned_allocator: bool = True


def main(arguments: FinetuneArguments) -> None:
    folder = fetch_encoder(arguments.encoder)
    task_data = read_task_folder(arguments.data)
    task, tokenizer = task_data.task, WordPieceTokenizer.from_folder(folder)
    split = tokenize(task, task_data.splits["train"], tokenizer, arguments.max_length)
    batches = epoch_batches(
        join_tasks(Taxonomy((task,)), {task.name: split}),
        batch_size=arguments.batch_size,
        seed=0,
        pad_id=tokenizer.pad_id,
        num_epochs=1,
    )
    order = itertools.cycle(range(batches.num_steps))
    turns = [[batches.batch(next(order)) for _ in range(arguments.steps)] for _ in range(arguments.turns)]
    warm_up = [batches.batch(step) for step in _covering(batches, arguments.warm_up)]
    sides = {"Classer": classer_side(arguments, folder, task), "PyTorch": torch_side(arguments, folder, task)}
    for step in sides.values():
        for batch in warm_up:
            step(batch)

    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in tqdm(turns, desc="turns", unit="turn"):
        for name, step in sides.items():
            started = time.perf_counter()
            for batch in turn:
                step(batch)
            rates[name].append(len(turn) * arguments.batch_size / (time.perf_counter() - started))
    lengths = sorted({batches.plan.planned(step).length for step in range(batches.num_steps)})
    ratios = [ours / theirs for ours, theirs in zip(rates["Classer"], rates["PyTorch"], strict=True)]
    print(f"\n{task.name}, batches of {arguments.batch_size}, lengths {lengths}, dropout {arguments.dropout}, "
          f"allocator {'tuned' if arguments.tuned_allocator else 'as it comes'}")  # fmt: skip
    for name, values in rates.items():
        print(f"  {name:8} {statistics.median(values):7.1f} examples/s  ({min(values):.1f} to {max(values):.1f})")
    print(f"  ratio    {statistics.median(ratios):7.2f}  ({min(ratios):.2f} to {max(ratios):.2f}, turn by turn)")


def _covering(batches: Batches, count: int) -> list[int]:
    """The first steps, and one of every batch shape."""
    first_of = {}
    for step in range(batches.num_steps):
        first_of.setdefault(batches.batch(step).tokens_BS.shape, step)
    return [*first_of.values(), *range(count)]


def classer_side(arguments: FinetuneArguments, folder: Path, task: Task) -> Callable[[Batch], float]:
    """A step of the library's own training code; returns the loss, and so waits for the device."""
    import jax.numpy as jnp

    from classer.model.classifier import TextClassifier
    from classer.train.step import LossConfig, init_state, learning_rate_schedule, make_optimizer, make_train_step
    from classer.train.trainer import initial_params

    encoder, weights = load_encoder(folder)
    recipe = Recipe()
    model = TextClassifier(encoder, len(task.labels), jnp.bfloat16, dropout=arguments.dropout)
    optimizer = make_optimizer(recipe, learning_rate_schedule(recipe, 10_000))
    train_step = make_train_step(model, Taxonomy((task,)).table, optimizer, LossConfig(recipe.label_smoothing))
    state = init_state(initial_params(model, weights, seed=0), optimizer)

    def step(batch: Batch) -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics.loss.item()

    return step


def torch_side(arguments: FinetuneArguments, folder: Path, task: Task) -> Callable[[Batch], float]:
    """The same with transformers' BertModel."""
    import torch
    import transformers

    recipe = Recipe()
    torch.set_num_threads(arguments.threads)
    encoder = transformers.AutoModel.from_pretrained(
        folder,
        hidden_dropout_prob=arguments.dropout,
        attention_probs_dropout_prob=arguments.dropout,
        add_pooling_layer=False,
    ).train()
    head = torch.nn.Linear(encoder.config.hidden_size, len(task.labels))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.999), weight_decay=recipe.weight_decay, fused=True
    )
    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)

    def step(batch: Batch) -> float:
        tokens_BS = torch.from_numpy(batch.tokens_BS).long()
        mask_BS = torch.arange(tokens_BS.shape[1]) < torch.from_numpy(batch.lengths_B)[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            hidden_BSD = encoder(input_ids=tokens_BS, attention_mask=mask_BS.long()).last_hidden_state
            pooled_BD = (hidden_BSD * mask_BS[..., None]).sum(1) / mask_BS.sum(1, keepdim=True).clamp(min=1)
            logits_BL = head(pooled_BD)
        loss = loss_fn(logits_BL.float(), torch.from_numpy(batch.targets_BL.argmax(1)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    given = tyro.cli(FinetuneArguments, description=__doc__)
    if given.tuned_allocator:
        tune_allocator()
    sys.exit(run(lambda _: main(given), ()))
