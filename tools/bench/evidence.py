"""Faithfulness of Focused Attention's evidence by ERASER's two measures, against attention weights and random tokens.

    .venv/bin/python tools/bench/evidence.py runs/imdb/bundle-float32 --data FOLDER

For each text the dense classifier's most probable label is taken, and a share of its tokens as evidence, in three ways:
those that Focused Attention keeps to its last layer at that share; those that the last layer attends to most (the mean
over heads and over the tokens that attend); and random ones. Then (DeYoung et al. 2020,
https://arxiv.org/abs/1911.03429, section 4):

- comprehensiveness: how far the label's probability falls when the evidence is taken out of the text: higher is better;
- sufficiency: how far it falls when nothing but the evidence is left: lower is better.

The probabilities are the dense classifier's throughout, so that all three ways are judged by the same model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from classer.data.buckets import BUCKETS, bucket_for, pad_batch
from classer.data.errors import InputError
from classer.data.readers import read_task_folder
from classer.data.taxonomy import Task
from classer.model.bundle import Bundle, load_bundle
from classer.model.classifier import TextClassifier
from classer.model.focus import Focus, kept_length
from classer.model.predict import Predictor
from classer.model.quantize import unflatten
from classer.tools.cli.main import run
from classer.train.tokenized import tokenize

BATCH_SIZE = 32
WAYS = ("kept tokens", "attention weights", "random tokens")


@dataclasses.dataclass(frozen=True)
class EvidenceArguments:
    """
    Attributes:
      bundle: a float32 bundle trained for focus.
      data: a folder with task.json.
      split: which of its splits.
      texts: how many texts, drawn at random.
      shares: shares of a text's tokens that are taken as evidence.
      seed: seed of the draws of texts and random tokens.
      out: a JSON file for the results.
    """

    bundle: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")]
    data: Path
    split: str = "test"
    texts: int = 1000
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    seed: int = 0
    out: Path | None = None


def main(argv: Sequence[str]) -> None:
    a = tyro.cli(EvidenceArguments, args=list(argv), description=__doc__)
    bundle = load_bundle(a.bundle)
    if bundle.precision != "float32":
        raise InputError(f"{a.bundle} is {bundle.precision}; give the float32 bundle of the run.")
    (task,) = bundle.taxonomy.tasks
    split = tokenize(task, read_task_folder(a.data).splits[a.split], bundle.tokenizer, bundle.max_length)
    texts = [row for row in split.sample(a.texts, a.seed).ids if len(row) > 2]
    dense = bundle.predictor()
    before_NL = bundle.probabilities(task.name, dense.logits(texts))
    labels_N = before_NL.argmax(axis=1)
    before_N = before_NL[np.arange(len(texts)), labels_N]
    attention = attention_received(bundle, texts)
    rng = np.random.default_rng(a.seed)

    results: dict[str, dict[str, dict[str, float]]] = {}
    for share in tqdm(a.shares, desc="Shares", unit="share"):
        counts = [kept_length(len(row), round(share * 1024)) - 2 for row in texts]
        evidence = {
            WAYS[0]: kept_words(bundle, texts, share),
            WAYS[1]: [best(scores, n) for scores, n in zip(attention, counts, strict=True)],
            WAYS[2]: [best(rng.random(len(row)), n) for row, n in zip(texts, counts, strict=True)],
        }
        for way, places in evidence.items():
            rows = list(zip(texts, places, strict=True))
            without = falls(dense, bundle, task, labels_N, before_N, [edit(row, p, keep=False) for row, p in rows])
            alone = falls(dense, bundle, task, labels_N, before_N, [edit(row, p, keep=True) for row, p in rows])
            results.setdefault(way, {})[f"{share:g}"] = {"comprehensiveness": without, "sufficiency": alone}

    print(f"\n{task.name}, {len(texts):,} texts of {a.split}; the mean fall of the label's probability")
    print("\n| evidence | " + " | ".join(f"{name} at {s:.0%}" for name in ("compr.", "suff.") for s in a.shares) + " |")
    print("|---" * (1 + 2 * len(a.shares)) + "|")
    for way, by_share in results.items():
        cells = [by_share[f"{s:g}"][name] for name in ("comprehensiveness", "sufficiency") for s in a.shares]
        print(f"| {way} | " + " | ".join(f"{value:.3f}" for value in cells) + " |")
    if a.out is not None:
        a.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def kept_words(bundle: Bundle, texts: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """The positions, without special tokens, that the last layer reads at a focus which falls to `share`."""
    num_layers = bundle.encoder.num_layers
    focus = Focus.from_shares([share ** (layer / num_layers) for layer in range(1, num_layers + 1)])
    predictor = bundle.predictor(focus=focus)
    places: list[np.ndarray] = []
    for row in texts:
        program = predictor.compile(1, bucket_for(len(row), BUCKETS))
        _, (kept,) = program.explain(*pad_batch([row], 1, program.length, 0))
        positions_K = kept.positions_K
        places.append(positions_K[(positions_K > 0) & (positions_K < len(row) - 1)])
    return places


def attention_received(bundle: Bundle, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The mean attention, over heads and queries, that each token receives in the last layer of the dense encoder."""
    config = bundle.encoder
    if config.rope_base is not None:
        raise InputError("Attention weights are computed here for encoders with learned positions only.")
    model = TextClassifier(config, bundle.taxonomy.num_labels)
    params = jax.device_put({"params": unflatten(bundle.weights)})

    @jax.jit
    def received(params: Any, tokens_1S: jax.Array, lengths_1: jax.Array) -> jax.Array:
        _, captured = model.apply(params, tokens_1S, lengths_1, capture_intermediates=True, mutable=["intermediates"])
        last: Any = captured["intermediates"]["encoder"][f"layer_{config.num_layers - 1}"]
        qkv_SE = last["attention"]["qkv"]["__call__"][0]
        query, key, _ = (
            x.reshape(-1, config.num_heads, config.head_dim).transpose(1, 0, 2) for x in jnp.split(qkv_SE, 3, axis=1)
        )
        real_S = jnp.arange(tokens_1S.shape[1]) < lengths_1[0]
        scores_HST = jnp.einsum("HSK,HTK->HST", query, key) * config.head_dim**-0.5
        weights_HST = jax.nn.softmax(jnp.where(real_S, scores_HST, -jnp.inf), axis=-1)
        return jnp.where(real_S[:, None], weights_HST, 0.0).mean(axis=0).sum(axis=0) / lengths_1[0]

    scores = []
    for row in tqdm(texts, desc="Attention", unit="text"):
        tokens_1S, lengths_1 = pad_batch([row], 1, bucket_for(len(row), BUCKETS), 0)
        scores.append(np.asarray(received(params, tokens_1S, lengths_1))[: len(row)])
    return scores


def best(scores_S: np.ndarray, count: int) -> np.ndarray:
    """The positions of the `count` highest scores, without special tokens."""
    return 1 + np.argsort(-scores_S[1:-1], kind="stable")[: max(count, 0)]


def edit(row: np.ndarray, places: np.ndarray, keep: bool) -> np.ndarray:
    """The tokens at those positions (`keep`) or the tokens at the others; special tokens always stay."""
    chosen = np.isin(np.arange(len(row)), places) == keep
    chosen[[0, -1]] = True
    return row[chosen]


def falls(
    dense: Predictor, bundle: Bundle, task: Task, labels_N: np.ndarray, before_N: np.ndarray, texts: list[np.ndarray]
) -> float:
    """The mean decrease of the probability of each text's label."""
    after_NL = bundle.probabilities(task.name, dense.logits(texts))
    return float((before_N - after_NL[np.arange(len(texts)), labels_N]).mean())


if __name__ == "__main__":
    import sys

    raise SystemExit(run(main, sys.argv[1:]))
