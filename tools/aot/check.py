"""The CI check of ahead-of-time compilation: a small preset for H100 and TPU, and negative controls."""

from __future__ import annotations

import sys

from classer.tools.aot.accelerators import Topology
from classer.tools.aot.aot import (
    REMATERIALISED,
    AotArguments,
    captured_stderr,
    compile_serve,
    compile_train,
    describe_report,
    devices_of,
    prepare_process,
)


def main() -> int:
    faults = []
    for name in ("h100:8", "v5e:2x4"):
        topology = Topology.parse(name)
        prepare_process(topology)
        a = AotArguments(preset="classer-5m", topology=name, batch_size=64, length=64, labels=1000)
        for compile_program in (compile_train, compile_serve):
            report = compile_program(a, topology)
            print(describe_report(report, a.texts), flush=True)
            faults += report.faults
            if compile_program is compile_train and not report.collectives:
                faults.append(f"No collectives are seen in the sharded step for {name}.")
        if "s8×s8→s32" in widened_products(topology):
            faults.append(f"A product of widened operands counts as int8 on {name}.")
        if REMATERIALISED not in said_of_a_bad_sharding(topology):
            faults.append(f"Where XLA copies a whole array on {name}, nothing is heard of it.")
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


def widened_products(topology: Topology) -> dict[str, int]:
    """A negative control: the products of a program whose int8 operands are converted to bfloat16 first.

    Raises:
      RuntimeError: no product was found.
    """
    import jax
    import jax.numpy as jnp

    from classer.model.sharding import make_layout
    from classer.tools.aot.hlo import instructions, products

    layout = make_layout(devices_of(topology)[:1])
    int8 = jax.ShapeDtypeStruct((512, 512), jnp.int8, sharding=layout.replicated)

    def product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        wide = jax.lax.dot(lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        return wide * 0.1

    found = products(instructions(jax.jit(product).lower(int8, int8).compile().as_text() or ""))
    if not found:
        raise RuntimeError(f"The negative control shows no product for {topology}; the check sees nothing.")
    return dict(found)


def said_of_a_bad_sharding(topology: Topology) -> str:
    """A negative control: the compiler's output for a change of sharding that XLA can only make by a whole copy."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from classer.model.sharding import make_layout

    layout = make_layout(devices_of(topology), fsdp=topology.num_devices // 2, tensor=2)
    columns, rows = (NamedSharding(layout.mesh, spec) for spec in (P(None, "fsdp"), P("tensor", None)))

    def resharded(x: jax.Array) -> jax.Array:
        uneven = jax.lax.with_sharding_constraint(jnp.sin(x)[:6, :10], columns)
        return jax.lax.with_sharding_constraint(uneven, rows) * 2

    with captured_stderr() as said:
        jax.jit(resharded).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=layout.replicated)).compile()
    return said()


if __name__ == "__main__":
    sys.exit(main())
