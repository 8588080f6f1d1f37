"""Swaps one version of a model for another under load, repeatedly, and counts failed requests and wrong answers.

    .venv/bin/python tools/bench/swaps.py --bundle runs/banking77/bundle

Everything runs in this process, on loopback. The versions differ in their heads: an answer tells which one gave it.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
from tqdm import tqdm

from classer.data.errors import InputError
from classer.tools.bench.serving import Serving
from classer.tools.cli.load_runner import resident_mb

if TYPE_CHECKING:
    from classer.serve.client.client import Classification


@dataclasses.dataclass(frozen=True)
class SwapsArguments:
    """Swaps a bundle for one whose head is another, and back, again and again, under load; checks every answer.

    Attributes:
      bundle: the bundle to serve.
      swaps: number of swaps.
      callers: unary calls in flight.
      pause: seconds from one swap to the next.
    """

    bundle: Path
    swaps: int = 100
    callers: int = 8
    pause: float = 0.2


@dataclasses.dataclass
class Swapped:
    """Results of the swaps.

    Attributes:
      answers: the version of each answer.
      wrong: answers that are not what the version that they name computes, or of a version that did not serve then.
      failed: the errors of failed calls.
      megabytes: resident memory before the first swap and after each.
      seconds: the duration of each swap.
    """

    answers: list[str] = dataclasses.field(default_factory=list)
    wrong: list[Any] = dataclasses.field(default_factory=list)
    failed: list[Exception] = dataclasses.field(default_factory=list)
    megabytes: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def swap(a: SwapsArguments) -> Swapped:
    """Prints failed requests, wrong answers and the growth of memory over many swaps."""
    from classer.serve.client.client import Client
    from classer.serve.proto import classifier_pb2 as pb

    with tempfile.TemporaryDirectory() as folder:
        bundles = [a.bundle, other_version(a.bundle, Path(folder))]
        known = Known(bundles)
        serving = Serving(bundles=(f"a={bundles[0]}",), loadable=(f"b={bundles[1]}",), admin_port=0)
        done, stop = Swapped(), threading.Event()
        order, serves = [known.versions[0]], 0  # which versions have served or are about to; from which on, surely

        def ask(number: int) -> None:
            with Client(serving.server.address) as client:
                while not stop.is_set():
                    text, first = known.texts[number % len(known.texts)], serves
                    try:
                        answer = client.classify(text, known.task, top_k=known.labels, timeout=60)
                    except Exception as error:
                        done.failed.append(error)
                        continue
                    done.answers.append(answer.model_version)
                    if answer.model_version not in order[first:] or not known.is_answer(text, answer):
                        done.wrong.append(answer)
                    number += 1

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(a.callers)]
        try:
            for thread in threads:
                thread.start()
            time.sleep(a.pause)
            done.megabytes.append(resident_mb(os.getpid()))
            with (
                serving.admin() as admin,
                tqdm(range(1, a.swaps + 1), desc="Swapping", unit="swap") as bar,
            ):
                for number in bar:
                    order.append(known.versions[number % 2])
                    begin = time.monotonic()
                    admin.LoadModel(pb.LoadModelRequest(bundle="ab"[number % 2], name="a"), timeout=120)
                    serves = number
                    done.seconds.append(time.monotonic() - begin)
                    time.sleep(a.pause)
                    done.megabytes.append(resident_mb(os.getpid()))
                    bar.set_postfix(
                        MB=round(done.megabytes[-1]),
                        answers=len(done.answers),
                        wrong=len(done.wrong),
                        failed=len(done.failed),
                    )
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
            serving.stop()
    sizes, tenth = done.megabytes, max(a.swaps // 10, 1)
    by_version = " and ".join(f"{count:,}" for count in collections.Counter(done.answers).values())
    first, last = statistics.median(sizes[tenth : 2 * tenth]), statistics.median(sizes[-tenth:])
    print(
        f"{a.swaps} swaps of {statistics.median(done.seconds):.1f} s; {len(done.failed)} requests failed, "
        f"{len(done.wrong)} of {len(done.answers):,} answers were wrong ({by_version} of the two versions)\n"
        f"resident memory: {sizes[0]:,.0f} MB before, {max(sizes):,.0f} MB at most after a swap, {sizes[-1]:,.0f} MB "
        f"at the end; medians of the second and the last tenth {first:,.0f} → {last:,.0f} MB ({last / first - 1:+.1%})"
    )
    return done


class Known:
    """What each of two versions must answer: its golden outputs, of the texts on which the two clearly differ.

    Attributes:
      versions: of the bundles, in their order.
      task: the one that is asked, the first.
      labels: how many it has.
      texts: those texts.
      scores: of each label, by version and text.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        from classer.model.bundle import GOLDEN_LENGTH, load_bundle
        from classer.model.manifest import read_json
        from classer.model.variants import AGREEMENT

        bundles = [load_bundle(path) for path in paths]
        task = bundles[0].taxonomy.tasks[0]
        self.versions, self.task, self.labels = [one.version for one in bundles], task.name, len(task.labels)
        self._tolerance = AGREEMENT
        self._always = {name for name, leaf in zip(task.label_names, task.leaves_L, strict=True) if leaf}
        self.scores = {
            bundle.version: {
                row["text"]: dict(zip(task.label_names, row["probabilities"][task.name], strict=True))
                for row in read_json(path / "golden.json")
            }
            for bundle, path in zip(bundles, paths, strict=True)
        }
        one, other = (self.scores[version] for version in self.versions)
        # Golden outputs are those of a text's first tokens; what is longer gets other answers from a server.
        ids = bundles[0].tokenizer.encode(list(one), GOLDEN_LENGTH + 1).ids
        whole = [text for text, row in zip(one, ids, strict=True) if len(row) <= GOLDEN_LENGTH]
        self.texts = [text for text in whole if _apart(one[text], other[text]) > 2 * AGREEMENT]
        if not self.texts:
            raise InputError(f"{paths[0]} has no golden text that tells the two versions apart.")

    def is_answer(self, text: str, answer: Classification) -> bool:
        """Whether an answer is what the version that it names computes, as far as precisions differ."""
        scores = {label.label: label.score for label in answer.labels}
        expected = self.scores[answer.model_version][text]
        # Of a tree an answer has the leaves, and of the labels above the one at which it stops.
        return self._always <= scores.keys() <= expected.keys() and _apart(scores, expected) <= self._tolerance


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The largest difference of a label's scores."""
    return max(abs(score - other[name]) for name, score in one.items())


def other_version(path: Path, folder: Path) -> Path:
    """The same bundle but for its head, whose rows all stand one label further; with golden outputs of its own."""
    from classer.model.bundle import load_bundle, save_bundle

    bundle = load_bundle(path)
    kernel = np.roll(bundle.weights["head.kernel"], 1, axis=-1)
    save_bundle(dataclasses.replace(bundle, weights={**bundle.weights, "head.kernel": kernel}), folder / "other")
    return folder / "other"


if __name__ == "__main__":
    swap(tyro.cli(SwapsArguments, description=__doc__))
