"""The binary format of a tokenised example, and ArrayRecord shards of them.

A record is little-endian: task (uint16), number of labels (uint16), hash of the text (16 bytes), labels (uint32 each,
positions within the task), token ids (uint16 each if the vocabulary has at most 65,536 tokens, else uint32).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HASH_BYTES = 16
_HEADER = struct.Struct(f"<HH{HASH_BYTES}s")


@dataclasses.dataclass(frozen=True)
class Record:
    """A tokenised example.

    Attributes:
      task: the position of the task in the manifest's taxonomy.
      labels: int64 (K,), positions of the K labels within the task.
      ids: int32 (S,), token ids, [CLS] … [SEP].
      text_hash: hash of the text's `comparable` form, `HASH_BYTES` long.
    """

    task: int
    labels: np.ndarray
    ids: np.ndarray
    text_hash: bytes


def encode_record(task: int, labels: Sequence[int], ids: np.ndarray, text_hash: bytes, vocab_size: int) -> bytes:
    header = _HEADER.pack(task, len(labels), text_hash)
    return header + np.asarray(labels, "<u4").tobytes() + ids.astype(_id_type(vocab_size)).tobytes()


def decode_record(data: bytes, vocab_size: int) -> Record:
    task, num_labels, text_hash = _HEADER.unpack_from(data)
    labels = np.frombuffer(data, "<u4", num_labels, _HEADER.size)
    ids = np.frombuffer(data, _id_type(vocab_size), offset=_HEADER.size + 4 * num_labels)
    return Record(task, labels.astype(np.int64), ids.astype(np.int32), text_hash)


def _id_type(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_array_records(path: Path, records: Sequence[bytes]) -> None:
    """Writes an ArrayRecord file for random access, one record per group. Equal records give equal bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
