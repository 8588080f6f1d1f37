"""Length buckets: the static sequence lengths for which programs are compiled.

Axes: B batch, S sequence. Depends on NumPy alone, so that the server and the client can import it cheaply.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

# Steps of at most 1.5×: padding is at most a third of a row, and eleven programs cover every length up to 512.
BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def bucket_for(length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `length` tokens.

    Args:
      length: the number of tokens, special tokens included.
      buckets: bucket lengths in tokens, ascending.

    Raises:
      ValueError: `length` exceeds the largest bucket; callers truncate texts first.
    """
    position = bisect.bisect_left(buckets, length)
    if position == len(buckets):
        raise ValueError(f"A text of {length} tokens fits no bucket; the largest holds {buckets[-1]}.")
    return buckets[position]


def pad_batch(ids: Sequence[np.ndarray], batch_size: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of token ids to one array of static shape.

    Args:
      ids: at most `batch_size` arrays of token ids, each (S_i,) with S_i ≤ `length`.
      batch_size: rows of the result, B; rows beyond `len(ids)` are padding, with length 0.
      length: columns of the result, S, in tokens.
      pad_id: the id of the padding token.

    Returns:
      tokens_BS (int32), and lengths_B (int32), the number of tokens of each row without padding.

    Raises:
      ValueError: there are more rows than `batch_size`, or a row is longer than `length`.
    """
    if len(ids) > batch_size:
        raise ValueError(f"{len(ids)} rows do not fit a batch of {batch_size}.")
    tokens_BS = np.full((batch_size, length), pad_id, dtype=np.int32)
    lengths_B = np.zeros(batch_size, dtype=np.int32)
    for row, row_ids in enumerate(ids):
        if len(row_ids) > length:
            raise ValueError(f"Row {row} has {len(row_ids)} tokens, more than the {length} of its batch.")
        tokens_BS[row, : len(row_ids)] = row_ids
        lengths_B[row] = len(row_ids)
    return tokens_BS, lengths_B
