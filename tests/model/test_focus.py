"""Focused Attention: the selection of tokens, agreement of masking and gathering, independence of rows in a batch."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classer.data.buckets import pad_batch
from classer.data.errors import InputError
from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig
from classer.model.encoder import Encoder
from classer.model.focus import (
    MIN_KEPT,
    UNITS,
    Focus,
    FocusDraw,
    is_gate,
    kept_length,
    kept_lengths,
    select,
    token_scores,
)
from classer.model.precision import Precision
from classer.model.predict import Predictor
from classer.model.pretrained import load_encoder
from classer.model.quantize import Weights, flatten, to_int8

LABELS = 3
HALF = Focus.from_shares([1.0, 0.5, 0.3])
FROM_THE_START = Focus.from_shares([0.8, 0.5, 0.5])


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderConfig, Weights]:
    """A classifier of three layers with trained gates."""
    from classer.tests.helpers import write_encoder

    folder = write_encoder(tmp_path_factory.mktemp("gated"), num_hidden_layers=3, max_position_embeddings=128)
    config, pretrained = load_encoder(folder)
    config = dataclasses.replace(config, gated=True)
    model = TextClassifier(config, LABELS)
    init = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))
    weights = flatten(init["params"]) | pretrained
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        if is_gate(name):
            weights[name] = rng.normal(size=value.shape).astype(np.float32)
    weights["head.kernel"] = rng.normal(size=weights["head.kernel"].shape).astype(np.float32)
    return config, weights


@pytest.fixture(scope="module")
def texts(gated) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(4, gated[0].vocab_size, n, dtype=np.int32) for n in (40, 64, 7, 2, 9, 33, 21, 1)]


def logits(gated, focus: Focus | None, rows: list[np.ndarray], batch_size: int, length: int) -> np.ndarray:
    predictor = Predictor(gated[0], LABELS, gated[1], Precision.float32, focus=focus)
    return predictor.logits(rows, batch_size=batch_size, buckets=(length,))


def apply_with_draw(gated, rows: list[np.ndarray], length: int, units_BI, temperature=0.1, hard=True) -> np.ndarray:
    config, weights = gated
    tokens_BS, lengths_B = pad_batch(rows, len(rows), length, 0)
    hard_B = jnp.full(len(tokens_BS), hard)
    draw = FocusDraw(jnp.asarray(units_BI, jnp.int32), jnp.float32(temperature), hard_B)
    out: Any = TextClassifier(config, LABELS).apply({"params": nested(weights)}, tokens_BS, lengths_B, draw)
    return np.asarray(out)


def nested(weights: Weights) -> dict:
    from classer.model.quantize import unflatten

    return unflatten(weights)


@pytest.mark.parametrize("focus", [HALF, FROM_THE_START])
def test_a_text_gets_the_same_logits_in_any_bucket_and_company(gated, texts, focus: Focus) -> None:
    alone = np.concatenate([logits(gated, focus, [row], 1, 16 if len(row) <= 16 else 64) for row in texts])
    for batch_size, length in ((8, 64), (3, 96)):
        np.testing.assert_allclose(logits(gated, focus, texts, batch_size, length), alone, atol=1e-5)
    assert np.abs(alone - logits(gated, None, texts, 8, 64)).max() > 1e-3, "this focus changes nothing"


@pytest.mark.parametrize("focus", [HALF, FROM_THE_START])
def test_masking_computes_what_gathering_does(gated, texts, focus: Focus) -> None:
    """Training (masks, one budget per row) and serving (shorter rows) compute the same logits."""
    masked = apply_with_draw(gated, texts, 64, np.tile(focus.units, (len(texts), 1)))
    np.testing.assert_allclose(masked, logits(gated, focus, texts, 8, 64), atol=1e-5)


def test_each_row_of_a_batch_may_have_a_budget_of_its_own(gated, texts) -> None:
    focuses = [HALF, FROM_THE_START, Focus.pyramid(1, 3)]
    rows = [texts[i] for i in (0, 1, 5)]
    mixed = apply_with_draw(gated, rows, 64, [focus.units for focus in focuses])
    for i, focus in enumerate(focuses):
        np.testing.assert_allclose(mixed[i], logits(gated, focus, rows, 3, 64)[i], atol=1e-5)


def test_full_budget_is_the_dense_program(gated, texts) -> None:
    """The HLO and the logits are identical; those of a smaller budget differ."""
    config, weights = gated

    def lowered(focus: Focus | None) -> str:
        model = TextClassifier(config, LABELS, focus=focus)
        tokens_BS, lengths_B = jnp.zeros((4, 32), jnp.int32), jnp.ones((4,), jnp.int32)
        return jax.jit(model.apply).lower({"params": nested(weights)}, tokens_BS, lengths_B).as_text()

    dense = lowered(None)
    assert lowered(Focus.pyramid(1, 3)) == dense
    assert lowered(HALF) != dense
    np.testing.assert_array_equal(logits(gated, Focus.pyramid(1, 3), texts, 8, 64), logits(gated, None, texts, 8, 64))


def test_layers_that_keep_what_the_one_before_kept_select_nothing(gated) -> None:
    config, weights = gated

    def selections(focus: Focus) -> int:
        model = TextClassifier(config, LABELS, focus=focus)
        tokens_BS, lengths_B = jnp.zeros((4, 32), jnp.int32), jnp.ones((4,), jnp.int32)
        text = jax.jit(model.apply).lower({"params": nested(weights)}, tokens_BS, lengths_B).as_text()
        return text.count("call @top_k") + text.count("chlo.top_k")

    assert [selections(Focus.from_shares(s)) for s in ([1, 1, 1], [1, 0.5, 0.5], [0.9, 0.5, 0.2])] == [0, 1, 3]


def test_a_cut_shortens_the_feed_forward_of_its_own_layer_and_not_its_attention(gated) -> None:
    config, weights = gated

    def products(focus: Focus) -> list[int]:
        """Rows of each layer's products: with the first feed-forward kernels, then with the QKV kernels."""
        model = TextClassifier(config, LABELS, focus=focus)
        tokens_BS, lengths_B = jnp.zeros((4, 32), jnp.int32), jnp.ones((4,), jnp.int32)
        text = jax.jit(model.apply).lower({"params": nested(weights)}, tokens_BS, lengths_B).as_text()
        widths = (config.d_ff, 3 * config.d_model)
        assert config.d_ff != 3 * config.d_model
        return [
            int(rows) for width in widths for rows in re.findall(rf"dot_general .*-> tensor<(\d+)x{width}xf32>", text)
        ]

    assert products(Focus.from_shares([1, 1, 1])) == [128, 128, 128, 128, 128, 128]
    assert products(Focus.from_shares([0.5, 0.5, 0.25])) == [64, 64, 32, 128, 64, 64]


def test_a_token_that_is_dropped_has_told_the_others_what_it_knows(gated) -> None:
    """A layer drops tokens after its attention, so that a dropped token still influences the logits.

    This also holds for tokens that the first layer drops.
    """
    config, weights = gated
    focus = Focus.from_shares([0.3, 0.3, 0.3])
    model = TextClassifier(config, LABELS, focus=focus)
    rng = np.random.default_rng(2)
    tokens_BS = rng.integers(4, config.vocab_size, (1, 40), dtype=np.int32)
    lengths_B = np.array([40], np.int32)

    def explained(tokens_BS: np.ndarray) -> tuple[np.ndarray, set[int]]:
        answer: Any = model.apply({"params": nested(weights)}, tokens_BS, lengths_B, method="explain")
        logits_BL, evidence = answer
        return np.asarray(logits_BL), set(np.asarray(evidence.positions_BK)[np.asarray(evidence.kept_BK)].tolist())

    before_BL, kept = explained(tokens_BS)
    for place in sorted(set(range(40)) - kept):
        changed_BS = tokens_BS.copy()
        changed_BS[0, place] = 4 if tokens_BS[0, place] != 4 else 5
        after_BL, still_kept = explained(changed_BS)
        if still_kept == kept:
            assert np.abs(after_BL - before_BL).max() > 1e-5
            return
    pytest.fail("no change of a dropped token left the choice as it was")


@pytest.mark.parametrize("hard", ["no", "every other", "all"])
def test_soft_rows_teach_every_gate_and_all_rows_the_other_weights(gated, texts, hard: str) -> None:
    config, weights = gated
    tokens_BS, lengths_B = pad_batch(texts, len(texts) + 1, 64, 0)
    units_BI = jnp.tile(jnp.asarray(Focus.from_shares([0.8, 0.5, 0.3]).units, jnp.int32), (len(tokens_BS), 1))

    hard_B = jnp.asarray([{"no": False, "every other": i % 2 == 0, "all": True}[hard] for i in range(len(tokens_BS))])

    def loss(params, temperature):
        draw = FocusDraw(units_BI, temperature, hard_B)
        out: Any = TextClassifier(config, LABELS).apply({"params": params}, tokens_BS, lengths_B, draw)
        return jnp.square(out).sum()

    gradients = flatten(jax.jit(jax.grad(loss))(nested(weights), 1.0))
    assert all(np.isfinite(g).all() for g in gradients.values())
    for name in (f"encoder.layer_{i}.gate.direction" for i in range(3)):
        assert (np.abs(gradients[name]).max() > 1e-6) == (hard != "all"), name
    assert np.abs(gradients["encoder.layer_0.attention.qkv.kernel"]).max() > 1e-6


def test_the_gate_learns_which_token_matters() -> None:
    """In each text a single token determines the label; after training, a tight hard budget keeps this token."""
    import optax

    config = EncoderConfig(vocab_size=50, num_layers=2, d_model=32, num_heads=2, d_ff=64, max_positions=64, gated=True)
    model = TextClassifier(config, 2)
    rng = np.random.default_rng(0)

    def batch(n: int):
        tokens_BS = rng.integers(10, 50, (n, 40), dtype=np.int32)
        labels_B, places_B = rng.integers(0, 2, n), rng.integers(1, 39, n)
        tokens_BS[np.arange(n), places_B] = 4 + labels_B
        return tokens_BS, np.full(n, 40, np.int32), labels_B, places_B

    params = model.init(jax.random.key(0), *batch(1)[:2])["params"]
    optimizer = optax.adam(3e-3)
    units_BI = jnp.asarray(Focus.from_shares([1.0, 0.25]).units, jnp.int32)

    @jax.jit
    def step(params, state, tokens_BS, lengths_B, labels_B, hard_B, temperature):
        def loss(params):
            draw = FocusDraw(jnp.tile(units_BI, (len(tokens_BS), 1)), temperature, hard_B)
            out: Any = model.apply({"params": params}, tokens_BS, lengths_B, draw)
            return optax.softmax_cross_entropy_with_integer_labels(out, labels_B).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for i in range(400):
        tokens_BS, lengths_B, labels_B, _ = batch(32)
        hard_B = jnp.asarray((np.arange(32) % 2 == 0) & (i >= 250))
        params, state, _ = step(params, state, tokens_BS, lengths_B, labels_B, hard_B, max(0.1, 0.99**i))

    tokens_BS, lengths_B, labels_B, places_B = batch(200)
    focused = TextClassifier(config, 2, focus=Focus.from_shares([1.0, 0.25]))
    answer: Any = focused.apply({"params": params}, tokens_BS, lengths_B, method="explain")
    out, evidence = answer
    kept = (np.asarray(evidence.positions_BK) == places_B[:, None]).any(axis=1)
    assert kept.mean() > 0.9, "a random choice keeps it in a quarter of the texts"
    assert (np.asarray(out).argmax(axis=1) == labels_B).mean() > 0.9


def test_evidence_is_in_order_and_holds_the_special_tokens_but_no_padding(gated, texts) -> None:
    config, weights = gated
    tokens_BS, lengths_B = pad_batch(texts, len(texts) + 1, 64, 0)
    model = TextClassifier(config, LABELS, focus=HALF)
    answer: Any = model.apply({"params": nested(weights)}, tokens_BS, lengths_B, method="explain")
    _, evidence = answer
    kept_BK, positions_BK = np.asarray(evidence.kept_BK), np.asarray(evidence.positions_BK)
    for i, length in enumerate(lengths_B):
        positions = positions_BK[i][kept_BK[i]].tolist()
        assert positions == sorted(set(positions))
        assert len(positions) == kept_length(int(length), HALF.units[-1])
        assert all(0 <= p < length for p in positions)
        if length:
            assert positions[0] == 0
            assert positions[-1] == length - 1


def test_int8_focuses_too(gated, texts) -> None:
    config, weights = gated
    int8 = to_int8(weights)
    assert int8["encoder.layer_1.gate.direction"].dtype == np.float32
    predictor = Predictor(config, LABELS, int8, Precision.int8, focus=HALF)
    exact = logits(gated, HALF, texts, 8, 64)
    assert np.corrcoef(predictor.logits(texts, buckets=(64,)).ravel(), exact.ravel())[0, 1] > 0.9
    assert "s32" in predictor.compile(8, 64).as_text()


@settings(deadline=None)
@given(st.integers(0, 600), st.integers(1, UNITS))
def test_python_and_the_device_agree_on_every_length(length: int, units: int) -> None:
    kept = kept_length(length, units)
    assert kept == int(kept_lengths(jnp.asarray([length]), units)[0])
    assert min(length, MIN_KEPT) <= kept <= length
    assert kept * UNITS >= length * units


@settings(deadline=None)
@given(st.data())
def test_the_best_tokens_are_selected_in_order(data) -> None:
    S = data.draw(st.integers(1, 20))
    length = data.draw(st.integers(1, S))
    kept = data.draw(st.integers(min(2, length), length))
    gate = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=S, max_size=S)), np.float32)
    scores = np.asarray(token_scores(jnp.asarray(gate)[None], jnp.asarray([length])))[0]
    indices = np.asarray(select(jnp.asarray(scores)[None], jnp.asarray([kept]), kept))[0]
    assert indices.tolist() == sorted(sorted(range(S), key=lambda i: (-scores[i], i))[:kept])
    assert max(indices) < length


@pytest.mark.parametrize("focus", [0.05, 0.2, 0.35, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("num_layers", [1, 2, 6, 12, 28])
def test_a_pyramid_keeps_what_it_says(focus: float, num_layers: int) -> None:
    pyramid = Focus.pyramid(focus, num_layers)
    assert pyramid.mean_share == pytest.approx(focus, abs=2e-3)
    assert all(after / before > 0.49 or after < 50 for before, after in itertools.pairwise(pyramid.units))


@pytest.mark.parametrize("focus", [0.0, -1.0, 1.01, float("nan")])
def test_a_focus_out_of_range_is_refused(focus: float) -> None:
    with pytest.raises(InputError, match="above 0 and at most 1; it is"):
        Focus.pyramid(focus, 6)


def test_a_budget_that_grows_is_refused() -> None:
    with pytest.raises(InputError, match=r"Layer 1 of a focus keeps 1024 .* before it keeps \(512\)"):
        Focus.from_shares([0.5, 1.0])


def test_a_model_without_gates_is_refused(gated) -> None:
    config = dataclasses.replace(gated[0], gated=False)
    with pytest.raises(InputError, match="not trained for focus"):
        Predictor(config, LABELS, gated[1], Precision.float32, focus=HALF)
    Encoder(config, focus=Focus.pyramid(1, 3))
