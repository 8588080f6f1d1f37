"""Makes a corpus for `classer prepare` from real texts, with duplicates, near-duplicates and contamination planted.

    python tools/dev/make_prepare_corpus.py --datasets ../shared/datasets --rows 2000000 --out runs/corpus

Base texts are sentences of the data sets' training texts, joined at random, so that no two resemble each other by
themselves. Planted rows and their sources are listed in planted.jsonl; `--check FOLDER` compares a prepared folder
with it and prints the recall of each kind.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

ROWS_PER_FILE = 250_000
# Kind → share of all rows.
PLANTED = {
    "duplicate": 0.05,
    "near-duplicate": 0.05,
    "evaluation": 0.005,
    "evaluation-near": 0.005,
    "evaluation-inside": 0.005,
}
BAD = 0.001


def read_texts(datasets: Path, split: str) -> Iterator[str]:
    for file in sorted(datasets.glob(f"*/{split}.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def sentences(texts: Iterator[str]) -> list[str]:
    """Pieces of 40 to 240 characters, distinct."""
    pieces = dict.fromkeys(
        piece.strip() for text in texts for piece in text.replace("\n", " ").replace("! ", ". ").split(". ")
    )
    return [piece for piece in pieces if 40 <= len(piece) <= 240]


def edited(text: str, rng: random.Random) -> str:
    """One word in each full 24, at least one, is dropped or doubled (up to 8 words: doubled): a near-duplicate."""
    words = text.split()
    for _ in range(max(1, len(words) // 24)):
        at = rng.randrange(len(words))
        words[at : at + 1] = [] if rng.random() < 0.5 and len(words) > 8 else [words[at], words[at]]
    return " ".join(words)


def looks_same(text: str, rng: random.Random) -> str:
    """The same text in other case and white space."""
    return rng.choice((text, text.upper(), f"  {text}\n", text.replace(" ", "  ")))


class Corpus:
    """Makes rows and records the planted ones."""

    def __init__(self, datasets: Path, seed: int) -> None:
        self._rng = random.Random(seed)
        self._pieces = sentences(read_texts(datasets, "train"))
        self.evaluation = list(dict.fromkeys(t for t in read_texts(datasets, "test") if len(t) >= 80))[:50_000]
        self._seen: list[tuple[str, str]] = []

    def base(self) -> str:
        return ". ".join(self._rng.sample(self._pieces, self._rng.choice((1, 2, 2, 3, 4))))

    def row(self) -> tuple[str, str]:
        """(text, kind): the kind is "base", "bad" or one of `PLANTED`."""
        rng = self._rng
        kind = rng.choices([*PLANTED, "bad", "base"], [*PLANTED.values(), BAD, 1 - BAD - sum(PLANTED.values())])[0]
        if kind in ("duplicate", "near-duplicate"):
            kind = kind if self._seen else "base"
        if kind == "duplicate":
            return looks_same(rng.choice(self._seen)[0], rng), kind
        if kind == "near-duplicate":
            return edited(rng.choice(self._seen)[0], rng), kind
        if kind == "evaluation":
            return looks_same(rng.choice(self.evaluation), rng), kind
        if kind == "evaluation-near":
            return edited(rng.choice(self.evaluation), rng), kind
        if kind == "evaluation-inside":
            return f"{self.base()}. {rng.choice(self.evaluation)} {self.base()}", kind
        if kind == "bad":
            return rng.choice(("", "   ", "\0")), kind
        text = self.base()
        # A reservoir of texts of two pieces and more, which are unlikely to come by themselves again.
        if len(text) >= 120:
            if len(self._seen) < 200_000:
                self._seen.append((text, ""))
            else:
                self._seen[rng.randrange(len(self._seen))] = (text, "")
        return text, kind


def make(datasets: Path, rows: int, out: Path, seed: int) -> None:
    out.mkdir(parents=True)
    corpus = Corpus(datasets, seed)
    (out / "train").mkdir()
    with (out / "evaluation.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in corpus.evaluation)
    rng = random.Random(seed + 1)
    with (out / "planted.jsonl").open("w") as planted, tqdm(total=rows, unit=" rows", unit_scale=True) as bar:
        for first in range(0, rows, ROWS_PER_FILE):
            name = f"part-{first // ROWS_PER_FILE:03d}.jsonl"
            with (out / "train" / name).open("w", encoding="utf-8") as file:
                for number in range(1, min(ROWS_PER_FILE, rows - first) + 1):
                    text, kind = corpus.row()
                    row = {"text": text, "label": f"label {rng.randrange(40)}"}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    if kind != "base":
                        planted.write(json.dumps({"file": name, "row": number, "kind": kind}) + "\n")
                    bar.update(1)


def check(out: Path, prepared: Path) -> None:
    """Prints, of each planted kind, how many were dropped, and how many other rows were."""
    with (prepared / "dropped.jsonl").open(encoding="utf-8") as lines:
        dropped = {(Path(d["file"]).name, d["row"]): d["reason"] for d in map(json.loads, lines)}
    reasons: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with (out / "planted.jsonl").open() as lines:
        for line in lines:
            p = json.loads(line)
            reasons[p["kind"]][dropped.pop((p["file"], p["row"]), "kept")] += 1
    for kind, found in sorted(reasons.items()):
        total = found.total()
        print(f"{kind:18} {total:8,} planted, {1 - found['kept'] / total:8.3%} dropped: {dict(found.most_common())}")
    print(f"not planted: {collections.Counter(dropped.values())} dropped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=Path, default=Path("../shared/datasets"), help="folder of task folders")
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows to make")
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--check", type=Path, help="a prepared folder to hold against the corpus in --out")
    a = parser.parse_args()
    if a.check:
        for file in (a.check / "dropped.jsonl", a.out / "planted.jsonl"):
            if not file.is_file():
                parser.error(f"There is no {file}; --check names what `classer prepare` made of the corpus in --out.")
        check(a.out, a.check)
    elif not any(a.datasets.glob("*/train.jsonl.gz")):
        parser.error(f"{a.datasets} holds no data sets (folders with a train.jsonl.gz); name a folder with --datasets.")
    elif a.out.exists():
        parser.error(f"{a.out} exists already and was not touched; name a new folder with --out.")
    else:
        make(a.datasets, a.rows, a.out, a.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
