"""Detection of contamination: training texts that are in an evaluation set.

A training text is contaminated if it
- equals an evaluation text in its `comparable` form,
- resembles one: their estimated Jaccard similarity reaches the threshold of near-duplicates, or
- contains most of one: at least half of the sampled windows (runs of `WINDOW_CHARS` characters) of an evaluation text
  of at least that length. Brown et al. 2020 (https://arxiv.org/abs/2005.14165, appendix C) use 13 words; here it is
  characters, because not every script separates words.

Labels and tasks are ignored: a model may memorise any text that it was trained on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..records import HASH_BYTES
from ..splits import comparable
from .minhash import Sketches, chunks, similarity, sketch, window_hashes
from .steps import Dropped, SourceRow, hash_text

WINDOW_CHARS = 64
STRIDE = 8  # every eighth window of an evaluation text is kept; training texts are searched at every character
MOST = 0.5


@dataclasses.dataclass(frozen=True)
class EvaluationIndex:
    """An index of E evaluation texts, in which training texts are looked up.

    Attributes:
      hashes_EH: uint8 (E, `HASH_BYTES`), the texts' hashes (see `steps.hash_text`).
      bytes_EP: uint8 (E, P), the texts' MinHash bytes (see `minhash.Sketches`).
      bands, band_text: uint64, ascending, and int64: band → text.
      windows, window_text: uint64, ascending, and int64: hash of a window → text.
      num_windows_E: the number of windows kept of each text.
      threshold: the similarity of near-duplicates; 0 disables the search for them.
    """

    hashes_EH: np.ndarray
    bytes_EP: np.ndarray
    bands: np.ndarray
    band_text: np.ndarray
    windows: np.ndarray
    window_text: np.ndarray
    num_windows_E: np.ndarray
    threshold: float

    @classmethod
    def build(cls, texts: Sequence[str], rows: int, threshold: float) -> EvaluationIndex:
        """Builds the index.

        Args:
          texts: the evaluation texts.
          rows: minima per band (`minhash.band_rows`).
          threshold: the similarity of near-duplicates.
        """
        plain = [comparable(text) for text in texts]
        hashes_EH = np.frombuffer(b"".join(map(hash_text, plain)), np.uint8).reshape(len(plain), HASH_BYTES)
        sketches = sketch(plain, rows)
        num_bands = sketches.bands_NB.shape[1]
        bands, band_text = _sorted(sketches.bands_NB.ravel(), np.repeat(np.arange(len(plain)), num_bands))
        long = [i for i, text in enumerate(plain) if len(text) >= WINDOW_CHARS]
        windows, owners = _windows([plain[i] for i in long], STRIDE)
        owners = np.asarray(long, np.int64)[owners]
        counts_E = np.bincount(owners, minlength=len(plain))
        windows, window_text = _sorted(windows, owners)
        return cls(hashes_EH, sketches.bytes_NP, bands, band_text, windows, window_text, counts_E, threshold)

    def save(self, path: Path) -> None:
        np.savez(path, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: Path) -> EvaluationIndex:
        with np.load(path, allow_pickle=False) as arrays:
            fields: dict[str, Any] = {name: arrays[name] for name in arrays.files}
        fields["threshold"] = float(fields["threshold"])
        return cls(**fields)

    def find(self, rows: Sequence[SourceRow], plain: Sequence[str], sketches: Sketches) -> list[Dropped | None]:
        """For each row, the evaluation text that contaminates it, as a `Dropped`; or None.

        Args:
          rows: training rows.
          plain: their texts in `comparable` form.
          sketches: their sketches.
        """
        found: list[Dropped | None] = [None] * len(rows)
        if not len(self.hashes_EH):
            return found
        contained = self._contained(plain)
        near = self._near(sketches) if self.threshold else {}
        for i, row in enumerate(rows):
            if (of := self._by_hash.get(row.text_hash)) is not None:
                found[i] = Dropped(row.rank, "contaminated", of, 1.0)
            elif i in near:
                found[i] = Dropped(row.rank, "contaminated", *near[i])
            elif i in contained:
                found[i] = Dropped(row.rank, "contaminated", *contained[i])
        return found

    @functools.cached_property
    def _by_hash(self) -> dict[bytes, int]:
        return {bytes(self.hashes_EH[i]): i for i in reversed(range(len(self.hashes_EH)))}

    @functools.cached_property
    def _window_filter(self) -> tuple[np.ndarray, np.uint64]:
        """(table, shift): whether any kept window has given leading bits. Spares most of the look-ups.

        The table has at least eight entries per kept window.
        """
        bits = max(1, (8 * len(self.windows)).bit_length())
        table = np.zeros(1 << bits, bool)
        table[self.windows >> np.uint64(64 - bits)] = True
        return table, np.uint64(64 - bits)

    def _near(self, sketches: Sketches) -> dict[int, tuple[int, float]]:
        """Row → (most similar evaluation text, similarity), for rows that reach the threshold."""
        num_bands = sketches.bands_NB.shape[1]
        hits, texts = _look_up(sketches.bands_NB.ravel(), self.bands, self.band_text)
        near: dict[int, tuple[int, float]] = {}
        for row, text in np.unique(np.stack([hits // num_bands, texts], axis=1), axis=0):
            alike = float(similarity(self.bytes_EP[text][None], sketches.bytes_NP[row])[0])
            if alike >= self.threshold and alike > near.get(int(row), (0, 0.0))[1]:
                near[int(row)] = (int(text), alike)
        return near

    def _contained(self, plain: Sequence[str]) -> dict[int, tuple[int, float]]:
        """Row → (evaluation text, share of its windows in the row), for shares of at least `MOST`."""
        if not len(self.windows):
            return {}
        long = [i for i, text in enumerate(plain) if len(text) >= WINDOW_CHARS]
        windows, owners = _windows([plain[i] for i in long], 1)
        filter_, shift = self._window_filter
        maybe = np.flatnonzero(filter_[windows >> shift])
        windows, owners = windows[maybe], owners[maybe]
        hits, texts = _look_up(windows, self.windows, self.window_text)
        if not len(hits):
            return {}
        # A window that is repeated in the row or in the evaluation text counts once.
        triples = np.unique(np.stack([owners[hits], texts, windows[hits].view(np.int64)], axis=1), axis=0)
        pairs, counts = np.unique(triples[:, :2], axis=0, return_counts=True)
        contained: dict[int, tuple[int, float]] = {}
        for (owner, text), count in zip(pairs, counts, strict=True):
            share = float(count / self.num_windows_E[text])
            row = long[owner]
            if share >= MOST and share > contained.get(row, (0, 0.0))[1]:
                contained[row] = (int(text), share)
        return contained


def _windows(texts: Sequence[str], stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the windows of texts of at least `WINDOW_CHARS` characters, and the text of each window."""
    found, owners, first = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for chunk in chunks(texts):
        hashes, starts = window_hashes(chunk, WINDOW_CHARS)
        counts = np.diff(np.append(starts, len(hashes)))
        chosen = (np.arange(len(hashes)) - np.repeat(starts, counts)) % stride == 0
        found.append(hashes[chosen])
        owners.append(np.repeat(np.arange(first, first + len(chunk)), counts)[chosen])
        first += len(chunk)
    return np.concatenate(found), np.concatenate(owners)


def _sorted(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((values, keys))
    return keys[order], values[order].astype(np.int64)


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (position in `wanted`, value) with equal keys. `keys` are ascending and may repeat."""
    left = np.searchsorted(keys, wanted)
    there = np.flatnonzero(keys[np.minimum(left, len(keys) - 1)] == wanted)
    counts = np.searchsorted(keys, wanted[there], side="right") - left[there]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(there, counts), values[np.repeat(left[there], counts) + within]
