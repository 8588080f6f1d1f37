"""Breaks named properties on purpose, one at a time in a copy of the checkout, and shows which test fails.

    .venv/bin/python tools/dev/break_properties.py [PART OF A NAME ...]

A property whose break no test notices is a hole in the tests: the command then exits with 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("data", "model", "train", "serve", "tools", "tests")


@dataclasses.dataclass(frozen=True)
class Break:
    """A property, the line that holds it, what breaks it, and where its tests are."""

    name: str
    file: str
    line: str
    broken: str
    tests: str


BREAKS = (
    Break(
        "a tree's leaves sum to one",
        "model/decode.py",
        "given_parent_NL[:, level] *= given_parent_NL[:, task.parent_L[level]]",
        "given_parent_NL[:, level] *= 1",
        "tests/model/test_decode.py",
    ),
    Break(
        "an example's loss sees its own task alone",
        "train/losses.py",
        "mine_BL = (tasks_B[:, None] == jnp.asarray(table.task_L)) & ~table.exclusive_L",
        "mine_BL = ~table.exclusive_L",
        "tests/train/test_losses.py",
    ),
    Break(
        "a curriculum goes through each task's examples in turn",
        "data/curriculum.py",
        "begin_T, end_T = self.due(window * WINDOW), self.due((window + 1) * WINDOW)",
        "begin_T, end_T = self.due(0), self.due(WINDOW)",
        "tests/data/test_curriculum.py",
    ),
    Break(
        "texts to be measured on are not learnt from as soft examples",
        "train/datasets.py",
        "seen = {id(example) for _, example in find_duplicates(measured, extra)}",
        "seen = set()",
        "tests/train/test_soft_labels.py",
    ),
    Break(
        "every example comes once an epoch",
        "data/plans.py",
        "left_over = rows[full:]",
        "left_over = rows[full + 1 :]",
        "tests/data/test_pipeline.py",
    ),
    Break(
        "resuming continues with the very next batch",
        "data/pipeline.py",
        'self._next_step = state["next_step"]',
        'self._next_step = state["next_step"] + 1',
        "tests/data/test_pipeline.py",
    ),
    Break(
        "filler rows have no weight",
        "data/pipeline.py",
        "weights_B = (np.arange(batch_size) < count).astype(np.float32)",
        "weights_B = np.ones(batch_size, np.float32)",
        "tests/data/test_pipeline.py",
    ),
    Break(
        "a duplicate id is refused",
        "data/readers.py",
        "if earlier != row.source:",
        "if False:",
        "tests/data/test_readers.py",
    ),
    Break(
        "duplicates are found whatever their case",
        "data/splits.py",
        'unicodedata.normalize("NFKC", text).casefold()',
        'unicodedata.normalize("NFKC", text)',
        "tests/data/test_splits.py",
    ),
    Break(
        "padding takes no part in attention",
        "model/focus.py",
        "jnp.where(real_BS, 0.0, MASKED_SCORE)",
        "jnp.where(real_BS, 0.0, 0.0)",
        "tests/model/test_encoder.py",
    ),
    Break(
        "a row of padding alone is finite",
        "model/focus.py",
        "MASKED_SCORE = -1e9",
        'MASKED_SCORE = float("-inf")',
        "tests/model/test_encoder.py",
    ),
    Break(
        "attention scores are scaled by the head's width",
        "model/layers.py",
        "scores_BHST * c.head_dim**-0.5",
        "scores_BHST * c.d_model**-0.5",
        "tests/model/test_encoder.py",
    ),
    Break(
        "a kept token keeps its position",
        "model/focus.py",
        "positions_BK=jnp.take_along_axis(tokens.positions_BK, indices_BK, axis=1)",
        "positions_BK=tokens.positions_BK[:, :length]",
        "tests/model/test_focus.py",
    ),
    Break(
        "a row keeps a share of its own length",
        "model/focus.py",
        "kept_B = kept_lengths(lengths_B, units)",
        "kept_B = jnp.minimum(left_B, length)",
        "tests/model/test_focus.py",
    ),
    Break(
        "a layer drops tokens before its feed-forward",
        "model/layers.py",
        "        x_ND, tokens = self._focused(x_ND, tokens, lengths_B, draw, index)\n        feed_forward_norm",
        "        feed_forward_norm",
        "tests/model/test_focus.py",
    ),
    Break(
        "special tokens are always kept",
        "model/focus.py",
        "jnp.where(special_BS, SURE, gate_BS)",
        "gate_BS",
        "tests/model/test_focus.py",
    ),
    Break(
        "gradients reach the gate",
        "model/focus.py",
        "jax.nn.log_sigmoid((scores_BS - threshold_B1) / temperature)",
        "lax.stop_gradient(jax.nn.log_sigmoid((scores_BS - threshold_B1) / temperature))",
        "tests/model/test_focus.py",
    ),
    Break(
        "LayerNorm's gradient is right",
        "model/ops.py",
        "- normed_ND * along_N1",
        "+ normed_ND * along_N1",
        "tests/model/test_encoder.py",
    ),
    Break(
        "a weight's gradient is right",
        "model/ops.py",
        "return _dot(x_DN, g_NF, 1, 0)",
        "return 2 * _dot(x_DN, g_NF, 1, 0)",
        "tests/model/test_encoder.py",
    ),
    Break(
        "INT8 products stay s8 × s8 → s32",
        "model/quantize.py",
        "lax.dot_general(int8_ND, kernel_DF,",
        "lax.dot_general(int8_ND.astype(jnp.int32), kernel_DF.astype(jnp.int32),",
        "tests/model/test_quantize.py",
    ),
    Break(
        "a file that was changed is refused",
        "model/manifest.py",
        'if sha256_of(file) != expected["sha256"]:',
        "if False:",
        "tests/model/test_bundle.py",
    ),
    Break(
        "a bundle that computes something else is refused",
        "model/bundle.py",
        "if not difference <= tolerance:",
        "if False:",
        "tests/model/test_bundle.py",
    ),
    Break(
        "a newer format is refused",
        "model/manifest.py",
        "if version > self.format_version:",
        "if False:",
        "tests/model/test_bundle.py",
    ),
    Break(
        "multilabel uses sigmoids, not a softmax",
        "train/losses.py",
        "losses_BL = optax.sigmoid_binary_cross_entropy(logits_BL, targets_BL)",
        "losses_BL = -targets_BL * jax.nn.log_softmax(logits_BL)",
        "tests/train/test_losses.py",
    ),
    Break(
        "filler rows count for nothing in the loss",
        "train/losses.py",
        "(losses_B * weights_B).sum()",
        "losses_B.sum()",
        "tests/train/test_losses.py",
    ),
    Break(
        "biases and norms do not decay",
        "train/step.py",
        'lambda path, _: path[-1].key in ("kernel", "table")',
        "lambda path, _: True",
        "tests/train/test_step.py",
    ),
    Break(
        "an epoch that was clearly better than the last is kept",
        "train/trainer.py",
        "if progress.best_step != int(state.step):",
        "if False:",
        "tests/train/test_trainer.py",
    ),
    Break(
        "a resumed run equals an uninterrupted one",
        "train/trainer.py",
        "iterator.set_state(progress.data)",
        "pass",
        "tests/train/test_trainer.py",
    ),
    Break(
        "a folder that holds another run is refused",
        "train/run.py",
        "(not job.out.is_dir() or any(file.name not in ours for file in job.out.iterdir()))",
        "False",
        "tests/train/test_run.py",
    ),
    Break(
        "calibration never makes dev likelihood worse",
        "train/calibration.py",
        "MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 10.0",
        "MIN_TEMPERATURE, MAX_TEMPERATURE = 9.0, 10.0",
        "tests/train/test_calibration.py",
    ),
    Break(
        "ECE has fifteen bins of equal width",
        "train/metrics.py",
        "NUM_BINS = 15",
        "NUM_BINS = 5",
        "tests/train/test_metrics.py",
    ),
    Break(
        "a text is answered only for its own task's labels",
        "serve/core/answers.py",
        "taxonomy.slice_of(task.name)",
        "slice(0, len(task.labels))",
        "tests/serve/core/test_answers.py",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="break only properties with one of these in their names"
    )
    parts = parser.parse_args().parts
    chosen = [item for item in BREAKS if not parts or any(part in item.name for part in parts)]
    if not chosen:
        parser.error(f"no property has {' or '.join(parts)} in its name")
    missed = []
    print("# Properties and the tests that hold them\n")
    print("Made by `tools/dev/break_properties.py`, which breaks each property in a copy and runs its tests.\n")
    print("| property | broken on purpose in | tests that then fail |\n|---|---|---|")
    for item in tqdm(chosen, unit="break"):
        failed = failing_tests(item)
        if not failed:
            missed.append(item.name)
        print(
            f"| {item.name} | `{item.file}` | {', '.join(f'`{name}`' for name in failed) or '**none**'} |", flush=True
        )
    if missed:
        print(f"No test noticed: {'; '.join(missed)}.", file=sys.stderr)
    return 1 if missed else 0


def failing_tests(item: Break) -> list[str]:
    """The names of the first tests (at most three) that fail once the property is broken."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "classer"
        copy.mkdir()
        for room in ROOMS:
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("__init__.py", "pyproject.toml"):
            shutil.copy(ROOT / file, copy / file)
        target = copy / item.file
        source = target.read_text(encoding="utf-8")
        if source.count(item.line) < 1:
            raise SystemExit(f"{item.file} no longer holds the line of '{item.name}': {item.line}")
        target.write_text(source.replace(item.line, item.broken), encoding="utf-8")
        tests = [name for name in item.tests.split() if (copy / name).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "-p", "no:cacheprovider", "-rfE", *tests]
        # The copy comes before the installed package.
        beside = ROOT.parent / "shared" / "datasets"
        environment = {**os.environ, "PYTHONPATH": folder, "CLASSER_DATASETS": str(beside)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    names = re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, re.MULTILINE)
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
