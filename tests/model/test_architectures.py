"""The native architecture and ModernBERT: agreement with transformers, positions, sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from classer.data.buckets import pad_batch
from classer.data.errors import InputError
from classer.model import layers, ops
from classer.model.classifier import TextClassifier
from classer.model.config import NATIVE_SIZES, EncoderConfig, native
from classer.model.encoder import Encoder
from classer.model.focus import Focus, FocusDraw
from classer.model.layers import rotate
from classer.model.precision import Precision
from classer.model.predict import Predictor
from classer.model.pretrained import load_encoder, save_encoder
from classer.model.quantize import count_products, flatten, to_int8, unflatten
from classer.model.stacking import stack_layers, unstack_layers

SMALL = dataclasses.replace(
    native("classer-5m", vocab_size=100, max_positions=64), num_layers=3, d_model=32, num_heads=4, d_ff=48
)


def modernbert(folder: Path, seed: int, **fields: Any) -> transformers.ModernBertModel:
    """A random ModernBERT, also saved to `folder`; every weight differs from its initial value."""
    defaults: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "local_attention": 8,
    }
    special: dict[str, Any] = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    torch.manual_seed(seed)
    config: Any = transformers.ModernBertConfig(**(defaults | special | fields))
    config._attn_implementation = "eager"
    model = transformers.ModernBertModel(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape) * 0.2
            value.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("seed", "fields"),
    [(0, {}), (1, {"local_attention": 4, "global_attn_every_n_layers": 2, "num_hidden_layers": 4, "norm_eps": 1e-3})],
)
def test_modernbert_agrees_with_transformers(tmp_path: Path, seed: int, fields: dict[str, Any]) -> None:
    theirs = modernbert(tmp_path, seed, **fields)
    config, weights = load_encoder(tmp_path)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(5, 60, n, dtype=np.int32) for n in (50, 23, 3, 1)]
    tokens_BS, lengths_B = pad_batch(rows, 4, 50, 0)
    mask_BS = np.arange(50) < lengths_B[:, None]
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(tokens_BS, dtype=torch.long), attention_mask=torch.tensor(mask_BS, dtype=torch.long)
        ).last_hidden_state.numpy()
    params = unflatten(weights)["encoder"]
    encoded: Any = jax.jit(Encoder(config).apply)({"params": params}, tokens_BS, lengths_B)
    assert np.abs(np.asarray(encoded.hidden_BKD) - expected)[mask_BS].max() < 1e-4
    assert [config.is_local(i) for i in range(config.num_layers)] == [
        kind == "sliding_attention" for kind in theirs.config.layer_types or ()
    ]


def test_what_modernbert_is_not_is_said(tmp_path: Path) -> None:
    modernbert(tmp_path, 0, mlp_bias=True)
    with pytest.raises(InputError, match="mlp_bias is 'True'; only 'False' is supported"):
        load_encoder(tmp_path)


@pytest.fixture(scope="module")
def small() -> tuple[EncoderConfig, dict[str, np.ndarray]]:
    """A small encoder of the native architecture, with random gates, norms and head."""
    init = jax.jit(TextClassifier(SMALL, 3).init)(
        jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
    )
    rng = np.random.default_rng(0)
    return SMALL, {
        name: (v + rng.normal(0, 0.2, v.shape)).astype(np.float32) for name, v in flatten(init["params"]).items()
    }


def test_the_native_architecture_has_no_biases_and_no_position_table(small) -> None:
    names = [name for name in small[1] if name.startswith("encoder.")]
    assert not [name for name in names if name.endswith("bias") or "position" in name or "segment" in name]
    assert "encoder.final_norm.scale" in names
    assert "encoder.layer_0.attention_norm.scale" not in names


def test_the_native_architecture_matches_its_formulas(small) -> None:
    """Compares one row with plain NumPy in float64."""
    config, weights = small
    w = {name.removeprefix("encoder."): value.astype(np.float64) for name, value in weights.items()}
    ids = np.random.default_rng(1).integers(0, 100, 11)
    D, H, K = config.d_model, config.num_heads, config.head_dim

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w[f"{name}.scale"]

    def turn(x):  # as complex numbers: the definition of RoPE
        z = x[..., : K // 2] + 1j * x[..., K // 2 :]
        z = z * np.exp(1j * np.arange(len(ids))[:, None] * 10_000.0 ** (-2 * np.arange(K // 2) / K))
        return np.concatenate([z.real, z.imag], axis=-1)

    x = norm(w["embeddings.token.table"][ids], "embeddings.norm")
    for i in range(config.num_layers):
        h = norm(x, f"layer_{i}.attention_norm") if i else x
        q, k, v = ((h @ w[f"layer_{i}.attention.qkv.kernel"])[:, j * D : (j + 1) * D] for j in range(3))
        q, k, v = (y.reshape(-1, H, K).transpose(1, 0, 2) for y in (q, k, v))
        scores = turn(q) @ turn(k).transpose(0, 2, 1) / np.sqrt(K)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (p / p.sum(-1, keepdims=True)) @ v
        x = x + mixed.transpose(1, 0, 2).reshape(-1, D) @ w[f"layer_{i}.attention.out.kernel"]
        gate, value = np.split(
            norm(x, f"layer_{i}.feed_forward_norm") @ w[f"layer_{i}.feed_forward.up.kernel"], 2, axis=1
        )
        x = x + (gate / (1 + np.exp(-gate)) * value) @ w[f"layer_{i}.feed_forward.down.kernel"]
    params = unflatten(weights)["encoder"]
    encoded: Any = Encoder(config).apply({"params": params}, *pad_batch([ids], 2, 16, 0))
    np.testing.assert_allclose(np.asarray(encoded.hidden_BKD)[0, :11], norm(x, "final_norm"), atol=2e-5)


def test_rope_sees_distances_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 2, 5, 8)), jnp.float32) for _ in range(2))
    positions = jnp.arange(5)[None]

    def scores(shift: int) -> np.ndarray:
        return np.asarray(
            jnp.einsum("bhsk,bhtk->bhst", rotate(q, positions + shift, 100.0), rotate(k, positions + shift, 100.0))
        )

    np.testing.assert_allclose(scores(0), scores(37), atol=1e-4)
    assert np.abs(scores(0) - np.einsum("bhsk,bhtk->bhst", q, k)).max() > 0.1


@pytest.mark.parametrize("change", [{}, {"local_window": 6, "global_every": 2}], ids=["global", "local"])
def test_focus_works_for_the_native_architecture(small, change: dict[str, int]) -> None:
    """Kept tokens keep their positions, so that logits depend neither on the batch nor on the bucket."""
    config, weights = small
    config = dataclasses.replace(config, **change)
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 100, n, dtype=np.int32) for n in (40, 12, 64)]
    predictor = Predictor(config, 3, weights, Precision.float32, focus=Focus.from_shares([1, 0.6, 0.3]))
    together = predictor.logits(rows, batch_size=4, buckets=(64,))
    alone = np.concatenate([predictor.logits([row], batch_size=1, buckets=(len(row),)) for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    dense = Predictor(config, 3, weights, Precision.float32).logits(rows, batch_size=4, buckets=(64,))
    assert np.abs(together - dense).max() > 1e-3


def test_int8_works_for_the_native_architecture(small) -> None:
    config, weights = small
    int8 = to_int8(weights)
    rows = [np.random.default_rng(3).integers(0, 100, 30, dtype=np.int32)]
    predictor = Predictor(config, 3, int8, Precision.int8)
    exact = Predictor(config, 3, weights, Precision.float32).logits(rows, buckets=(32,))
    np.testing.assert_allclose(predictor.logits(rows, buckets=(32,)), exact, atol=0.15 * np.abs(exact).max())
    assert count_products(predictor.compile(4, 32).as_text())["s8×s8→s32"] == 4 * config.num_layers


def test_an_encoder_of_ours_is_read_back(small, tmp_path: Path) -> None:
    config, weights = small
    save_encoder(tmp_path, config, weights)
    again, read = load_encoder(tmp_path)
    assert again == config
    assert read.keys() == {name for name in weights if name.startswith("encoder.")}
    for name, value in read.items():
        np.testing.assert_array_equal(value, weights[name])
    save_encoder(tmp_path, dataclasses.replace(config, num_layers=4), weights)
    with pytest.raises(InputError, match="has no tensor 'encoder"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("classer-5m", 5), ("classer-22m", 22), ("classer-110m", 110), ("classer-400m", 400), ("classer-1b", 1200)],
)
def test_sizes_have_the_parameters_that_they_are_named_for(size: str, millions: int) -> None:
    model = Encoder(native(size, vocab_size=30_522))
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))
    count = sum(value.size for value in jax.tree.leaves(init["params"]))
    assert count == pytest.approx(millions * 1e6, rel=0.03)


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=f"no size 'classer-2b'; there are {', '.join(NATIVE_SIZES)}"):
        native("classer-2b", vocab_size=100)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_and_products_without_biases_have_the_gradients_of_their_formulas(dtype) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(9, 6)), dtype)
    kernel = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(9, 5)), dtype)
    out, back = jax.vjp(lambda x, kernel: ops.linear(x, kernel, None), x, kernel)
    dx, dkernel = back(g)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    x, g = (np.asarray(a, np.float32) for a in (x, g))
    for got, expected in ((out, x @ kernel), (dx, g @ kernel.T), (dkernel, x.T @ g)):
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=tolerance)


BERT = EncoderConfig(100, 4, 32, 4, 48, max_positions=64, gated=True)
LOCAL = dataclasses.replace(SMALL, num_layers=5, local_window=6, global_every=3)


@pytest.mark.parametrize("config", [SMALL, LOCAL, BERT], ids=["native", "local", "bert"])
@pytest.mark.parametrize("shares", [[1.0], [1, 0.9, 0.88, 0.87, 0.5]], ids=["dense", "focused"])
def test_attention_text_by_text_is_that_of_all_texts_together(
    config: EncoderConfig, shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MAX_TOGETHER", 32)
    units = Focus.from_shares([*shares, *[shares[-1]] * config.num_layers][: config.num_layers])
    together = TextClassifier(config, 3, focus=units)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 100, n, dtype=np.int32) for n in (40, 33, 12, 1)]
    tokens_BS, lengths_B = pad_batch(rows, 5, 40, 0)
    params = jax.tree.map(
        lambda value: value + rng.normal(0, 0.2, value.shape).astype(np.float32),
        jax.jit(together.init)(jax.random.key(0), tokens_BS, lengths_B)["params"],
    )
    by_text = together.clone(by_text=True)
    lowered = jax.jit(by_text.apply).lower({"params": params}, tokens_BS, lengths_B)
    assert "while" in lowered.as_text()
    expected: Any = jax.jit(together.apply)({"params": params}, tokens_BS, lengths_B)
    np.testing.assert_allclose(lowered.compile()({"params": params}, tokens_BS, lengths_B), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "remat", "focused"),
    [(SMALL, True, False), (LOCAL, False, True), (BERT, True, True)],
    ids=["native, remat", "local, focused", "bert, both"],
)
def test_a_scan_computes_what_single_layers_do(config: EncoderConfig, remat: bool, focused: bool) -> None:
    """Compares values and all gradients; stacking and unstacking the weights is lossless."""
    plain, scanned = TextClassifier(config, 3), TextClassifier(config, 3, scan=True, remat=remat)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 100, n, dtype=np.int32) for n in (40, 12, 1)]
    tokens_BS, lengths_B = pad_batch(rows, 4, 40, 0)
    init = jax.jit(plain.init)(jax.random.key(0), tokens_BS, lengths_B)
    weights = {
        name: (v + rng.normal(0, 0.2, v.shape)).astype(np.float32) for name, v in flatten(init["params"]).items()
    }
    stacked = stack_layers(weights)
    for name, value in unstack_layers(stacked).items():
        np.testing.assert_array_equal(value, weights[name])
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), tokens_BS, lengths_B)
    assert {n: v.shape for n, v in stacked.items()} == {
        ".".join(key.key for key in path): v.shape for path, v in jax.tree.leaves_with_path(shapes["params"])
    }
    units_I = jnp.asarray(Focus.from_shares([1, 0.6, 0.5, 0.4, 0.3][: config.num_layers]).units, jnp.int32)
    draw = FocusDraw(jnp.tile(units_I, (4, 1)), jnp.float32(0.5), jnp.ones(4, bool)) if focused else None

    def run(model: TextClassifier, named: dict[str, np.ndarray]):
        def loss(params):
            out: Any = model.apply({"params": params}, tokens_BS, lengths_B, draw)
            return jnp.square(out).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(unflatten(named))
        return np.asarray(out), unstack_layers(flatten(gradients))

    expected, expected_gradients = run(plain, weights)
    out, gradients = run(scanned, stacked)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, value in gradients.items():
        scale = max(1.0, np.abs(expected_gradients[name]).max())
        np.testing.assert_allclose(value, expected_gradients[name], atol=2e-5 * scale, err_msg=name)


def test_a_scanned_program_does_not_grow_with_depth() -> None:
    def size(num_layers: int, scan: bool) -> int:
        model = TextClassifier(dataclasses.replace(SMALL, num_layers=num_layers), 3, scan=scan)
        arguments = jnp.zeros((2, 16), jnp.int32), jnp.ones((2,), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), *arguments)
        return len(jax.jit(model.apply).lower(params, *arguments).as_text())

    assert size(24, scan=True) < 1.02 * size(4, scan=True)
    assert size(24, scan=False) > 3 * size(4, scan=False)


def test_a_scan_cannot_cut() -> None:
    model = TextClassifier(SMALL, 3, scan=True, focus=Focus.from_shares([1, 0.5, 0.5]))
    with pytest.raises(ValueError, match="one shape"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))
