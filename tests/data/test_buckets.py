import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classer.data.buckets import BUCKETS, bucket_for, pad_batch


@given(st.integers(1, BUCKETS[-1]))
def test_bucket_is_the_smallest_that_holds_the_text(length: int):
    assert bucket_for(length) == min(bucket for bucket in BUCKETS if bucket >= length)


def test_no_bucket_beyond_the_largest():
    with pytest.raises(ValueError, match="513 tokens fits no bucket; the largest holds 512"):
        bucket_for(513)


def test_pad_batch_lays_rows_left_and_fills_the_rest():
    tokens_BS, lengths_B = pad_batch([np.array([7, 8, 9]), np.array([5])], batch_size=3, length=4, pad_id=1)
    np.testing.assert_array_equal(tokens_BS, [[7, 8, 9, 1], [5, 1, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(lengths_B, [3, 1, 0])
    assert tokens_BS.dtype == lengths_B.dtype == np.int32


def test_pad_batch_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 rows do not fit a batch of 1"):
        pad_batch([np.array([1]), np.array([2])], batch_size=1, length=4, pad_id=0)
    with pytest.raises(ValueError, match="Row 0 has 5 tokens, more than the 4"):
        pad_batch([np.arange(5)], batch_size=1, length=4, pad_id=0)
