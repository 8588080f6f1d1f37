"""WordPiece tokenisation, with the characters of the text that each token covers.

BERT's tokenisation has three steps: normalise characters, split into words, match the longest pieces greedily.
tensorflow-text's linear-time matcher (Song et al. 2021, "Fast WordPiece Tokenization") does the last two. This file
does the first, character by character. tensorflow-text's own normaliser applies NFKC case folding ("…" becomes three
dots, "ß" two letters, "½" three tokens) and turns control characters into spaces. BERT's reference and the Hugging
Face tokenizers, with which the checkpoints were trained, do neither. That difference alone affects about 1 % of texts.

Two differences from the Hugging Face tokenizers remain; of 67,935 real texts of 205 languages 4 differ, all by the
first:
  - They turn a text that spells a special token ("[SEP]", "[UNK]", …) into that token. Here it stays ordinary text, so
    that a request cannot inject control tokens.
  - They use the character categories of Unicode 8, and this file Python's. Characters that were added or recategorised
    since then can differ: some punctuation and combining marks, mostly of small scripts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError

VOCAB_FILE = "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"

MAX_WORD_CHARS = 100  # a longer word is [UNK], as in BERT
# BERT limits a word's characters, tensorflow-text its bytes. The byte limit is set to 100 characters of four bytes, and
# the character limit is enforced here: each character of a longer word is replaced by this one (four bytes,
# unassigned, never split), so that the word always exceeds the byte limit and becomes [UNK].
OVERLONG = "\U0010ffff"
LONG_WORD = rf"[^ !-/:-@\[-`{{-~]{{{MAX_WORD_CHARS + 1},}}"
_LONG_WORD = re.compile(LONG_WORD)
_HEAD_CHARS_PER_TOKEN = 32  # the prefix of a long text that is normalised first; see _Normalizer.head
_TEXTS_PER_CALL = 1024  # bounds the memory of one call into TensorFlow
_LOADING = threading.Lock()  # shared by all tokenizers: the import redirects stderr of the whole process

_CJK_RANGES = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of N texts.

    Attributes:
      ids: N arrays, int32 (S_i,): [CLS] … [SEP].
      truncated: bool (N,): whether tokens were cut off.
      spans: N arrays, int32 (S_i, 2): start and end (exclusive) of each token, in characters of the text; (0, 0) for
        [CLS] and [SEP]. None from `encode`.
    """

    ids: list[np.ndarray]
    truncated: np.ndarray
    spans: list[np.ndarray] | None = None


class WordPieceTokenizer:
    """BERT's tokeniser for a `vocab.txt`. Thread-safe. The first call loads TensorFlow."""

    def __init__(self, vocab_file: Path, *, lowercase: bool = True) -> None:
        """Reads the vocabulary.

        Args:
          vocab_file: UTF-8, one token a line; a token's id is its line number, from 0.
          lowercase: true for an "uncased" vocabulary: texts are lower-cased and accents removed.

        Raises:
          InputError: the file is missing or not UTF-8, has an empty or repeated token, or lacks a special token.
        """
        self._vocab = _read_vocab(Path(vocab_file))
        self.lowercase = lowercase
        ids = {token: i for i, token in enumerate(self._vocab)}
        missing = [token for token in ("[PAD]", "[CLS]", "[SEP]", "[UNK]") if token not in ids]
        if missing:
            raise InputError(f"{vocab_file} lacks {', '.join(missing)}; it is no vocabulary of a BERT-family model.")
        self.pad_id, self.cls_id = ids["[PAD]"], ids["[CLS]"]
        self.sep_id, self.unk_id = ids["[SEP]"], ids["[UNK]"]
        self.vocab_size = len(self._vocab)
        self._source = str(vocab_file)
        self._normalizer = _Normalizer(lowercase)
        self._matcher_or_none: Any = None

    @classmethod
    def from_folder(cls, folder: Path) -> WordPieceTokenizer:
        """Loads a folder written by `save`, or that of a BERT-family model in Hugging Face's layout.

        Raises:
          InputError: a file is missing or damaged, or has a setting that is not supported.
        """
        config_file = Path(folder) / CONFIG_FILE
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            lowercase = config["do_lower_case"]
        except FileNotFoundError:
            raise InputError(f"{config_file} is missing; it says whether the vocabulary is lower-case.") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{config_file} is no JSON object with the field "do_lower_case".') from None
        if not isinstance(lowercase, bool):
            raise InputError(f'{config_file}: "do_lower_case" is {lowercase!r}; it must be true or false.')
        if config.get("strip_accents") not in (None, lowercase):
            raise InputError(f'{config_file}: "strip_accents" other than "do_lower_case" is not supported.')
        if config.get("tokenize_chinese_chars") is False:
            raise InputError(f'{config_file}: "tokenize_chinese_chars": false is not supported.')
        return cls(Path(folder) / VOCAB_FILE, lowercase=lowercase)

    def save(self, folder: Path) -> None:
        """Writes `vocab.txt` and `tokenizer_config.json` into `folder`, which is created if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOCAB_FILE).write_bytes("".join(f"{token}\n" for token in self._vocab).encode())
        (folder / CONFIG_FILE).write_text(json.dumps({"do_lower_case": self.lowercase}) + "\n", encoding="utf-8")

    @property
    def vocab(self) -> tuple[str, ...]:
        """The tokens, in the order of their ids."""
        return tuple(self._vocab)

    def replacement(self, code_point: int) -> str:
        """The normalised form of a character; empty if the character is dropped."""
        return self._normalizer.replacement(code_point)

    def encode(self, texts: Sequence[str], max_length: int) -> TokenizedTexts:
        """Token ids of each text, cut to `max_length` tokens, [CLS] and [SEP] included.

        An empty text gives [CLS] [SEP]. Text beyond `max_length` tokens is not tokenised, which bounds the cost of
        very long texts.

        Raises:
          ValueError: `max_length` is below 2.
          InputError: the vocabulary cannot be compiled for WordPiece.
        """
        return self._encode(texts, max_length, with_spans=False)

    def encode_with_offsets(self, texts: Sequence[str], max_length: int) -> TokenizedTexts:
        """Like `encode`, with `spans`. Raises the same errors."""
        return self._encode(texts, max_length, with_spans=True)

    def _encode(self, texts: Sequence[str], max_length: int, with_spans: bool) -> TokenizedTexts:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, for [CLS] and [SEP]; it is {max_length}.")
        room = max_length - 2
        ids: list[np.ndarray] = []
        spans: list[np.ndarray] = []
        truncated = np.zeros(len(texts), dtype=bool)
        for first in range(0, len(texts), _TEXTS_PER_CALL):
            chunk = texts[first : first + _TEXTS_PER_CALL]
            heads = [self._normalizer.head(text, room + 1) for text in chunk]
            flat_ids, starts, ends, splits = self._match(heads, with_spans)
            counts = np.diff(splits)
            truncated[first : first + len(chunk)] = counts > room
            for i, (begin, count) in enumerate(zip(splits[:-1], np.minimum(counts, room), strict=True)):
                row = np.empty(count + 2, dtype=np.int32)
                row[0], row[1:-1], row[-1] = self.cls_id, flat_ids[begin : begin + count], self.sep_id
                ids.append(row)
                if starts is not None and ends is not None:
                    piece = slice(begin, begin + count)
                    covered = self._normalizer.to_source(chunk[i], heads[i], starts[piece], ends[piece])
                    spans.append(np.pad(covered, ((1, 1), (0, 0))))
        return TokenizedTexts(ids, truncated, spans if with_spans else None)

    def _match(self, heads: list[str], with_spans: bool):
        """Flat ids, byte offsets (starts and ends; None without spans) and row splits of normalised texts."""
        matcher, tf = self._matcher()
        strings = tf.constant(heads, dtype=tf.string)
        if not with_spans:
            tokens = matcher.tokenize(strings)
            return tokens.flat_values.numpy(), None, None, tokens.row_splits.numpy()
        tokens, starts, ends = matcher.tokenize_with_offsets(strings)
        flat = tokens.flat_values.numpy()
        return flat, starts.flat_values.numpy(), ends.flat_values.numpy(), tokens.row_splits.numpy()

    def _matcher(self) -> tuple[Any, Any]:
        if self._matcher_or_none is None:
            with _LOADING:
                tf, tf_text = _import_tensorflow()
                try:
                    matcher = tf_text.FastWordpieceTokenizer(
                        self._vocab, token_out_type=tf.int32, max_bytes_per_word=4 * MAX_WORD_CHARS
                    )
                except RuntimeError as e:
                    raise InputError(f"{self._source} cannot be used as a WordPiece vocabulary: {e}") from e
                self._matcher_or_none = (matcher, tf)
        return self._matcher_or_none


class _Normalizer:
    """BERT's character rules, as a table of replacements that is filled on demand."""

    def __init__(self, lowercase: bool) -> None:
        self._table = _CharacterTable(lowercase)

    def replacement(self, code_point: int) -> str:
        return self._table[code_point] or ""

    def head(self, text: str, words: int) -> str:
        """The normalised text, cut after `words` words (runs without spaces).

        Words are tokenised independently, each into at least one token. So the first `words` tokens of the head equal
        those of the whole text, and the head has at least `words` tokens if and only if the text has.
        """
        beginning = text[: words * _HEAD_CHARS_PER_TOKEN]
        normalised = beginning.translate(self._table)
        pieces = normalised.split(None, words)
        if len(pieces) <= words and len(beginning) < len(text):
            normalised = text.translate(self._table)
            pieces = normalised.split(None, words)
        if len(pieces) > words:
            # `beginning` may end in the middle of a word. That word is in the part cut off here, never in the kept one.
            normalised = normalised[: len(normalised) - len(pieces.pop())]
        if any(len(piece) > MAX_WORD_CHARS for piece in pieces):
            normalised = _LONG_WORD.sub(lambda word: OVERLONG * len(word[0]), normalised)
        return normalised

    def to_source(self, text: str, head: str, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Maps N non-empty UTF-8 byte ranges of the normalised head to character spans of the text, int32 (N, 2)."""
        last = ends - 1
        if not head.isascii():
            encoded = np.frombuffer(head.encode(), dtype=np.uint8)
            char_of_byte = np.cumsum((encoded & 0xC0) != 0x80) - 1
            starts, last = char_of_byte[starts], char_of_byte[last]
        if not (text.isascii() and len(head) == len(text)):
            source = self._source_of_head(text, len(head))
            starts, last = source[starts], source[last]
        return np.stack([starts, last + 1], axis=1).astype(np.int32)

    def _source_of_head(self, text: str, head_chars: int) -> np.ndarray:
        """The source position, in the text, of each of the first `head_chars` characters of the normalised text."""
        source: list[int] = []
        for position, char in enumerate(text):
            if len(source) >= head_chars:
                break
            source += [position] * len(self._table[ord(char)] or "")
        return np.asarray(source, dtype=np.int64)


class _CharacterTable(dict[int, str | None]):
    """Code point → its replacement (None: dropped), for `str.translate`.

    The rules of BERT's reference, in order: control characters are dropped, white space becomes a space, CJK
    characters become words of their own; then, for lower-case vocabularies, decomposition, removal of combining marks
    and lower-casing. All rules except decomposition are defined per character. Decomposition also reorders combining
    marks, but those are removed, so a table per character gives the same result.

    Non-ASCII punctuation is surrounded by spaces here too, so that a word ends where it does in `LONG_WORD`. ASCII
    characters are replaced one by one, which keeps `str.translate` on its fast path.
    """

    def __init__(self, lowercase: bool) -> None:
        super().__init__()
        self._lowercase = lowercase

    def __missing__(self, code_point: int) -> str | None:
        self[code_point] = replacement = self._replacement(chr(code_point)) or None
        return replacement

    def _replacement(self, char: str) -> str:
        if char in "\t\n\r":
            return " "
        category = unicodedata.category(char)
        if category in ("Cc", "Cf", "Co", "Cs") or char == "\ufffd":
            return ""
        if char.isspace():
            return " "
        alone = any(first <= ord(char) <= last for first, last in _CJK_RANGES)
        alone = alone or (category.startswith("P") and not char.isascii())
        if self._lowercase:
            bare = [c for c in unicodedata.normalize("NFD", char) if unicodedata.category(c) != "Mn"]
            char = "".join(c.lower() for c in bare)
        return f" {char} " if alone else char


def _read_vocab(vocab_file: Path) -> list[str]:
    try:
        lines = vocab_file.read_bytes().split(b"\n")
    except OSError as e:
        raise InputError(f"The vocabulary {vocab_file} cannot be read: {e.strerror}.") from None
    if lines[-1] == b"":
        lines.pop()
    vocab: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token = line.rstrip(b"\r").decode()
        except UnicodeDecodeError:
            raise InputError(f"{vocab_file}, line {number}: not UTF-8; a vocabulary is a UTF-8 text file.") from None
        if not token:
            raise InputError(f"{vocab_file}, line {number}: empty; each line of a vocabulary is one token.")
        if token in vocab:
            raise InputError(f"{vocab_file}, line {number}: '{token}' stood in line {vocab[token]} already.")
        vocab[token] = number
    return list(vocab)


@functools.cache
def _import_tensorflow() -> tuple[Any, Any]:
    """TensorFlow and tensorflow-text, restricted to the CPU (JAX owns the accelerators) and to one thread."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with _quiet_import():
        import tensorflow as tf
        import tensorflow_text as tf_text

        # TensorFlow refuses these settings if the process has used it already; then the existing ones stay.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
    return tf, tf_text


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Removes the log lines that TensorFlow's libraries write to stderr before they read any setting."""
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            others = [line for line in held if not re.match(rb"[IWE]0000 |WARNING: All log messages before", line)]
            sys.stderr.write(b"".join(others).decode(errors="replace"))
