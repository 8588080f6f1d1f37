import collections
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classer.data.errors import InputError
from classer.data.examples import Example
from classer.data.splits import describe_duplicates, find_duplicates, stratified_split


def examples_of(*labels: tuple[str, ...] | str) -> list[Example]:
    rows = [(label,) if isinstance(label, str) else label for label in labels]
    return [Example(f"text {n}", row, "t", source=f"row {n}") for n, row in enumerate(rows)]


label_sets = st.lists(st.sampled_from("abcde"), max_size=3, unique=True).map(tuple)


@settings(deadline=None)
@given(st.lists(label_sets, min_size=20, max_size=80), st.floats(0.05, 0.9), st.integers(0, 9))
def test_split_is_a_partition_that_leaves_every_label_in_train(rows: list[tuple[str, ...]], share: float, seed: int):
    examples = examples_of(*rows)
    try:
        train, dev = stratified_split(examples, share, seed)
    except InputError:
        return
    assert sorted(train + dev, key=examples.index) == examples
    assert train == sorted(train, key=examples.index)
    assert dev == sorted(dev, key=examples.index)
    assert {label for e in train for label in e.labels} == {label for e in examples for label in e.labels}
    assert len(dev) <= share * len(examples) + 1
    assert (train, dev) == stratified_split(examples, share, seed)


def test_split_gives_each_label_its_share():
    examples = examples_of(*["many"] * 1000, *["some"] * 100, *["few"] * 10)
    _, dev = stratified_split(examples, 0.1, seed=3)
    counts = collections.Counter(example.labels[0] for example in dev)
    assert abs(counts["many"] - 100) <= 1
    assert abs(counts["some"] - 10) <= 1
    assert abs(counts["few"] - 1) <= 1
    assert abs(len(dev) - 111) <= 1


def test_split_of_thousands_of_labels_still_has_its_share():
    examples = examples_of(*[f"label {n // 2}" for n in range(4000)])
    train, dev = stratified_split(examples, 0.1, seed=0)
    assert len(dev) == 400
    assert len({example.labels for example in train}) == 2000


def test_other_seeds_split_otherwise():
    examples = examples_of(*["a", "b"] * 50)
    assert stratified_split(examples, 0.2, seed=0) != stratified_split(examples, 0.2, seed=1)


def test_which_examples_of_a_label_go_is_random():
    """The split must not take every tenth row, for instance of a file sorted by date."""
    examples = examples_of(*["a"] * 200)
    _, dev = stratified_split(examples, 0.1, seed=0)
    places = [examples.index(example) for example in dev]
    assert len({later - earlier for earlier, later in itertools.pairwise(places)}) > 3


def test_too_few_examples_to_split():
    with pytest.raises(InputError, match="2 examples of 2 labels are too few to set 50% of them aside"):
        stratified_split(examples_of("a", "b"), 0.5, seed=0)


def test_duplicates_are_found_but_for_case_form_and_space():
    train = [Example("Where is  my ﬁle?", ("a",), "t", source="train.csv, row 1"), Example("other", ("a",), "t")]
    test = [
        Example("new", ("a",), "t"),
        Example(" WHERE is my file?\n", ("b",), "t", source="test.csv, row 2"),
        Example("where is my file", ("a",), "t"),
    ]
    pairs = find_duplicates(train, test)
    assert pairs == [(train[0], test[1])]
    assert describe_duplicates(pairs, "train.csv", "test.csv") == (
        "1 text of test.csv also in train.csv (equal but for case and white space), the first at test.csv, row 2 and "
        "train.csv, row 1; 1 of them with other labels there. They make scores on test.csv look better than they are."
    )


def test_no_duplicates_no_sentence():
    assert find_duplicates(examples_of("a"), [Example("unlike", ("a",), "t")]) == []
    assert describe_duplicates([], "train", "test") is None
