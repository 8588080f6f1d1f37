"""A teacher for `classer teach`: a large encoder of transformers, fine-tuned on one task with PyTorch.

    .venv/bin/python tools/dev/finetune_teacher.py --encoder FOLDER --data FOLDER --out runs/teacher

Teachers are larger than what is served, and often of families that Classer does not run itself (MPNet, DeBERTa); so
they are trained with PyTorch, on a CUDA GPU if there is one. Needs the extra `teachers`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from classer.data.errors import InputError
from classer.data.examples import Example
from classer.data.readers import read_task_folder
from classer.data.splits import stratified_split
from classer.data.taxonomy import Task
from classer.tools.cli.main import run
from classer.train.teach import import_torch, torch_device


@dataclasses.dataclass(frozen=True)
class FinetuneTeacherArguments:
    """
    Attributes:
      encoder: a folder of transformers, or a name on the Hugging Face hub.
      data: a folder with task.json; a share of its split `train` is set aside to watch the progress.
      out: a new folder for the teacher.
      epochs: passes over the training examples.
      batch_size: examples per step.
      learning_rate: peak learning rate.
      max_length: tokens that a text is cut to.
      seed: seed of the split, the shuffles and the head.
    """

    encoder: str
    data: Path
    out: Path
    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 5e-5
    max_length: int = 64
    seed: int = 0


def main(a: FinetuneTeacherArguments) -> None:
    torch, transformers = import_torch("tools/dev/finetune_teacher.py")
    if a.out.exists():
        raise InputError(f"{a.out} exists already and was not touched; name a new folder with --out.")
    folder = read_task_folder(a.data, ("train",))
    if "train" not in folder.splits:
        raise InputError(f"{a.data} has no split 'train'.")
    task = folder.task
    answers = [name for name, leaf in zip(task.label_names, task.leaves_L, strict=True) if leaf]
    train, dev = stratified_split(folder.splits["train"], 0.05, a.seed)
    torch.manual_seed(a.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.encoder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        a.encoder, id2label=dict(enumerate(answers)), label2id={name: i for i, name in enumerate(answers)}
    ).to(torch_device(torch))
    steps = a.epochs * -(-len(train) // a.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.learning_rate, weight_decay=0.01, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    rng = np.random.default_rng(a.seed)
    with tqdm(total=steps, unit="step", mininterval=5) as bar:
        for epoch in range(a.epochs):
            model.train()
            for batch in _batches(train, a.batch_size, rng):
                inputs, targets = _tensors(torch, tokenizer, task, answers, batch, a.max_length, model.device)
                with torch.autocast(model.device.type, torch.bfloat16):
                    logits_BL = model(**inputs).logits
                loss = _loss(torch, task, logits_BL.float(), targets)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_description(f"loss {loss.item():.3f}", refresh=False)
            right = _right(torch, tokenizer, model, task, answers, dev, a)
            bar.write(f"epoch {epoch + 1}/{a.epochs} · {right / len(dev):.2%} of {len(dev):,} held-out examples right")
    model.save_pretrained(a.out)
    tokenizer.save_pretrained(a.out)
    print(f"Ask it:  classer teach --teacher {a.out} --data {a.data} --out soft.jsonl")


def _batches(examples: list[Example], size: int, rng: np.random.Generator) -> list[list[Example]]:
    """Shuffled, but for texts of like length in a batch."""
    shuffled = [examples[i] for i in rng.permutation(len(examples))]
    pools = [sorted(shuffled[i : i + 50 * size], key=lambda e: len(e.text)) for i in range(0, len(examples), 50 * size)]
    batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _tensors(
    torch: Any, tokenizer: Any, task: Task, answers: list[str], batch: list[Example], length: int, device: Any
) -> Any:
    texts = [example.text for example in batch]
    inputs = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    targets_BL = torch.tensor([[float(name in example.labels) for name in answers] for example in batch])
    return inputs.to(device), targets_BL.to(device)


def _loss(torch: Any, task: Task, logits_BL: Any, targets_BL: Any) -> Any:
    if task.kind.exclusive:
        return torch.nn.functional.cross_entropy(logits_BL, targets_BL, label_smoothing=0.05)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits_BL, targets_BL, reduction="sum") / len(logits_BL)


def _right(
    torch: Any,
    tokenizer: Any,
    model: Any,
    task: Task,
    answers: list[str],
    dev: list[Example],
    a: FinetuneTeacherArguments,
) -> int:
    """Number of examples that get exactly their labels (multilabel: at 0.5)."""
    model.eval()
    right = 0
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16):
        for start in range(0, len(dev), a.batch_size):
            batch = dev[start : start + a.batch_size]
            inputs, targets_BL = _tensors(torch, tokenizer, task, answers, batch, a.max_length, model.device)
            logits_BL = model(**inputs).logits
            best_BL = (logits_BL == logits_BL.amax(-1, keepdim=True)) if task.kind.exclusive else logits_BL > 0
            right += int((best_BL == (targets_BL > 0.5)).all(-1).sum())
    return right


if __name__ == "__main__":
    sys.exit(
        run(lambda argv: main(tyro.cli(FinetuneTeacherArguments, args=list(argv), description=__doc__)), sys.argv[1:])
    )
