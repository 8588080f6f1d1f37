"""Near-duplicates by MinHash and locality-sensitive hashing.

A text is the set of its 5-character shingles, taken from its `comparable` form: characters, because half of the
world's scripts put no spaces between words. MinHash (Broder 1997, "On the resemblance and containment of documents")
estimates the Jaccard similarity of two such sets; banding (Leskovec et al., "Mining of Massive Datasets", section 3.4)
finds the pairs worth comparing; one byte of each minimum is kept (b-bit minwise hashing, Li & König 2010,
https://arxiv.org/abs/0910.3349).

Axes: N texts, P permutations, B bands.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

SHINGLE = 5
NUM_PERMUTATIONS = 128
# The number of mutually dissimilar texts of a bucket with which later texts are compared.
MAX_LEADERS = 64
_CHARS_AT_ONCE = 1 << 18  # the arrays of a pass then fit a core's cache

_RNG = np.random.default_rng(0x5EED)
_FACTORS_P = _RNG.integers(0, 1 << 32, NUM_PERMUTATIONS, dtype=np.uint32) | np.uint32(1)
_ADDENDS_P = _RNG.integers(0, 1 << 32, NUM_PERMUTATIONS, dtype=np.uint32)


@dataclasses.dataclass(frozen=True)
class Sketches:
    """MinHash sketches of N texts.

    Attributes:
      bands_NB: uint64; texts with an equal band are candidates for comparison.
      bytes_NP: uint8, one byte of each minimum; see `similarity`.
    """

    bands_NB: np.ndarray
    bytes_NP: np.ndarray


def band_rows(threshold: float) -> int:
    """Minima per band: the most for which a pair at the threshold shares a band with probability at least 0.9.

    The probability is 1 − (1 − sʳ)ᵇ for similarity s and b bands of r rows.
    """
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) >= 0.9:
            return rows
    return 1


def sketch(texts: Sequence[str], rows: int) -> Sketches:
    """Sketches of N texts (in their `comparable` form; none is empty), with `rows` minima a band."""
    minima = [_minima(chunk) for chunk in chunks(texts)]
    minima_NP = np.concatenate(minima) if minima else np.zeros((0, NUM_PERMUTATIONS), np.uint32)
    # A polynomial in the band's minima and its number, so that equal minima of different bands do not match.
    mixed_NBR = minima_NP.reshape(len(texts), NUM_PERMUTATIONS // rows, rows).astype(np.uint64)
    bands_NB = np.arange(mixed_NBR.shape[1], dtype=np.uint64)[None] + np.zeros((len(texts), 1), np.uint64)
    for row in range(rows):
        bands_NB = mix(bands_NB * np.uint64(0x9E3779B97F4A7C15) + mixed_NBR[..., row])
    # Taking the minimum biases the low byte less than the high one.
    bytes_NP = (minima_NP * np.uint32(0x85EBCA6B) >> np.uint32(24)).astype(np.uint8)
    return Sketches(bands_NB, bytes_NP)


def mix(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser: every bit of the result depends on every bit of the uint64."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))


def similarity(bytes_NP: np.ndarray, one_P: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of N texts to one, float64 (N,): unequal minima agree in their byte once in 256."""
    agree_N = (bytes_NP == one_P).mean(axis=1)
    return np.maximum(0.0, (agree_N - 1 / 256) / (1 - 1 / 256))


def bucket_links(ranks_N: np.ndarray, bytes_NP: np.ndarray, threshold: float) -> Iterator[tuple[int, int, float]]:
    """Finds the texts of a bucket that resemble an earlier text of it.

    Args:
      ranks_N: ranks of the texts, ascending; of two near-duplicates the first is kept.
      bytes_NP: their sketches (see `Sketches`).
      threshold: the least similarity of near-duplicates.

    Yields:
      (rank, rank of the earlier text, their similarity), at most once per text.
    """
    leaders = [0]
    for i in range(1, len(ranks_N)):
        similar = similarity(bytes_NP[leaders], bytes_NP[i])
        best = int(similar.argmax())
        if similar[best] >= threshold:
            yield int(ranks_N[i]), int(ranks_N[leaders[best]]), float(similar[best])
        elif len(leaders) < MAX_LEADERS:
            leaders.append(i)


def chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Splits the texts into chunks whose shingles fit a core's cache."""
    first = chars = 0
    for i, text in enumerate(texts):
        chars += len(text)
        if chars >= _CHARS_AT_ONCE:
            yield texts[first : i + 1]
            first, chars = i + 1, 0
    if first < len(texts):
        yield texts[first:]


def _minima(texts: Sequence[str]) -> np.ndarray:
    """The smallest hash of each text's shingles under each permutation, uint32 (N, P)."""
    padded = [text.ljust(SHINGLE) for text in texts]
    hashes, starts = window_hashes(padded, SHINGLE)
    hashes = hashes.astype(np.uint32)
    minima_NP = np.empty((len(texts), NUM_PERMUTATIONS), np.uint32)
    for p in range(NUM_PERMUTATIONS):
        minima_NP[:, p] = np.minimum.reduceat(hashes * _FACTORS_P[p] + _ADDENDS_P[p], starts)
    return minima_NP


def window_hashes(texts: Sequence[str], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all windows (runs of `width` characters) of N texts, each at least `width` long.

    Returns:
      The uint64 hashes, concatenated over the texts, and the offset of each text's first hash, int64 (N,).
    """
    lengths_N = np.fromiter(map(len, texts), np.int64, len(texts))
    chars = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    # Horner's rule by doubling: the hash of 2w characters is that of the first w, times pʷ, plus that of the others.
    base = np.uint64(0x100000001B3)
    hashes, done, power = chars + np.uint64(1), 1, base
    whole, whole_done = None, 0
    for bit in itertools.takewhile(lambda bit: bit <= width, (1 << i for i in itertools.count())):
        if width & bit:
            whole = hashes if whole is None else whole[: len(hashes) - whole_done] * power + hashes[whole_done:]
            whole_done += bit
        if bit * 2 <= width:
            hashes = hashes[: len(hashes) - done] * power + hashes[done:]
            with np.errstate(over="ignore"):
                power = power * power
            done *= 2
    assert whole is not None
    counts_N = lengths_N - width + 1
    ends_N = np.cumsum(lengths_N)
    # Windows that span two texts are omitted.
    own = np.ones(len(chars), bool)
    for back in range(1, width):
        own[ends_N - back] = False
    starts_N = np.cumsum(counts_N) - counts_N
    return mix(whole[own[: len(whole)]]), starts_N
