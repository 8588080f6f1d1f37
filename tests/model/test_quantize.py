"""INT8: quantised weights, product types of the compiled program, and changes of the answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from classer.data.errors import InputError
from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.data.tokenizer import WordPieceTokenizer
from classer.model.bundle import Bundle, quantize_bundle, save_bundle
from classer.model.decode import Calibration
from classer.model.layers import Dense
from classer.model.precision import Precision
from classer.model.pretrained import load_encoder
from classer.model.quantize import Weights, count_products, to_int8

TEXTS = ("my card has not arrived", "", "rain , storm and snow", "where is the money ?")
UP, TABLE = "encoder.layer_0.feed_forward.up.kernel", "encoder.embeddings.token.table"
FOUR_PRODUCTS_A_LAYER = 4  # qkv, out, up, down


@pytest.fixture(scope="module")
def float_bundle(tiny_bundle: Bundle) -> Bundle:
    """The tiny bundle with a zero column in a kernel and a zero row in a table, which have no scale."""
    weights = {name: value.copy() for name, value in tiny_bundle.weights.items()}
    weights[UP][:, 3] = 0
    weights[TABLE][2] = 0
    return dataclasses.replace(tiny_bundle, weights=weights)


@pytest.fixture(scope="module")
def int8_bundle(float_bundle: Bundle) -> Bundle:
    return quantize_bundle(float_bundle)


def assert_within_half_a_step(floats: Weights, ints: Weights) -> None:
    """Asserts that int8 × scale is within half a scale of each float, and that each scale fits its largest value."""
    for name, value in floats.items():
        if not (name.startswith("encoder.") and name.endswith((".kernel", ".table"))):
            np.testing.assert_array_equal(ints[name], value, err_msg=name)
            continue
        assert ints[name].dtype == np.int8, name
        scale = ints[f"{name}_scale"]
        axis = 0 if name.endswith(".kernel") else 1  # the axis that shares one scale
        scale = np.expand_dims(scale, axis)
        error = np.abs(ints[name] * scale - value)
        assert (error <= 0.5 * scale * (1 + 1e-3)).all(), name
        uses_the_range = np.abs(ints[name]).max(axis=axis) >= 126
        assert (uses_the_range | ~value.any(axis=axis)).all(), name


def test_int8_weights_give_the_floats_back_within_half_a_step(float_bundle: Bundle, int8_bundle: Bundle) -> None:
    assert_within_half_a_step(float_bundle.weights, int8_bundle.weights)
    kernels = [name for name, value in int8_bundle.weights.items() if value.dtype == np.int8]
    assert len(kernels) == FOUR_PRODUCTS_A_LAYER * float_bundle.encoder.num_layers + 3


def test_a_column_and_a_row_of_zeros_stay_zeros(int8_bundle: Bundle) -> None:
    assert not int8_bundle.weights[UP][:, 3].any()
    assert not int8_bundle.weights[TABLE][2].any()
    assert np.isfinite(logits(int8_bundle)).all()


def logits(bundle: Bundle) -> np.ndarray:
    return bundle.predictor().logits(bundle.tokenizer.encode(TEXTS, 16).ids, batch_size=4)


def test_int8_logits_are_near_float_ones_but_not_equal(float_bundle: Bundle, int8_bundle: Bundle) -> None:
    float_NL, int8_NL = logits(float_bundle), logits(int8_bundle)
    difference = np.abs(float_NL - int8_NL).max()
    assert 0 < difference < 0.05 * np.abs(float_NL).max()


def test_an_int8_row_does_not_depend_on_its_batch(int8_bundle: Bundle) -> None:
    """Activations have one scale per token: in one program, a row's logits are bitwise equal in any batch."""
    program = int8_bundle.predictor().compile(3, 16)
    rng = np.random.default_rng(0)
    tokens_BS = rng.integers(0, int8_bundle.encoder.vocab_size, (3, 16), dtype=np.int32)
    first_BL = program(tokens_BS, np.array([16, 5, 0], np.int32))
    tokens_BS[1:] = rng.integers(0, int8_bundle.encoder.vocab_size, (2, 16), dtype=np.int32)
    other_BL = program(tokens_BS, np.array([16, 16, 9], np.int32))
    np.testing.assert_array_equal(other_BL[0], first_BL[0])
    assert (other_BL[1] != first_BL[1]).any()


def test_int8_rows_hardly_depend_on_the_bucket(int8_bundle: Bundle) -> None:
    """Another program may sum in another order, and thus round an activation to another step."""
    ids = int8_bundle.tokenizer.encode(TEXTS, 16).ids
    longer_NL = int8_bundle.predictor().logits(ids, batch_size=4, buckets=(48,))
    np.testing.assert_allclose(longer_NL, logits(int8_bundle), atol=0.02 * np.abs(longer_NL).max())


def test_an_int8_bundle_is_not_quantised_again(int8_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="is INT8 already; quantise a float32 bundle"):
        quantize_bundle(int8_bundle)


def test_the_int8_program_multiplies_int8_and_the_float_program_does_not(
    float_bundle: Bundle, int8_bundle: Bundle
) -> None:
    int8 = count_products(int8_bundle.predictor().compile(4, 16).as_text())
    floats = count_products(float_bundle.predictor().compile(4, 16).as_text())
    layers = float_bundle.encoder.num_layers
    assert int8["s8×s8→s32"] == FOUR_PRODUCTS_A_LAYER * layers
    # Products that stay in float: two of attention in each layer, and the head.
    assert int8["f32×f32→f32"] == 2 * layers + 1
    assert int8.total() == floats.total() == 6 * layers + 1
    assert floats["s8×s8→s32"] == 0


@pytest.mark.parametrize("wide", [jnp.float32, jnp.int32])
def test_a_program_that_widens_int8_before_the_product_is_not_counted_as_int8(wide) -> None:
    def product(lhs, rhs):
        return jax.lax.dot(lhs.astype(wide), rhs.astype(wide), preferred_element_type=wide)

    int8 = jax.ShapeDtypeStruct((32, 32), jnp.int8)
    counts = count_products(jax.jit(product).lower(int8, int8).compile().as_text() or "")
    assert counts.total() == 1
    assert counts["s8×s8→s32"] == 0


def test_products_in_calls_of_matrix_libraries_are_counted() -> None:
    hlo = """
  %p.0 = s8[32,64]{1,0} parameter(0)
  %p.1 = s8[64,32]{0,1} parameter(1)
  %p.2 = bf16[64,32]{0,1} parameter(2)
  %gemm.1 = (s32[32,32]{1,0}, s8[4096]{0}) custom-call(%p.0, %p.1), custom_call_target="__cublas$gemm"
  ROOT %gemm.2 = f32[32,32]{1,0} custom-call(bf16[64,32]{0,1} %p.2, bf16[64,32]{0,1} %p.2), \
custom_call_target="__cublas$lt$matmul"
  %sort = s32[32]{0} custom-call(%p.0, %p.1), custom_call_target="sort"
"""
    assert count_products(hlo) == {"s8×s8→s32": 1, "bf16×bf16→f32": 1}


def test_minilm_in_int8_is_at_most_three_tenths_of_its_float_size(minilm: Path, tmp_path: Path) -> None:
    config, weights = load_encoder(minilm)
    task = Task("intent", TaskKind.MULTICLASS, tuple(Label(f"label {i}") for i in range(77)))
    rng = np.random.default_rng(0)
    head = {"head.kernel": rng.normal(size=(config.d_model, 77)), "head.bias": np.zeros(77)}
    bundle = Bundle(
        encoder=config,
        taxonomy=Taxonomy((task,)),
        tokenizer=WordPieceTokenizer.from_folder(minilm),
        weights=weights | {name: value.astype(np.float32) for name, value in head.items()},
        precision=Precision.float32,
        calibration={"intent": Calibration()},
        max_length=64,
        golden_texts=("My card has not arrived.",),
        card="",
    )
    int8 = quantize_bundle(bundle)
    assert_within_half_a_step(bundle.weights, int8.weights)
    sizes = []
    for precision, saved in (("float32", bundle), ("int8", int8)):
        path = tmp_path / precision
        save_bundle(saved, path)
        sizes.append(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
    assert sizes[1] <= 0.30 * sizes[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_the_served_product_is_that_of_aqt(dtype, tolerance: float) -> None:
    """The reference is AQT in float32.

    In bfloat16, AQT rounds activations before quantisation and int32 sums before scaling, which makes it less accurate
    than the served product.
    """
    from aqt.jax.v2 import config as aqt_config
    from aqt.jax.v2.flax import aqt_flax
    from aqt.jax.v2.utils import QuantMode

    rng = np.random.default_rng(0)
    x = rng.normal(size=(37, 64)) * rng.lognormal(size=(37, 1))
    x[3] = 0
    x_ND = jnp.asarray(x, dtype)
    kernel_DF = jnp.asarray(rng.normal(size=(64, 96)), jnp.float32)
    rngs = {"params": jax.random.key(0)}

    class Aqt(nn.Module):
        mode: QuantMode

        @nn.compact
        def __call__(self, x_ND, kernel_DF):
            product = aqt_flax.AqtDotGeneral(
                aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None),
                lhs_quant_mode=QuantMode.TRAIN,
                rhs_quant_mode=self.mode,
                rhs_freeze_mode=aqt_flax.FreezerMode.CALIBRATION_AND_VALUE,
                quant_collection="aqt",
                name="aqt",
            )
            return product(x_ND, kernel_DF, (((1,), (0,)), ((), ())), precision=None)

    x32_ND, unread_DF = x_ND.astype(jnp.float32), jnp.zeros((64, 96), jnp.float32)
    _, frozen = Aqt(QuantMode.CONVERT).apply({}, x32_ND, kernel_DF, mutable=["aqt"], rngs=rngs)
    aqt = Aqt(QuantMode.SERVE)
    expected = np.asarray(aqt.apply(frozen, x32_ND, unread_DF, rngs=rngs))
    same_dtype = np.asarray(aqt.apply(frozen, x_ND, unread_DF.astype(dtype), rngs=rngs), np.float32)
    int8 = to_int8({"encoder.up.kernel": np.asarray(kernel_DF)})
    params = {name: int8[f"encoder.up.{name}"] for name in ("kernel", "kernel_scale")}
    dense = Dense(96, Precision.int8, biased=False, name="up")
    served = np.asarray(dense.apply({"params": params}, x_ND), np.float32)
    np.testing.assert_allclose(served, expected, rtol=tolerance, atol=1e-6 * np.abs(expected).max())
    exact = np.asarray(x_ND, np.float64) @ np.asarray(kernel_DF, np.float64)
    assert np.square(served - exact).mean() <= 1.001 * np.square(same_dtype - exact).mean()
    assert np.all(served[3] == 0)
