"""Length buckets: the few static sequence lengths for which programs are compiled.

Axes: `B` batch, `S` sequence. NumPy only, so that the server and the client side may import it freely.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

# Steps of at most 1.5×: a text is padded by a third at the worst, and eleven programs cover every length to 512.
BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def bucket_for(length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `length` tokens.

    Args:
      length: a number of tokens, special tokens included.
      buckets: bucket lengths in tokens, ascending.

    Raises:
      ValueError: `length` is larger than the largest bucket; texts are to be truncated before they come here.
    """
    position = bisect.bisect_left(buckets, length)
    if position == len(buckets):
        raise ValueError(f"A text of {length} tokens fits no bucket; the largest holds {buckets[-1]}.")
    return buckets[position]


def pad_batch(ids: Sequence[np.ndarray], batch_size: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays rows of token ids side by side in one array of a static shape.

    Args:
      ids: at most `batch_size` arrays of token ids, each (S_i,) with S_i ≤ `length`.
      batch_size: rows of the result; those beyond `len(ids)` are fillers of length 0.
      length: columns of the result, in tokens.
      pad_id: the id that fills what is left.

    Returns:
      tokens_BS (int32) and lengths_B (int32, the number of real tokens of each row).

    Raises:
      ValueError: more rows than `batch_size`, or a row longer than `length`.
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
