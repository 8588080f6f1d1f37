"""Agreement of the encoder with transformers' BertModel on PyTorch, and of its gradients with plain formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from classer.data.buckets import pad_batch
from classer.data.tokenizer import WordPieceTokenizer
from classer.model import ops
from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig
from classer.model.encoder import Encoder
from classer.model.pretrained import load_encoder
from classer.model.quantize import Weights, flatten, unflatten
from classer.tests.helpers import write_encoder

TEXTS = [
    "My card still has not arrived, and it has been two weeks!",
    "",
    "Zürich 中文 naïve café — 😀 antidisestablishmentarianism",
    "Why was I charged an extra fee when paying with my card abroad? " * 3,
]


def our_layers(
    config: EncoderConfig, weights: Weights, tokens_BS: np.ndarray, lengths_B: np.ndarray, dtype=jnp.float32
):
    """Hidden states [embeddings, layer 0, …], each float32 (B, S, D)."""
    params = unflatten(weights)["encoder"]

    @jax.jit
    def apply(params, tokens_BS, lengths_B):
        return Encoder(config, dtype).apply(
            {"params": params}, tokens_BS, lengths_B, capture_intermediates=True, mutable=["intermediates"]
        )

    encoded, captured = apply(params, tokens_BS, lengths_B)
    found: Any = captured["intermediates"]
    layers = [found["embeddings"]["__call__"][0]]
    layers += [found[f"layer_{i}"]["__call__"][0][0] for i in range(config.num_layers)]
    layers = [np.asarray(x, np.float32).reshape(*tokens_BS.shape, -1) for x in layers]
    np.testing.assert_array_equal(layers[-1], np.asarray(encoded.hidden_BKD, np.float32))
    return layers


def their_layers(folder: Path, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> list[np.ndarray]:
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    mask_BS = np.arange(tokens_BS.shape[1]) < lengths_B[:, None]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens_BS, dtype=torch.long),
            attention_mask=torch.tensor(mask_BS, dtype=torch.long),
            output_hidden_states=True,
        )
    return [x.numpy() for x in out.hidden_states]


def largest_difference(ours: list[np.ndarray], theirs: list[np.ndarray], lengths_B: np.ndarray) -> list[float]:
    """The largest absolute difference in each layer, over real tokens only."""
    mask_BS = np.arange(ours[0].shape[1]) < lengths_B[:, None]
    assert len(ours) == len(theirs)
    return [float(np.abs(a - b)[mask_BS].max()) for a, b in zip(ours, theirs, strict=True)]


@pytest.fixture(scope="module")
def real_batch(minilm: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, S) and lengths (B,) of real texts, an empty text, a row of one token and an empty row."""
    tokenizer = WordPieceTokenizer.from_folder(minilm)
    ids = tokenizer.encode(TEXTS, 64).ids
    return pad_batch([*ids, ids[0][:1]], len(ids) + 2, 64, tokenizer.pad_id)


@pytest.fixture(scope="module")
def real_layers(minilm: Path, real_batch) -> list[np.ndarray]:
    return our_layers(*load_encoder(minilm), *real_batch)


def test_minilm_agrees_with_transformers_on_every_layer(minilm: Path, real_batch, real_layers) -> None:
    tokens_BS, lengths_B = real_batch
    assert lengths_B.tolist()[1] == 2, "the empty text is [CLS] [SEP]"
    assert lengths_B.tolist()[-2:] == [1, 0]
    assert max(lengths_B) > 40
    assert max(largest_difference(real_layers, their_layers(minilm, tokens_BS, lengths_B), lengths_B)) < 1e-4


def test_padding_and_empty_rows_are_finite(real_layers) -> None:
    assert all(np.isfinite(layer).all() for layer in real_layers)


@pytest.mark.parametrize("seed", [0, 1])
def test_encoders_of_other_sizes_agree_with_transformers(tmp_path: Path, seed: int) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6 - 4 * seed, "intermediate_size": 100}
    folder = write_encoder(tmp_path, seed=seed, **sizes, type_vocab_size=3, layer_norm_eps=1e-3)
    config, weights = load_encoder(folder)
    rng = np.random.default_rng(seed)
    lengths_B = np.array([40, 1, 7, 0], np.int32)
    tokens_BS = rng.integers(0, config.vocab_size, (4, 40), dtype=np.int32)
    ours = our_layers(config, weights, tokens_BS, lengths_B)
    assert max(largest_difference(ours, their_layers(folder, tokens_BS, lengths_B), lengths_B)) < 1e-4


def test_bfloat16_stays_close(minilm: Path, real_batch, real_layers) -> None:
    tokens_BS, lengths_B = real_batch
    mask_BS = np.arange(tokens_BS.shape[1]) < lengths_B[:, None]
    rough = our_layers(*load_encoder(minilm), tokens_BS, lengths_B, jnp.bfloat16)
    for exact, ours in zip(real_layers, rough, strict=True):
        relative = np.linalg.norm((ours - exact)[mask_BS]) / np.linalg.norm(exact[mask_BS])
        assert 1e-5 < relative < 0.03


def test_a_row_depends_neither_on_its_batch_nor_on_the_bucket(minilm: Path) -> None:
    config, weights = load_encoder(minilm)
    ids = WordPieceTokenizer.from_folder(minilm).encode(TEXTS, 64).ids
    params = unflatten(weights)["encoder"]
    apply = jax.jit(Encoder(config).apply)

    def encode(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        return np.asarray(apply({"params": params}, tokens_BS, lengths_B).hidden_BKD)

    row = len(ids[0])
    alone_SD = encode(*pad_batch(ids[:1], 1, 24, 0))[0, :row]
    for batch, length, pad_id in ((ids, 64, 0), ([ids[0], *ids[::-1][:2]], 96, 0), (ids[:1], 32, 999)):
        among_SD = encode(*pad_batch(batch, len(batch), length, pad_id))[0, :row]
        np.testing.assert_allclose(among_SD, alone_SD, atol=1e-5)


# The hand-written backward passes of `ops`, compared with JAX's gradients of the textbook formulas.


def plain_linear(x, kernel, bias):
    return jnp.dot(x, kernel, precision="highest") + bias


def plain_layer_norm(x, scale, bias):
    variance = jnp.var(x, axis=-1, keepdims=True)
    return (x - x.mean(axis=-1, keepdims=True)) / jnp.sqrt(variance + 1e-12) * scale + bias


def our_layer_norm(x, scale, bias):
    return ops.layer_norm(x, scale, bias, 1e-12)


def plain_gelu(x):
    return jax.nn.gelu(x, approximate=False)


OPS = {
    "linear": (ops.linear, plain_linear, [(37, 24), (24, 19), (19,)]),
    "linear of one token": (ops.linear, plain_linear, [(1, 8), (8, 8), (8,)]),
    "layer_norm": (our_layer_norm, plain_layer_norm, [(37, 24), (24,), (24,)]),
    "gelu": (ops.gelu, plain_gelu, [(37, 24)]),
}


def values_and_gradients(function, arguments: list[jax.Array], cotangent: np.ndarray) -> list[np.ndarray]:
    def total(*arguments):
        out = function(*arguments)
        return (out.astype(jnp.float32) * cotangent).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(arguments))), has_aux=True))(
        *arguments
    )
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_formulas(name: str, dtype, tolerance: float) -> None:
    ours, plain, shapes = OPS[name]
    rng = np.random.default_rng(0)
    # Activations in `dtype`, parameters in float32; rounded first, so that both sides have the same inputs.
    x, *parameters = [jnp.asarray(rng.normal(0.3, 1.0, shape), jnp.float32) for shape in shapes]
    x = x.astype(dtype)
    cotangent = np.asarray(jnp.asarray(rng.normal(size=jax.eval_shape(ours, x, *parameters).shape), dtype), np.float32)
    got = values_and_gradients(ours, [x, *parameters], cotangent)
    expected = values_and_gradients(plain, [x.astype(jnp.float32), *parameters], cotangent)
    for what, a, b in zip(("value", "dx", "d1", "d2"), got, expected, strict=False):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max()), what


def test_a_constant_row_has_finite_gradients() -> None:
    x, ones, zeros = jnp.full((3, 16), 0.7), jnp.ones(16), jnp.zeros(16)
    for array in values_and_gradients(our_layer_norm, [x, ones, zeros], np.ones((3, 16), np.float32)):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite_and_fillers_add_nothing(tiny_encoder: Path, dtype) -> None:
    config, pretrained = load_encoder(tiny_encoder)
    model = TextClassifier(config, 3, dtype)
    rng = np.random.default_rng(0)
    tokens_BS = rng.integers(0, config.vocab_size, (5, 16), dtype=np.int32)
    lengths_B = np.array([16, 5, 1, 0, 0], np.int32)
    init = jax.jit(model.init)(jax.random.key(0), tokens_BS, lengths_B)["params"]
    params = unflatten(flatten(init) | pretrained)

    @jax.jit
    def gradients(params, tokens_BS, lengths_B):
        def loss(params):
            logits_BL: Any = model.apply({"params": params}, tokens_BS, lengths_B)
            return (jnp.square(logits_BL - 1.0).sum(axis=-1) * (lengths_B > 0)).sum()

        return jax.grad(loss)(params)

    padded = flatten(gradients(params, tokens_BS, lengths_B))
    short = flatten(gradients(params, tokens_BS[:3], lengths_B[:3]))
    assert all(np.isfinite(g).all() for g in padded.values())
    assert np.abs(padded["encoder.layer_0.attention.qkv.kernel"]).max() > 0
    for name, gradient in padded.items():
        tolerance = (1e-5 if dtype == jnp.float32 else 3e-2) * max(1.0, np.abs(short[name]).max())
        np.testing.assert_allclose(gradient, short[name], atol=tolerance, err_msg=name)
