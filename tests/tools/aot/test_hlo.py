"""Products, collectives and FLOPs from optimised HLO and jaxprs, each counted once per execution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from classer.data.errors import InputError
from classer.tools.aot.accelerators import Topology
from classer.tools.aot.hlo import Traffic, collectives, count_flops, instructions, products

# In XLA's format; names repeat across computations, loops have a known trip count.
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
    assert collectives(instructions(HLO), num_devices=8, devices_per_host=8) == [
        Traffic("all-gather", 8, 1, count=21, bytes=21 * 512 * 32 * 2),
        Traffic("all-reduce", 8, 1, count=1, bytes=16),
        Traffic("reduce-scatter", 8, 1, count=21, bytes=21 * 64 * 512 * 4),
    ]


# A loop without a trip count, an all-gather in two fusions with one channel, and a reduce-scatter as an all-reduce.
TPU_HLO = """HloModule jit_step

%fused.1 (p: bf16[16,704]) -> bf16[128,704] {
  %p = bf16[16,704]{1,0} parameter(0)
  ROOT %gather.1 = bf16[128,704]{1,0} all-gather(%p), channel_id=3, \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, dimensions={0}
}

%fused.2 (p: bf16[16,704]) -> bf16[128,704] {
  %p = bf16[16,704]{1,0} parameter(0)
  ROOT %gather.2 = bf16[128,704]{1,0} all-gather(%p), channel_id=3, \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, dimensions={0}
}

%all-reduce-scatter.4 (p: f32[128,384]) -> f32[16,384] {
  %p = f32[128,384]{1,0} parameter(0)
  %sum = f32[128,384]{1,0} all-reduce(%p), channel_id=3, replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %part = f32[16,384]{1,0} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={16,384}
}

%body (arg: (s32[], bf16[16,704])) -> (s32[], bf16[16,704]) {
  %arg = (s32[], bf16[16,704]{1,0}) parameter(0)
  %x = bf16[16,704]{1,0} get-tuple-element(%arg), index=1
  %a = bf16[128,704]{1,0} fusion(%x), kind=kCustom, calls=%fused.1
  %b = bf16[128,704]{1,0} fusion(%x), kind=kCustom, calls=%fused.2
  %c = f32[16,384]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.4
  ROOT %tuple = (s32[], bf16[16,704]{1,0}) tuple(%x, %x)
}

%condition (arg.1: (s32[], bf16[16,704])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %arg.1 = (s32[], bf16[16,704]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: bf16[16,704]) -> f32[4] {
  %loop = (s32[], bf16[16,704]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %sum = (f32[4]{0}, f32[6]{0}) all-reduce(%last, %other), channel_id=9, \
replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
}
"""


def test_collectives_as_programs_for_tpus_write_them() -> None:
    assert collectives(instructions(TPU_HLO), num_devices=16, devices_per_host=8) == [
        Traffic("all-gather", 8, 1, count=5, bytes=5 * 128 * 704 * 2),
        Traffic("all-reduce", 2, 2, count=1, bytes=40),
        Traffic("reduce-scatter", 8, 1, count=5, bytes=5 * 128 * 384 * 4),
    ]


@pytest.mark.parametrize(
    ("operation", "size", "group", "hosts"),
    [
        ("%g = (bf16[64]{0}, bf16[512]{0}) all-gather-start(%x), replica_groups={{0,8},{1,9}}", 1024, 2, 2),
        ("%g = ((bf16[8]{0}, f32[2]{0}), (bf16[64]{0}, f32[16]{0})) all-gather-start(%x, %y)", 192, 16, 2),
        ("%g = (f32[4]{0}, f32[6]{0}) all-reduce-start(%x, %y), replica_groups=[2,8]<=[16]", 40, 8, 1),
        ("%g = (f32[64]{0}, f32[8]{0}) reduce-scatter-start(%x), replica_groups=[2,8]<=[16]", 256, 8, 1),
        ("%g = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x)", 16, 16, 2),
        (
            "%g = ((f32[4,3]{1,0}), f32[4,3]{1,0}) all-to-all-start(%x), "
            "replica_groups=mesh['axis_0'=2,'axis_1'=8], device_ids=([8,2]T(1,0)) {'axis_0'}",
            *(48, 2, 1),
        ),
    ],
)
def test_what_a_started_collective_moves(operation: str, size: int, group: int, hosts: int) -> None:
    hlo = f"ENTRY %main (a: f32[4]) -> f32[4] {{\n  {operation}, to_apply=%add\n}}\n"
    (one,) = collectives(instructions(hlo), num_devices=16, devices_per_host=8)
    assert (one.bytes, one.group, one.hosts) == (size, group, hosts)


def test_how_long_moving_takes() -> None:
    hosts = Topology.parse("h100:8x8")
    within = hosts.moving("all-gather", 450_000_000, group=8, hosts=1)
    assert within == pytest.approx(1e-3)
    assert hosts.moving("all-reduce", 450_000_000, group=8, hosts=1) == pytest.approx(2e-3)
    # A group with one device per host uses one port per host; a group with all eight devices uses eight.
    assert hosts.moving("all-gather", 450_000_000, group=8, hosts=8) == pytest.approx(9e-3)
    assert hosts.moving("all-gather", 400_000_000, group=64, hosts=8) == pytest.approx(1e-3)
    assert Topology.parse("v5e:8x8").moving("all-gather", 200_000_000, group=64, hosts=1) == pytest.approx(1e-3)


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
