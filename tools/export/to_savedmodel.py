"""TensorFlow SavedModel: texts in, labels and scores out; the tokenizer is part of the graph (tensorflow-text).

It runs wherever tensorflow and tensorflow-text run, without JAX: the classifier is an embedded StableHLO module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow
import tensorflow_text as tf_text
from jax.experimental import jax2tf

from classer.data.tokenizer import LONG_WORD, MAX_WORD_CHARS, OVERLONG, WordPieceTokenizer

from .basic import in_basic_operators
from .folder import Export
from .formats import Request
from .runtime import Runtime
from .to_stablehlo import PLATFORMS, forward

tf: Any = tensorflow  # its stubs lack ragged tensors and the conversion of NumPy arrays

MODEL = "saved_model"
_CODE_POINTS = 0x110000


class TextModule(tf.Module):
    """The saved module. Its signature `serving_default` maps `texts` (B,) to `labels` (L,) and `scores` (B, L)."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request
        tokenizer = request.bundle.tokenizer
        self._characters = character_table(tokenizer)
        self._matcher: Any = tf_text.FastWordpieceTokenizer(
            list(tokenizer.vocab), token_out_type=tf.int32, max_bytes_per_word=4 * MAX_WORD_CHARS
        )
        self._weights = {name: tf.Variable(value, name=name) for name, value in request.bundle.weights.items()}
        tasks = request.bundle.taxonomy.tasks
        prefix = {task.name: f"{task.name}/" if len(tasks) > 1 else "" for task in tasks}
        self._labels = tf.constant([prefix[task.name] + name for task in tasks for name in task.label_names])

    def tokenize(self, texts: Any) -> tuple[Any, Any]:
        """Texts (B,) → token ids (B, S) and lengths (B,), int32, equal to those of `WordPieceTokenizer.encode`."""
        tokenizer = self._request.bundle.tokenizer
        codes = tf.strings.unicode_decode(texts, "UTF-8")  # invalid bytes become U+FFFD, which is dropped
        codes = codes.with_flat_values(tf.gather(self._characters, codes.flat_values)).merge_dims(1, 2)
        normalised = tf.strings.unicode_encode(codes, "UTF-8")
        normalised = tf.strings.regex_replace(normalised, LONG_WORD, OVERLONG * (MAX_WORD_CHARS + 1))
        ids = self._matcher.tokenize(normalised)[:, : self._request.max_length - 2]
        ones = tf.ones([tf.shape(texts)[0], 1], tf.int32)
        ids = tf.concat([tokenizer.cls_id * ones, ids, tokenizer.sep_id * ones], axis=1)
        return ids.to_tensor(tokenizer.pad_id), tf.cast(ids.row_lengths(), tf.int32)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="texts")], autograph=False)
    def __call__(self, texts: Any) -> dict[str, Any]:
        tokens_BS, lengths_B = self.tokenize(texts)
        return {"labels": self._labels, "scores": self._classify(tokens_BS, lengths_B)}

    def _classify(self, tokens_BS: Any, lengths_B: Any) -> Any:
        request = self._request
        if not request.lengths:
            return _converted(request, "length")(self._weights, tokens_BS, lengths_B)[1]
        # The number of tokens that a layer keeps depends on the length, so that each length has its own program.
        lengths = tf.constant(request.lengths)
        index = tf.searchsorted(lengths, tf.shape(tokens_BS)[1:])[0]

        def branch(length: int) -> Any:
            def run() -> Any:
                room = [[0, 0], [0, length - tf.shape(tokens_BS)[1]]]
                padded_BS = tf.pad(tokens_BS, room, constant_values=request.bundle.tokenizer.pad_id)
                padded_BS = tf.ensure_shape(padded_BS, [None, length])
                return _converted(request, str(length))(self._weights, padded_BS, lengths_B)[1]

            return run

        return tf.switch_case(index, [branch(length) for length in request.lengths])


def _converted(request: Request, length: str) -> Any:
    return jax2tf.convert(
        jax.jit(in_basic_operators(forward(request))),
        polymorphic_shapes=[None, f"(batch, {length})", "(batch,)"],
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )


def character_table(tokenizer: WordPieceTokenizer) -> Any:
    """A ragged int32 table (code points, replacements): each code point's replacement in the tokenizer."""
    replacements = [tokenizer.replacement(code_point) for code_point in range(_CODE_POINTS)]
    lengths = np.fromiter(map(len, replacements), np.int64, _CODE_POINTS)
    values = np.fromiter((ord(char) for text in replacements for char in text), np.int32, int(lengths.sum()))
    return tf.RaggedTensor.from_row_lengths(tf.constant(values), tf.constant(lengths), validate=False)


def write(request: Request, folder: Path) -> None:
    module = TextModule(request)
    tf.saved_model.save(module, str(folder / MODEL), signatures={"serving_default": module.__call__})


def load(export: Export) -> Runtime:
    classify = tf.saved_model.load(str(export.path / MODEL)).signatures["serving_default"]

    def run(texts: Sequence[str], batch_size: int) -> np.ndarray:
        batches = (texts[i : i + batch_size] for i in range(0, len(texts), batch_size))
        return np.concatenate([classify(texts=tf.constant(batch))["scores"].numpy() for batch in batches])

    return run


def usage(request: Request) -> str:
    return f"""\
import tensorflow as tf, tensorflow_text
classify = tf.saved_model.load("{MODEL}").signatures["serving_default"]
answer = classify(texts=tf.constant(["a text", "another"]))
for scores in answer["scores"].numpy():
    print(sorted(zip(scores, answer["labels"].numpy()), reverse=True)[:3])"""
