"""What is read from optimised HLO and from jaxprs: products, collectives and FLOPs, as often as they run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from classer.data.errors import InputError
from classer.tools.accelerators import Topology
from classer.tools.hlo import Traffic, collectives, count_flops, instructions, products

# Written as XLA writes it; names repeat across computations, loops say their trips.
HLO = """HloModule jit_step

%fused (p.0: s8[8,16], p.1: s8[16,4]) -> s32[8,4] {
  %p.0 = s8[8,16]{1,0} parameter(0)
  %p.1 = s8[16,4]{1,0} parameter(1)
  ROOT %dot.1 = s32[8,4]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %arg = (s32[], bf16[64,32]{1,0}) parameter(0)
  %x = bf16[64,32]{1,0} get-tuple-element(%arg), index=1
  %gather = (bf16[64,32]{1,0}, bf16[512,32]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %p.0 = bf16[512,32]{1,0} all-gather-done(%gather)
  %conv = f32[64,512]{1,0} convolution(%x, %p.0), dim_labels=bf_oi->bf
  %scatter = f32[8,512]{1,0} reduce-scatter(%conv), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %tuple = (s32[], bf16[64,32]{1,0}) tuple(%x, %x)
}

%condition (arg.1: (s32[], bf16[64,32])) -> pred[] {
  %arg.1 = (s32[], bf16[64,32]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: s8[8,16], b: s8[16,4]) -> f32[4] {
  %a = s8[8,16]{1,0} parameter(0)
  %b = s8[16,4]{1,0} parameter(1)
  %call = s32[8,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused
  %loop = (s32[], bf16[64,32]{1,0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"21"}}
  ROOT %sum = f32[4]{0} all-reduce(%last), replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_products_count_as_often_as_they_run() -> None:
    assert products(instructions(HLO)) == {"s8×s8→s32": 1, "bf16×bf16→f32": 21}


def test_collectives_count_the_whole_array_as_often_as_they_run() -> None:
    assert collectives(instructions(HLO)) == {
        "all-gather": Traffic(21, 21 * 512 * 32 * 2),
        "reduce-scatter": Traffic(21, 21 * 64 * 512 * 4),
        "all-reduce": Traffic(1, 16),
    }


def test_a_compiled_scan_is_read_with_its_trips() -> None:
    def layers(x, kernels):
        return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    program = jax.jit(layers).lower(jnp.ones((64, 128)), jnp.ones((7, 128, 128))).compile()
    assert products(instructions(program.as_text() or "")) == {"f32×f32→f32": 7}


@pytest.mark.parametrize("wide", [jnp.float32, jnp.int32])
def test_products_of_widened_operands_are_not_int8(wide) -> None:
    def product(lhs, rhs):
        return lax.dot(lhs.astype(wide), rhs.astype(wide), preferred_element_type=wide)

    int8 = jax.ShapeDtypeStruct((32, 32), jnp.int8)
    found = products(instructions(jax.jit(product).lower(int8, int8).compile().as_text() or ""))
    assert found.total() == 1
    assert "s8×s8→s32" not in found


def test_flops_count_scans_gradients_and_what_is_computed_again() -> None:
    x, kernels = jnp.ones((64, 128)), jnp.ones((7, 128, 128))
    one = 2 * 64 * 128 * 128

    def loss(x, kernels, remat):
        layer = lambda x, kernel: (jnp.tanh(x @ kernel), None)  # noqa: E731
        return lax.scan(jax.checkpoint(layer) if remat else layer, x, kernels)[0].sum()

    def flops(function, *arguments):
        return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    assert flops(lambda x, k: loss(x, k, False), x, kernels) == 7 * one
    both = lambda remat: jax.grad(lambda x, k: loss(x, k, remat), argnums=(0, 1))  # noqa: E731
    assert flops(both(False), x, kernels) == 3 * 7 * one
    assert flops(both(True), x, kernels) == 4 * 7 * one
    assert flops(jax.jit(lambda x, k: x @ k[0]), x, kernels) == one
    assert flops(lambda x, k: lax.cond(x[0, 0] > 0, lambda: x @ k[0], lambda: x), x, kernels) == one


def test_topologies() -> None:
    assert Topology.parse("h100:8x8").num_devices == Topology.parse("v5p:4x4x4").num_devices == 64
    for text in ("h100", "h100:0y", "b200:8", "h100:8x9", "v5e:64", "v5p:8x8", "h100:2x2x2"):
        with pytest.raises(InputError, match=text):
            Topology.parse(text)
