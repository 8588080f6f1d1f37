"""Running a trained classifier: compiled programs of static shapes, and whole data sets through them.

Axes: B batch, S sequence, N texts, L all labels of the taxonomy.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..data.buckets import BUCKETS, bucket_for, pad_batch
from ..data.errors import InputError
from .classifier import TextClassifier
from .config import EncoderConfig
from .evidence import Kept
from .focus import Focus, check_focus
from .precision import Precision
from .quantize import Weights, unflatten

# Limits of a batch: texts, and tokens with padding. Attention scores alone take 0.8 GB a layer for 64 texts of 512
# tokens and 12 heads in float32.
MAX_BATCH = 64
MAX_BATCH_TOKENS = 8192
# Memory mappings reserved for everything except compiled programs. On CPUs a program takes about 80, one with a focus
# about 400, and LLVM aborts the process when it gets no more.
SPARE_MAPPINGS = 4096
_MAPPINGS, _MAX_MAPPINGS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


class Executables(dict[tuple[str, int, int], jax.stages.Compiled]):
    """What was compiled for one kind of classifier, by (method of `TextClassifier`, batch size, length).

    The weights are arguments of what was compiled, no part of it.
    """


# Classifiers of the same kind share their executables, for as long as one of them or a holder of its executables lives.
_SHARED: weakref.WeakValueDictionary[tuple, Executables] = weakref.WeakValueDictionary()


class Program:
    """One compiled XLA executable for one batch size and length: logits, and the tokens that were kept."""

    def __init__(self, executable: jax.stages.Compiled, variables: dict, batch_size: int, length: int) -> None:
        self._executable = executable
        self._variables = variables
        self.batch_size = batch_size
        self.length = length

    def __call__(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Runs one full batch.

        Args:
          tokens_BS: int32 (batch_size, length).
          lengths_B: int32 (batch_size,); 0 for a filler row, whose logits mean nothing.

        Returns:
          logits_BL, float32, over all labels of the taxonomy. Waits for the device.
        """
        logits_BL, _ = self._executable(self._variables, tokens_BS, lengths_B)
        return np.asarray(logits_BL)

    def launch(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> Callable[[], np.ndarray]:
        """Starts one full batch as `__call__` does; the function returned waits for its logits."""
        logits_BL, _ = self._executable(self._variables, tokens_BS, lengths_B)
        return lambda: np.asarray(logits_BL)

    def explain(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> tuple[np.ndarray, list[Kept]]:
        """Runs one full batch as `__call__` does; also the tokens each row's last layer kept (all without a focus)."""
        return self.launch_explain(tokens_BS, lengths_B)()

    def launch_explain(
        self, tokens_BS: np.ndarray, lengths_B: np.ndarray
    ) -> Callable[[], tuple[np.ndarray, list[Kept]]]:
        """Starts one full batch as `explain` does; the function returned waits for its result."""
        logits_BL, evidence = self._executable(self._variables, tokens_BS, lengths_B)

        def collect() -> tuple[np.ndarray, list[Kept]]:
            kept_BK, positions_BK, scores_BK = map(np.asarray, evidence)
            rows = zip(kept_BK, positions_BK, scores_BK, strict=True)
            return np.asarray(logits_BL), [
                Kept(positions_K[kept_K], scores_K[kept_K]) for kept_K, positions_K, scores_K in rows
            ]

        return collect

    def as_text(self) -> str:
        """The optimised HLO, for instance to check that products are int8."""
        return self._executable.as_text() or ""


class Predictor:
    """A classifier's weights on the device, and the programs compiled for them so far."""

    def __init__(
        self,
        config: EncoderConfig,
        num_labels: int,
        weights: Weights,
        precision: Precision,
        compute_dtype: Precision = Precision.float32,
        focus: Focus | None = None,
    ) -> None:
        """Puts the weights on the default device.

        Args:
          config: the encoder.
          num_labels: labels of the whole taxonomy.
          weights: named arrays (see `quantize`).
          precision: of the weights, float32 or int8.
          compute_dtype: of activations, float32 or bfloat16.
          focus: the share of tokens that each layer keeps; None keeps all.

        Raises:
          InputError: as `check_focus`.
        """
        if focus is not None:
            check_focus(focus, config)
        dtype, by_text = jnp.dtype(compute_dtype), jax.default_backend() == "cpu"
        self._model = TextClassifier(config, num_labels, dtype, precision, focus=focus, by_text=by_text)
        self._variables = jax.device_put({"params": unflatten(weights)})
        shapes = tuple(sorted((name, str(value.dtype)) for name, value in weights.items()))
        kind = (config, num_labels, shapes, precision, jnp.dtype(compute_dtype).name, focus, jax.default_backend())
        self._executables = _SHARED.setdefault(kind, Executables())

    @property
    def executables(self) -> Executables:
        """What was compiled so far. While it is referenced, classifiers of the same kind do not compile it again."""
        return self._executables

    @property
    def focused(self) -> bool:
        """Whether layers drop tokens."""
        return self._model.focus is not None and not self._model.focus.full

    def with_weights(self, weights: Weights) -> Predictor:
        """The same classifier with other weights of the same shapes; shares the compiled programs."""
        other = copy.copy(self)
        other._variables = jax.device_put({"params": unflatten(weights)})
        return other

    def compile(self, batch_size: int, length: int) -> Program:
        """The program for a batch size and a sequence length in tokens; compiled at the first call for that shape.

        Raises:
          InputError: the process is near its limit of memory mappings.
        """
        return Program(self._compiled("explain", batch_size, length), self._variables, batch_size, length)

    def logits(
        self,
        ids: Sequence[np.ndarray],
        *,
        batch_size: int | None = None,
        buckets: Sequence[int] = BUCKETS,
        columns: slice = slice(None),
        progress: Callable[[int], object] = lambda texts: None,
    ) -> np.ndarray:
        """Logits of many texts, in batches of like length.

        Args:
          ids: int32 token ids of each text.
          batch_size: texts a batch; by default up to `MAX_BATCH`, fewer of long texts (`MAX_BATCH_TOKENS`).
          buckets: lengths to compile for, ascending.
          columns: the labels of the taxonomy to return, such as a task's slice.
          progress: called with the number of texts done since the last call.

        Returns:
          logits_NL, float32, in the order of `ids`.
        """
        logits_NL = np.zeros((len(ids), len(range(self._model.num_labels)[columns])), np.float32)
        for rows, tokens_BS, lengths_B in _batches(ids, batch_size, buckets):
            program = self.compile(*tokens_BS.shape)
            logits_NL[rows] = program(tokens_BS, lengths_B)[: len(rows), columns]
            progress(len(rows))
        return logits_NL

    def pooled(
        self, ids: Sequence[np.ndarray], *, batch_size: int | None = None, buckets: Sequence[int] = BUCKETS
    ) -> np.ndarray:
        """The pooled vectors that the label head reads, float32 (N, D); needs no weights of the head.

        The arguments and the order are those of `logits`.
        """
        pooled_ND = np.zeros((len(ids), self._model.config.d_model), np.float32)
        for rows, tokens_BS, lengths_B in _batches(ids, batch_size, buckets):
            executable = self._compiled("pooled", *tokens_BS.shape)
            pooled_ND[rows] = np.asarray(executable(self._variables, tokens_BS, lengths_B))[: len(rows)]
        return pooled_ND

    def _compiled(self, method: str, batch_size: int, length: int) -> jax.stages.Compiled:
        """One method of the classifier for one shape; compiled at the first call."""
        key = (method, batch_size, length)
        if key not in self._executables:
            _check_mappings()

            def forward(variables: dict, tokens_BS: jax.Array, lengths_B: jax.Array) -> Any:
                return self._model.apply(variables, tokens_BS, lengths_B, method=method)

            tokens_BS = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
            lengths_B = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
            self._executables[key] = jax.jit(forward).lower(self._variables, tokens_BS, lengths_B).compile()
        return self._executables[key]


def _batches(
    ids: Sequence[np.ndarray], batch_size: int | None, buckets: Sequence[int]
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """The texts in padded batches of like length: their places in `ids`, tokens_BS and lengths_B."""
    by_bucket: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        by_bucket.setdefault(bucket_for(len(row), buckets), []).append(i)
    for bucket, indices in sorted(by_bucket.items()):
        size = batch_size or max(1, min(MAX_BATCH, MAX_BATCH_TOKENS // bucket))
        for start in range(0, len(indices), size):
            rows = indices[start : start + size]
            yield rows, *pad_batch([ids[i] for i in rows], size, bucket, pad_id=0)


def _check_mappings() -> None:
    """Raises InputError if this process is near Linux's limit of memory mappings."""
    if jax.default_backend() != "cpu":
        return
    try:
        allowed = int(_MAX_MAPPINGS.read_text())
        with _MAPPINGS.open("rb") as file:
            held = sum(1 for _ in file)
    except (OSError, ValueError):  # not Linux
        return
    if held + SPARE_MAPPINGS > allowed:
        raise InputError(
            f"This process holds {held:,} memory mappings of the {allowed:,} that the system allows, so that no more "
            "programs fit in. Use fewer models or focuses at once, or allow more: sysctl vm.max_map_count=262144."
        )
