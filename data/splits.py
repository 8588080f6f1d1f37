"""Splits of labelled examples: a stratified development split, and a search for texts in two splits."""

from __future__ import annotations

import collections
import random
import unicodedata
from collections.abc import Sequence

from .errors import InputError
from .examples import Example


def stratified_split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Sets about `fraction` of the examples aside for development, stratified by label.

    An example belongs to the stratum of its rarest label. Each stratum, and the whole, gives `fraction` of its examples
    to within one example. Every label keeps at least one example in train. The result depends only on the examples,
    the fraction and the seed. Both parts keep the order of the source.

    Args:
      examples: of one task.
      fraction: the share for dev, strictly between 0 and 1.
      seed: seeds the choice of examples within the strata.

    Returns:
      (train, dev).

    Raises:
      InputError: there are too few examples to set any aside.
      ValueError: `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1; it is {fraction}.")
    counts = collections.Counter(label for example in examples for label in example.labels)
    strata: dict[str, list[int]] = collections.defaultdict(list)
    for i, example in enumerate(examples):
        strata[min(example.labels, key=lambda label: (counts[label], label), default="")].append(i)

    # Systematic sampling: the shuffled strata are concatenated, and every (1/fraction)-th example is chosen.
    rng = random.Random(seed)
    order = sorted(strata)
    rng.shuffle(order)
    row: list[int] = []
    for label in order:
        rng.shuffle(strata[label])
        row += strata[label]
    phase = rng.random()
    chosen = {i for k, i in enumerate(row) if int(fraction * (k + 1) + phase) > int(fraction * k + phase)}

    in_train = {label for i, example in enumerate(examples) if i not in chosen for label in example.labels}
    for i in sorted(chosen):
        if not in_train.issuperset(examples[i].labels):
            chosen.remove(i)
            in_train.update(examples[i].labels)
    if not chosen:
        raise InputError(
            f"{len(examples)} examples of {len(counts)} labels are too few to set {100 * fraction:.3g}% of them aside "
            f"for development, as each label needs one to train on; add examples or give a development file."
        )
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


def find_duplicates(train: Sequence[Example], test: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Finds the texts of `test` that are also in `train`, compared by `comparable`.

    Returns:
      A pair (train example, test example) for each duplicated test example, with the first equal train example.
    """
    first_with: dict[str, Example] = {}
    for example in train:
        first_with.setdefault(comparable(example.text), example)
    pairs = ((first_with.get(comparable(example.text)), example) for example in test)
    return [(twin, example) for twin, example in pairs if twin is not None]


def describe_duplicates(pairs: Sequence[tuple[Example, Example]], train_name: str, test_name: str) -> str | None:
    """A message for the user about the pairs of `find_duplicates`; None if there are none."""
    if not pairs:
        return None
    twin, example = pairs[0]
    contradicting = sum(set(a.labels) != set(b.labels) for a, b in pairs)
    texts = "1 text" if len(pairs) == 1 else f"{len(pairs):,} texts"
    sentence = (
        f"{texts} of {test_name} also in {train_name} (equal but for case and white space), "
        f"the first at {example.source} and {twin.source}"
    )
    if contradicting:
        sentence += f"; {contradicting:,} of them with other labels there"
    return f"{sentence}. They make scores on {test_name} look better than they are."


def comparable(text: str) -> str:
    """The form in which texts are compared for duplicates: NFKC, case-folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
