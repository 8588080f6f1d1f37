"""Conversion of a pretrained encoder to the native architecture: `model.convert`, followed by healing.

Healing is layer-by-layer distillation on unlabelled texts: after each layer, a readout (norm, scale and shift) of the
student's residual stream is trained to match the teacher's hidden states (as in TinyBERT, Jiao et al. 2019,
https://arxiv.org/abs/1909.10351). Readouts are discarded after training, except the last layer's scale, which is the
encoder's final norm.

Axes: B batch, S sequence, N = B × S, D model width, I layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.sparse import csr_array

from ..data.buckets import BUCKETS, bucket_for, pad_batch
from ..data.errors import InputError
from ..data.pipeline import Batch, TrainExamples, epoch_batches
from ..data.readers import read_texts
from ..data.tokenizer import WordPieceTokenizer
from ..model.config import EncoderConfig
from ..model.convert import Converted, convert_encoder
from ..model.encoder import Encoder
from ..model.layers import EncoderLayer
from ..model.ops import rms_norm
from ..model.precision import ComputeDtype, Precision
from ..model.pretrained import MINILM, fetch_encoder, load_encoder, save_encoder
from ..model.quantize import Weights, flatten, unflatten
from .checkpoints import Checkpoints, Progress
from .config import Recipe
from .distributed import say
from .runlog import RunLog
from .step import TrainState, init_state, learning_rate_schedule, make_optimizer

HELD_OUT = 256  # texts
FITTED_TOKENS = 16_000  # for the closed-form fit
MIN_TOKENS = 10_000
# The weight of the last layer's error in the loss; the earlier layers share the rest equally.
LAST_LAYER_SHARE = 0.5
CHECKPOINTS = "checkpoints"
STEPS_BETWEEN_CHECKPOINTS = 200


@dataclasses.dataclass(frozen=True)
class ConvertJob:
    """One conversion.

    Attributes:
      data: files of texts (CSV, TSV, JSONL or Parquet); labels are ignored.
      out: a new folder for the encoder and the run's log.
      encoder: the pretrained encoder, of the BERT family: a folder, or a name on the Hugging Face hub.
      text_column: the column or field that holds the text.
      tokens: number of tokens to train on, without padding; texts are repeated if there are fewer.
      max_length: maximum tokens of a text; longer texts are truncated.
      batch_size: texts per step.
      learning_rate: peak learning rate, after the warm-up; it then decays to 0 along a cosine.
      compute_dtype: dtype of activations and products.
      seed: random seed of the shuffles.
      resume: resume the conversion in `out` from its last checkpoint.
    """

    data: tuple[Path, ...]
    out: Path
    encoder: str = MINILM
    text_column: str = "text"
    tokens: int = 3_000_000
    max_length: int = 128
    batch_size: int = 64
    learning_rate: float = 5e-4
    compute_dtype: ComputeDtype = Precision.bfloat16
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if self.tokens < MIN_TOKENS:
            raise InputError(f"tokens is {self.tokens}; conversion needs {MIN_TOKENS:,} at least.")
        if not 8 <= self.max_length <= BUCKETS[-1]:
            raise InputError(f"max_length is {self.max_length}; it must be between 8 and {BUCKETS[-1]}.")
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be above 0.")


class Similarity(NamedTuple):
    """Mean cosine similarity of student and teacher on held-out texts, over tokens and over the texts' mean vectors."""

    tokens: float
    texts: float

    def __str__(self) -> str:
        return f"cosine to the teacher {self.tokens:.4f} (tokens), {self.texts:.4f} (mean of a text)"


def run_convert(job: ConvertJob) -> Similarity:
    """Converts an encoder and writes it to `job.out`, an encoder folder for `--encoder`, with `metrics.jsonl` in it.

    Args:
      job: the conversion.

    Returns:
      The similarity of the healed encoder to its teacher on held-out texts.

    Raises:
      InputError: the data, the encoder or the folder cannot be used, or training diverged.
    """
    if (job.out / "model.safetensors").exists():
        raise InputError(
            f"{job.out} holds a finished encoder; nothing in it was touched. Name a new folder with --out."
        )
    if job.resume:
        if not (job.out / CHECKPOINTS).is_dir():
            raise InputError(f"There is nothing to resume in {job.out}: it holds no {CHECKPOINTS}.")
    elif job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
        raise InputError(
            f"{job.out} exists and is not empty; nothing in it was touched. Name a new folder with --out, "
            "or go on with what it holds with --resume."
        )
    folder = fetch_encoder(job.encoder)
    teacher, teacher_weights = load_encoder(folder)
    tokenizer = WordPieceTokenizer.from_folder(folder)
    train, held_out = _read(job, tokenizer)

    started = time.monotonic()
    some, total = [], 0
    for row in train:
        some.append(row)
        total += len(row)
        if total >= FITTED_TOKENS:
            break
    fitted = convert_encoder(teacher, teacher_weights, *_pad(some))
    compare = functools.partial(_similarity, teacher, teacher_weights, fitted.config, held_out)
    before = compare(fitted.weights, fitted.bias_ID[-1])
    say(f"Fitted in closed form to {total:,} tokens: {before}.")

    params, tokens_seen = _heal(job, teacher, teacher_weights, fitted, train, tokenizer.pad_id)
    weights = {f"encoder.{name}": value for name, value in flatten(params["encoder"]).items()}
    after = compare(weights, np.asarray(params["readout"]["bias"][-1]))
    hours = (time.monotonic() - started) / 3600
    say(f"Healed on {tokens_seen:,} tokens in {hours:.2f} hours: {after}.")

    for name in ("vocab.txt", "tokenizer_config.json", "LICENSE", "NOTICE"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, job.out / name)
    (job.out / "README.md").write_text(
        f"An encoder of Classer's native architecture, converted from {job.encoder} on {tokens_seen:,} tokens in "
        f"{hours:.2f} hours.\n\nOn {len(held_out)} held-out texts: {after}.\n",
        encoding="utf-8",
    )
    save_encoder(job.out, fitted.config, weights)  # last, as its weights file marks the encoder as finished
    return after


def _read(job: ConvertJob, tokenizer: WordPieceTokenizer) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids of the training texts and of the held-out texts, both in random order.

    Raises:
      InputError: a file cannot be read, or there are too few texts.
    """
    texts = [text for file in job.data for text in read_texts(file, text_column=job.text_column)]
    if len(texts) <= HELD_OUT:
        raise InputError(f"{len(texts)} texts are too few; {HELD_OUT} are held out, and the others trained on.")
    ids = tokenizer.encode(texts, job.max_length).ids
    ids = [ids[i] for i in np.random.default_rng(job.seed).permutation(len(ids))]
    held_out, train = ids[:HELD_OUT], ids[HELD_OUT:]
    say(f"Read {len(texts):,} texts of {sum(map(len, ids)):,} tokens, cut to {job.max_length} each.")
    ends = np.cumsum([len(row) for row in train])
    return train[: int(np.searchsorted(ends, job.tokens)) + 1], held_out


def _heal(
    job: ConvertJob, teacher: EncoderConfig, weights: Weights, fitted: Converted, train: list[np.ndarray], pad_id: int
) -> tuple[Any, int]:
    """Trains the student; returns its parameters and the number of tokens seen.

    Raises:
      InputError: the loss is not finite.
    """
    epoch_tokens = sum(map(len, train))
    epochs = max(1, round(job.tokens / epoch_tokens))
    unlabelled = csr_array((len(train), 0), dtype=np.float32)
    batches = epoch_batches(
        TrainExamples(train, unlabelled, np.zeros(len(train), np.int32)),
        batch_size=job.batch_size,
        seed=job.seed,
        pad_id=pad_id,
        num_epochs=epochs,
    )
    recipe = Recipe(learning_rate=job.learning_rate, warmup=0.05, compute_dtype=job.compute_dtype)
    schedule = learning_rate_schedule(recipe, batches.num_steps)
    optimizer = make_optimizer(recipe, schedule)
    readout = {"scale": jnp.asarray(fitted.scale_ID), "bias": jnp.asarray(fitted.bias_ID)}
    params = {"encoder": unflatten(_bare(fitted.weights)), "readout": readout}
    state = init_state(params, optimizer)
    step = make_healing_step(teacher, weights, fitted.config, optimizer, jnp.dtype(job.compute_dtype))
    with Checkpoints(job.out / CHECKPOINTS) as checkpoints, contextlib.closing(iter(batches)) as iterator:
        done = 0
        if job.resume and (last := checkpoints.latest_step) is not None:
            state, progress = checkpoints.restore(state, last)
            iterator.set_state(progress.data)
            done = last
        with RunLog(job.out, batches.num_steps, start_step=done) as log:
            for number in range(done + 1, batches.num_steps + 1):
                batch: Batch = next(iterator)
                state, errors_I = step(state, batch.tokens_BS, batch.lengths_B)
                loss = errors_I[-1].item()
                if not math.isfinite(loss):
                    raise InputError(
                        f"The loss of step {number} is {loss}: training diverged; lower the learning_rate."
                    )
                log.step(number, loss, int(batch.lengths_B.sum()), float(np.asarray(schedule(number - 1))))
                if number % STEPS_BETWEEN_CHECKPOINTS == 0:
                    log.scalars(
                        number, {f"layer_{i}/error": float(error) for i, error in enumerate(np.asarray(errors_I))}
                    )
                    checkpoints.save(state, Progress(0, iterator.get_state(), 0.0, 0.0, number, 0))
    return jax.device_get(state.params), epochs * epoch_tokens


def make_healing_step(
    teacher: EncoderConfig,
    weights: Weights,
    student: EncoderConfig,
    optimizer: optax.GradientTransformation,
    dtype: jnp.dtype,
) -> Callable[[TrainState, np.ndarray, np.ndarray], tuple[TrainState, jax.Array]]:
    """Builds the training step: (state, tokens_BS, lengths_B) → the new state and each layer's error, float32 (I,).

    A layer's error is the mean squared difference between student and teacher over real tokens, divided by the
    teacher's variance. The teacher's weights are an argument of the compiled step; they are not part of the state or of
    checkpoints.
    """
    theirs = jax.device_put(unflatten(_bare(weights)))

    def errors(params: Any, teacher_params: Any, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
        real_N1 = (jnp.arange(tokens_BS.shape[1]) < lengths_B[:, None]).reshape(-1, 1)
        wanted = lax.stop_gradient(_layer_outputs(teacher, teacher_params, tokens_BS, lengths_B, dtype))
        streams = _layer_outputs(student, params["encoder"], tokens_BS, lengths_B, dtype)
        scale_ID, bias_ID = params["readout"]["scale"], params["readout"]["bias"]
        # The last layer's readout is the encoder's own final norm.
        scales = [*scale_ID[:-1], params["encoder"]["final_norm"]["scale"]]
        shares = []
        for stream_ND, wanted_ND, scale_D, bias_D in zip(streams, wanted, scales, bias_ID, strict=True):
            wanted_ND = wanted_ND.astype(jnp.float32)
            read_ND = rms_norm(stream_ND.astype(jnp.float32), scale_D, student.norm_eps) + bias_D
            mean_D = (wanted_ND * real_N1).sum(axis=0) / real_N1.sum()
            variance = (jnp.square(wanted_ND - mean_D) * real_N1).sum()
            shares.append((jnp.square(read_ND - wanted_ND) * real_N1).sum() / variance)
        return jnp.stack(shares)

    def loss_fn(*args: Any) -> tuple[jax.Array, jax.Array]:
        errors_I = errors(*args)
        return (1 - LAST_LAYER_SHARE) * errors_I[:-1].mean() + LAST_LAYER_SHARE * errors_I[-1], errors_I

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, teacher_params: Any, tokens_BS: jax.Array, lengths_B: jax.Array):
        gradients, errors_I = jax.grad(loss_fn, has_aux=True)(state.params, teacher_params, tokens_BS, lengths_B)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), errors_I

    return lambda state, tokens_BS, lengths_B: step(state, theirs, tokens_BS, lengths_B)


def _layer_outputs(
    config: EncoderConfig, params: Any, tokens_BS: jax.Array, lengths_B: jax.Array, dtype: jnp.dtype
) -> list[jax.Array]:
    """The residual stream after each layer, (N, D)."""
    _, captured = Encoder(config, dtype).apply(
        {"params": params},
        tokens_BS,
        lengths_B,
        capture_intermediates=lambda module, _: isinstance(module, EncoderLayer),
        mutable=["intermediates"],
    )
    layers = cast(Any, captured)["intermediates"]
    return [layers[f"layer_{i}"]["__call__"][0][0] for i in range(config.num_layers)]


def _similarity(
    teacher: EncoderConfig,
    teacher_weights: Weights,
    student: EncoderConfig,
    texts: Sequence[np.ndarray],
    weights: Weights,
    bias_D: np.ndarray,
) -> Similarity:
    @functools.partial(jax.jit, static_argnums=0)
    def hidden(config: EncoderConfig, params: Any, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
        return cast(Any, Encoder(config).apply({"params": params}, tokens_BS, lengths_B)).hidden_BKD

    tokens_BS, lengths_B = _pad(texts)
    real_BS = np.arange(tokens_BS.shape[1]) < lengths_B[:, None]
    wanted_BSD, read_BSD = (
        np.asarray(hidden(config, unflatten(_bare(mine)), tokens_BS, lengths_B))
        for config, mine in ((teacher, teacher_weights), (student, weights))
    )
    read_BSD = read_BSD + bias_D
    means = [(x * real_BS[..., None]).sum(axis=1) for x in (wanted_BSD, read_BSD)]
    return Similarity(_cosine(wanted_BSD[real_BS], read_BSD[real_BS]), _cosine(*means))


def _cosine(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    lengths_N = np.linalg.norm(x_ND, axis=1) * np.linalg.norm(y_ND, axis=1)
    return float(((x_ND * y_ND).sum(axis=1) / np.maximum(lengths_N, 1e-12)).mean())


def _pad(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return pad_batch(texts, len(texts), bucket_for(max(map(len, texts))), pad_id=0)


def _bare(weights: Weights) -> Weights:
    return {name.removeprefix("encoder."): value for name, value in weights.items()}
