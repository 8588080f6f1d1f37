"""Running a trained classifier: compiled programs of static shapes, and whole data sets through them.

Axes: B batch, S sequence, N texts, L all labels of the taxonomy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..data.buckets import BUCKETS, bucket_for, pad_batch
from .classifier import TextClassifier
from .config import ComputeDtype, EncoderConfig
from .quantize import Precision, Quantization, Weights, variables


class Program:
    """One compiled XLA executable: (batch size, length) → logits."""

    def __init__(self, compiled: Callable[..., jax.Array], variables: dict, batch_size: int, length: int) -> None:
        self._compiled = compiled
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
        return np.asarray(self._compiled(self._variables, tokens_BS, lengths_B))

    def as_text(self) -> str:
        """The optimised HLO, to check what became of it (int8 products, say)."""
        return self._compiled.as_text()  # pyright: ignore[reportFunctionMemberAccess]


class Predictor:
    """A classifier's weights on the device, and the programs compiled for them so far."""

    def __init__(
        self,
        config: EncoderConfig,
        num_labels: int,
        weights: Weights,
        precision: Precision,
        compute_dtype: ComputeDtype = "float32",
    ) -> None:
        """Puts the weights on the default device.

        Args:
          config: the encoder.
          num_labels: labels of the whole taxonomy.
          weights: named arrays (see `quantize`).
          precision: what the weights are.
          compute_dtype: what activations are, between the products.
        """
        quantization = Quantization.SERVE if precision == "int8" else Quantization.NONE
        self._model = TextClassifier(config, num_labels, jnp.dtype(compute_dtype), quantization)
        self._variables = jax.device_put(variables(weights, precision))
        self._programs: dict[tuple[int, int], Program] = {}
        self._quantized = precision == "int8"

    def compile(self, batch_size: int, length: int) -> Program:
        """The program for a batch size and a sequence length in tokens; compiled at the first call for that shape."""
        key = (batch_size, length)
        if key not in self._programs:
            tokens_BS = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
            lengths_B = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
            compiled = jax.jit(self._forward).lower(self._variables, tokens_BS, lengths_B).compile()
            self._programs[key] = Program(compiled, self._variables, batch_size, length)
        return self._programs[key]

    def logits(
        self,
        ids: Sequence[np.ndarray],
        *,
        batch_size: int = 64,
        buckets: Sequence[int] = BUCKETS,
        progress: Callable[[int], object] = lambda texts: None,
    ) -> np.ndarray:
        """Logits of many texts, in batches of like length.

        Args:
          ids: int32 token ids of each text.
          batch_size: texts a batch.
          buckets: lengths to compile for, ascending.
          progress: called with the number of texts done since the last call.

        Returns:
          logits_NL, float32, in the order of `ids`.
        """
        logits_NL = np.zeros((len(ids), self._model.num_labels), np.float32)
        by_bucket: dict[int, list[int]] = {}
        for i, row in enumerate(ids):
            by_bucket.setdefault(bucket_for(len(row), buckets), []).append(i)
        for bucket, indices in sorted(by_bucket.items()):
            program = self.compile(batch_size, bucket)
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                tokens_BS, lengths_B = pad_batch([ids[i] for i in batch], batch_size, bucket, pad_id=0)
                logits_NL[batch] = program(tokens_BS, lengths_B)[: len(batch)]
                progress(len(batch))
        return logits_NL

    def _forward(self, variables: dict, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
        # AQT asks for an RNG even where it rounds to nearest.
        rngs = {"params": jax.random.key(0)} if self._quantized else None
        return self._model.apply(variables, tokens_BS, lengths_B, rngs=rngs)
