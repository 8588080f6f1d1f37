"""Closed-form conversion of a BERT to the native architecture. Axes: B batch, S sequence, N tokens, D width."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from classer.data.errors import InputError
from classer.model.config import NATIVE_SIZES, EncoderConfig, native, native_like
from classer.model.convert import _slowest_first, convert_encoder
from classer.model.encoder import Encoder
from classer.model.pretrained import load_encoder
from classer.model.quantize import Weights, unflatten
from classer.tests.helpers import write_encoder


def hidden(config: EncoderConfig, weights: Weights, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    bare = {name.removeprefix("encoder."): value for name, value in weights.items()}
    encoded = Encoder(config).apply({"params": unflatten(bare)}, tokens_BS, lengths_B)
    return np.asarray(encoded.hidden_BKD)  # pyright: ignore[reportAttributeAccessIssue]


def random_texts(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    lengths_B = rng.integers(4, length + 1, rows).astype(np.int32)
    tokens_BS = rng.integers(5, 28, (rows, length)).astype(np.int32)
    tokens_BS[np.arange(length) >= lengths_B[:, None]] = 0
    return tokens_BS, lengths_B


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderConfig, Weights]:
    """A random BERT without position embeddings, as no other encoder could approximate random positions."""
    folder = write_encoder(tmp_path_factory.mktemp("bert"), hidden_size=64, intermediate_size=192)
    config, weights = load_encoder(folder)
    name = "encoder.embeddings.position.table"
    return config, weights | {name: np.zeros_like(weights[name])}


def test_the_converted_encoder_answers_like_its_teacher(teacher: tuple[EncoderConfig, Weights]) -> None:
    rng = np.random.default_rng(0)
    made = convert_encoder(*teacher, *random_texts(rng, 400, 24))
    texts = random_texts(rng, 50, 24)
    real_BS = np.arange(24) < texts[1][:, None]
    wanted_ND, read_ND = hidden(*teacher, *texts)[real_BS], hidden(made.config, made.weights, *texts)[real_BS]

    def likeness(x_ND: np.ndarray) -> float:
        centred = wanted_ND - wanted_ND.mean(axis=0), x_ND - x_ND.mean(axis=0)
        lengths_N = np.linalg.norm(centred[0], axis=1) * np.linalg.norm(centred[1], axis=1)
        return float(((centred[0] * centred[1]).sum(axis=1) / lengths_N).mean())

    fitted = likeness(read_ND)
    random = Encoder(made.config).init(jax.random.key(0), *texts)
    untrained = Encoder(made.config).apply(random, *texts)
    assert fitted > 0.75
    assert abs(likeness(np.asarray(untrained.hidden_BKD)[real_BS])) < 0.3  # pyright: ignore[reportAttributeAccessIssue]


def test_the_readouts_turn_the_stream_into_what_the_teacher_answers(teacher: tuple[EncoderConfig, Weights]) -> None:
    texts = random_texts(np.random.default_rng(1), 200, 24)
    made = convert_encoder(*teacher, *texts)
    real_BS = np.arange(24) < texts[1][:, None]
    wanted_ND = hidden(*teacher, *texts)[real_BS]
    read_ND = hidden(made.config, made.weights, *texts)[real_BS] + made.bias_ID[-1]
    np.testing.assert_array_equal(made.weights["encoder.final_norm.scale"], made.scale_ID[-1])
    np.testing.assert_allclose(read_ND.mean(axis=0), wanted_ND.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(read_ND.std(axis=0), wanted_ND.std(axis=0), rtol=1e-2)


def test_turning_heads_to_the_slow_dimensions_leaves_their_scores_alone() -> None:
    config = native_like(EncoderConfig(vocab_size=10, num_layers=1, d_model=32, num_heads=4, d_ff=64))
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(50, 32)).astype(np.float32)
    before_DE = rng.normal(size=(32, 96)).astype(np.float32)
    after_DE = _slowest_first(before_DE, x_ND, config)
    np.testing.assert_array_equal(after_DE[:, 64:], before_DE[:, 64:])  # the value projection is unchanged

    def heads(kernel_DE: np.ndarray, part: int) -> np.ndarray:
        return (x_ND @ kernel_DE[:, part * 32 : part * 32 + 32]).reshape(50, 4, 8)

    for kernels in (before_DE, after_DE):
        scores = np.einsum("shk,thk->hst", heads(kernels, 0), heads(kernels, 1))
        np.testing.assert_allclose(
            scores, np.einsum("shk,thk->hst", heads(before_DE, 0), heads(before_DE, 1)), atol=1e-3
        )
    energy_HK = sum(np.square(heads(after_DE, part)).sum(axis=0) for part in (0, 1))
    slow_H, fast_H = energy_HK[:, [3, 7]].sum(axis=1), energy_HK[:, [0, 4]].sum(axis=1)  # pyright: ignore
    assert (slow_H > 2 * fast_H).all()


def test_a_berts_native_similarity_is_a_native_size() -> None:
    for size, d_ff in (("classer-22m", 1536), ("classer-110m", 3072)):
        layers, d_model, heads, _ = NATIVE_SIZES[size]
        bert = EncoderConfig(
            vocab_size=30_522, num_layers=layers, d_model=d_model, num_heads=heads, d_ff=d_ff, max_positions=512
        )
        expected = native(size, vocab_size=30_522, max_positions=512)
        assert native_like(bert) == dataclasses.replace(expected, gated=False)


def test_only_berts_are_converted(teacher: tuple[EncoderConfig, Weights]) -> None:
    config = dataclasses.replace(teacher[0], pre_norm=True)
    with pytest.raises(InputError, match="Only encoders of the BERT family can be converted"):
        convert_encoder(config, teacher[1], *random_texts(np.random.default_rng(0), 4, 8))


def test_a_written_encoder_comes_back(teacher: tuple[EncoderConfig, Weights], tmp_path: Path) -> None:
    from classer.model.pretrained import save_encoder

    made = convert_encoder(*teacher, *random_texts(np.random.default_rng(0), 100, 16))
    save_encoder(tmp_path, made.config, made.weights)
    config, weights = load_encoder(tmp_path)
    assert config == made.config
    assert weights.keys() == made.weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(value, made.weights[name])
