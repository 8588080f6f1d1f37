import dataclasses
import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from classer.data.buckets import BUCKETS, bucket_for
from classer.data.errors import InputError
from classer.data.pipeline import Batch, Batches, TrainExamples, epoch_batches
from classer.data.plans import ShufflePlan

PAD = 0


def make(lengths: list[int], *, batch_size: int = 4, seed: int = 0, num_epochs: int = 3) -> Batches[ShufflePlan]:
    """Example n has first token n + 1 (0 is padding) and n as its only target."""
    ids = [np.full(length, n + 1, dtype=np.int32) for n, length in enumerate(lengths)]
    targets_NL = np.arange(1, len(lengths) + 1, dtype=np.float32)[:, None]
    examples = TrainExamples(ids, csr_array(targets_NL), np.zeros(len(ids), np.int32))
    return epoch_batches(examples, batch_size=batch_size, seed=seed, pad_id=PAD, num_epochs=num_epochs)


def examples_of(batch: Batch) -> list[int]:
    return [int(token) - 1 for token in batch.tokens_BS[batch.weights_B > 0, 0]]


def assert_same(left: list[Batch], right: list[Batch]):
    for a, b in zip(left, right, strict=True):
        for field in ("tokens_BS", "lengths_B", "targets_BL", "weights_B", "tasks_B"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


lengths_of_examples = st.lists(st.integers(1, BUCKETS[-1]), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(lengths_of_examples, st.integers(1, 9), st.integers(0, 5))
def test_every_example_comes_exactly_once_an_epoch(lengths: list[int], batch_size: int, seed: int):
    batches = make(lengths, batch_size=batch_size, seed=seed)
    stream = [batches.batch(step) for step in range(batches.num_steps)]
    steps = batches.plan.steps_per_epoch
    assert steps == -(-len(lengths) // batch_size)
    for epoch in range(3):
        epochs_batches = stream[epoch * steps : (epoch + 1) * steps]
        seen = [example for batch in epochs_batches for example in examples_of(batch)]
        assert sorted(seen) == list(range(len(lengths)))
        assert sum(batch.weights_B.min() == 0 for batch in epochs_batches) <= 1, "only one batch may have fillers"


@settings(deadline=None, max_examples=60)
@given(lengths_of_examples, st.integers(1, 9))
def test_rows_carry_their_own_tokens_target_and_weight(lengths: list[int], batch_size: int):
    for batch in map(make(lengths, batch_size=batch_size, num_epochs=1).batch, range(-(-len(lengths) // batch_size))):
        for tokens_S, length, targets_L, weight in zip(
            batch.tokens_BS, batch.lengths_B, batch.targets_BL, batch.weights_B, strict=True
        ):
            if weight == 0:
                assert length == 0
                assert not tokens_S.any()
                assert not targets_L.any()
            else:
                example = tokens_S[0] - 1
                assert length == lengths[example]
                assert targets_L == example + 1
                assert (tokens_S[:length] == example + 1).all()
                assert (tokens_S[length:] == PAD).all()


@settings(deadline=None, max_examples=60)
@given(lengths_of_examples, st.integers(1, 9))
def test_shapes_are_the_same_in_every_epoch(lengths: list[int], batch_size: int):
    batches = make(lengths, batch_size=batch_size)
    steps = batches.plan.steps_per_epoch
    shapes = [batches.batch(step).tokens_BS.shape for step in range(batches.num_steps)]
    assert sorted(shapes[:steps]) == sorted(shapes[steps : 2 * steps]) == sorted(shapes[2 * steps :])


def test_a_text_is_in_its_own_bucket_but_for_few_left_over():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, size=2000).tolist()
    batches = make(lengths, batch_size=8)
    moved = 0
    for step in range(batches.plan.steps_per_epoch):
        batch = batches.batch(step)
        moved += sum(bucket_for(int(n)) != batch.tokens_BS.shape[1] for n in batch.lengths_B if n)
    assert 0 < moved <= 7 * len(BUCKETS)


def test_epochs_and_seeds_differ_and_a_seed_repeats():
    lengths = [10 + n % 50 for n in range(200)]

    def order(batches: Batches[ShufflePlan], epoch: int) -> list[int]:
        steps = range(epoch * batches.plan.steps_per_epoch, (epoch + 1) * batches.plan.steps_per_epoch)
        return [example for step in steps for example in examples_of(batches.batch(step))]

    assert order(make(lengths), 0) != order(make(lengths), 1)
    assert order(make(lengths), 0) != order(make(lengths, seed=1), 0)
    assert order(make(lengths), 1) == order(make(lengths), 1)


def test_order_of_batches_is_shuffled():
    widths = [make([10 + n % 90 for n in range(200)]).batch(step).tokens_BS.shape[1] for step in range(50)]
    assert widths != sorted(widths)


@pytest.mark.parametrize("taken", [0, 1, 7, 24, 25, 26, 49, 50, 74, 75])  # 25 steps per epoch
def test_resume_is_exact_at_any_step_and_over_epochs(taken: int):
    lengths = [1 + (37 * n) % 300 for n in range(97)]
    iterator = iter(make(lengths))
    list(islice(iterator, taken))
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)

    resumed = iter(make(lengths))
    list(islice(resumed, 3))  # an iterator that was already used must discard its prefetched batches
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(rest, list(resumed))
    assert len(rest) == 75 - taken


def test_resume_with_more_epochs_goes_on():
    iterator = iter(make([5] * 9, num_epochs=1))
    list(iterator)
    longer = iter(make([5] * 9, num_epochs=2))
    longer.set_state(iterator.get_state())
    assert len(list(longer)) == 3


def test_resume_refuses_another_stream():
    state = iter(make([5, 6, 7])).get_state()
    for other in (make([5, 6, 7], seed=1), make([5, 6, 8]), make([5, 6, 7], batch_size=2)):
        with pytest.raises(InputError, match="other examples, labels, tokens, seed or batch size"):
            iter(other).set_state(state)


def test_resume_refuses_fewer_epochs():
    iterator = iter(make([5, 6, 7], num_epochs=3))
    list(iterator)
    with pytest.raises(InputError, match="after step 3, but this run ends after 1"):
        iter(make([5, 6, 7], num_epochs=1)).set_state(iterator.get_state())


def test_two_iterators_do_not_disturb_each_other():
    batches = make([3 * n + 1 for n in range(30)])
    one, two = iter(batches), iter(batches)
    first = list(islice(one, 5))
    assert_same(first, list(islice(two, 5)))
    assert one.get_state()["next_step"] == two.get_state()["next_step"] == 5


def test_rows_carry_their_teachers_vectors_and_fillers_none():
    plain = TrainExamples([np.full(3, n + 1, np.int32) for n in range(5)], csr_array(np.eye(5)), np.zeros(5, np.int32))
    assert plain.batch(np.array([0]), 2, 8, PAD).vectors_BV is None
    examples = dataclasses.replace(plain, vectors_NV=np.arange(10, dtype=np.float16).reshape(5, 2))
    batch = examples.batch(np.array([4, 1]), 3, 8, PAD)
    assert batch.vectors_BV is not None
    assert batch.vectors_BV.dtype == np.float16
    assert batch.vectors_BV.tolist() == [[8, 9], [2, 3], [0, 0]]
    others = dataclasses.replace(plain, vectors_NV=np.ones((5, 2), np.float16))
    assert len({plain.fingerprint, examples.fingerprint, others.fingerprint}) == 3


def test_needs_examples_and_as_many_targets():
    with pytest.raises(ValueError, match="0 examples"):
        make([])
    with pytest.raises(ValueError, match="1 examples, 2 targets and 1 tasks"):
        TrainExamples([np.array([1])], csr_array((2, 1)), np.zeros(1, np.int32))
