"""The command `classer aot`: compiles training and inference on a CPU for accelerators that are not attached.

It reports memory, FLOPs and traffic. It fails if a program does not fit into memory, if a sharding makes XLA copy whole
arrays, or if int8 products are compiled to other types. It needs the compilers for TPU and CUDA, which have an
environment of their own: `make aot` creates `.venv-aot`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from classer.data.errors import InputError
from classer.model.config import NATIVE_SIZES, native
from classer.model.precision import ComputeDtype, Precision
from classer.tools.aot.accelerators import GIB, UTILISATION, Topology
from classer.tools.aot.hlo import Traffic, collectives, count_flops, instructions, products

if TYPE_CHECKING:
    import jax

    from classer.model.sharding import Layout

REMATERIALISED = "Involuntary full rematerialization"
_H100 = Path(__file__).with_name("h100.txtpb")


@dataclasses.dataclass(frozen=True)
class AotArguments:
    """
    Attributes:
      preset: the native size to compile.
      topology: devices as KIND:GRID: h100:8, h100:8x8 (hosts × GPUs), v5e:8x8, v5p:4x4x4, v6e:16x16.
      programs: the training step, the INT8 inference program, or both.
      batch_size: texts per training step, over all devices.
      length: tokens per text.
      labels: number of labels of the taxonomy.
      vocab_size: vocabulary size of the tokenizer.
      fsdp: number of devices that parameters are sharded over; 0 is all.
      tensor: number of devices that heads, hidden units and labels are sharded over.
      compute_dtype: dtype of activations and products in training.
      serve_batch: texts per batch of the inference program, on one device.
      texts: number of texts that the job trains on, to estimate its time.
      json: a file to write the reports to, as JSON.
    """

    preset: Literal[tuple(NATIVE_SIZES)] = "classer-1b"  # type: ignore[valid-type]
    topology: str = "h100:8x8"
    programs: Literal["both", "train", "serve"] = "both"
    batch_size: int = 1024
    length: int = 256
    labels: int = 15_000
    vocab_size: int = 30_522
    fsdp: int = 0
    tensor: int = 1
    compute_dtype: ComputeDtype = Precision.bfloat16
    serve_batch: int = 64
    texts: int = 500_000_000
    json: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "labels", "vocab_size", "tensor", "serve_batch", "texts"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Report:
    """The analysis of one compiled program. Bytes are those of one device.

    Attributes:
      program: "train" or "serve".
      topology: the topology, in the syntax of `Topology.parse`.
      devices: number of devices of the mesh.
      preset: the native size.
      mesh: mesh axis → size.
      batch_size: texts per batch, over all devices.
      length: tokens per text.
      parameters: number of parameters.
      seconds: compilation time.
      arguments, temporaries, outputs: bytes; outputs that alias arguments are not counted.
      memory: bytes of HBM.
      flops: FLOPs of the matrix products of one run, over all devices, from the jaxpr; includes rematerialisation.
      model_flops: the same without rematerialisation.
      products: matrix products by their types → number of executions in one run.
      collectives: data exchanged between devices; see `aot.hlo.Traffic`.
      faults: the reasons not to run the program; empty if there are none.
    """

    program: str
    topology: str
    devices: int
    preset: str
    mesh: dict[str, int]
    batch_size: int
    length: int
    parameters: int
    seconds: float
    arguments: int
    temporaries: int
    outputs: int
    memory: int
    flops: int
    model_flops: int
    products: dict[str, int]
    collectives: tuple[Traffic, ...]
    faults: tuple[str, ...]

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs

    @property
    def moving(self) -> float:
        """Lower bound of the seconds per step that a device spends on communication."""
        topology = Topology.parse(self.topology)
        return sum(topology.moving(one.kind, one.bytes, one.group, one.hosts) for one in self.collectives)

    @property
    def computing(self) -> float:
        """Seconds of computation per step at `UTILISATION` of the peak."""
        return self.model_flops / (self.devices * Topology.parse(self.topology).accelerator.bf16 * UTILISATION)

    @property
    def step(self) -> float:
        """Seconds per step: the larger of computation and communication, which can overlap."""
        return max(self.moving, self.computing)

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Report:
        """Reads a report from its JSON object, as written by `--json`."""
        collectives = tuple(Traffic(**one) for one in fields["collectives"])
        return cls(**{**fields, "collectives": collectives, "faults": tuple(fields["faults"])})


def aot(argv: Sequence[str]) -> None:
    """Compile for GPUs and TPUs that are not attached: memory, FLOPs, traffic."""
    a = tyro.cli(AotArguments, prog="classer aot", args=list(argv), description=aot.__doc__)
    topology = Topology.parse(a.topology)
    prepare_process(topology)
    reports = []
    for program in ("train", "serve") if a.programs == "both" else (a.programs,):
        print(f"Compiling {a.preset}, {program}, for {topology} …", file=sys.stderr, flush=True)
        reports.append(compile_train(a, topology) if program == "train" else compile_serve(a, topology))
        print(describe_report(reports[-1], a.texts), flush=True)
    if a.json is not None:
        a.json.write_text(json.dumps([dataclasses.asdict(report) for report in reports], indent=1) + "\n")
    faults = [fault for report in reports for fault in report.faults]
    if faults:
        raise InputError(" ".join(faults))


def prepare_process(topology: Topology) -> None:
    """Sets the environment variables of the compilers; to be called before JAX is imported.

    Raises:
      InputError: the compiler for this topology is not installed.
    """
    needed = "jax_cuda12_plugin" if topology.kind == "h100" else "libtpu"
    if importlib.util.find_spec(needed) is None:
        raise InputError(
            f"Compiling for {topology.kind} needs the package {needed.replace('_', '-')}, which stands in an "
            f"environment of its own: `make aot`, then .venv-aot/bin/classer aot."
        )
    for name, value in {
        "JAX_PLATFORMS": "cpu",  # no search for accelerators
        "TPU_SKIP_MDS_QUERY": "1",  # no query of the metadata server
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise libtpu allows one process per machine
        # Warnings must be printed: `REMATERIALISED` is one, and counts as a fault.
        "TF_CPP_MIN_LOG_LEVEL": "1",
        "TPU_MIN_LOG_LEVEL": "1",
        "TPU_STDERR_LOG_LEVEL": "1",
    }.items():
        os.environ[name] = value
    import jax

    jax.config.update("jax_enable_compilation_cache", False)


def devices_of(topology: Topology) -> Sequence[Any]:
    from jax.experimental import topologies

    if topology.kind == "h100":
        grid = (1,) * (3 - len(topology.shape)) + topology.shape
        # Partitions × hosts × GPUs.
        target = _H100.read_text(encoding="utf-8")
        made = topologies.get_topology_desc("", "cuda", target_config=target, topology="x".join(map(str, grid)))
        return made.devices
    try:
        return topologies.get_topology_desc(str(topology), "tpu").devices
    except Exception as e:
        raise InputError(f"libtpu knows no topology {topology}: {str(e).splitlines()[0]}") from None


def compile_train(a: AotArguments, topology: Topology) -> Report:
    """Compiles the training step of `classer train`: sharded, with scanned and rematerialised layers, float32 AdamW."""
    import jax
    import jax.numpy as jnp

    from classer.model.classifier import TextClassifier
    from classer.model.sharding import make_layout

    layout = make_layout(devices_of(topology), fsdp=a.fsdp or topology.num_devices // a.tensor, tensor=a.tensor)
    layout.check_divides(a.batch_size)
    config = native(a.preset, vocab_size=a.vocab_size, max_positions=max(a.length, 512))

    def model(remat: bool) -> TextClassifier:
        return TextClassifier(config, a.labels, jnp.dtype(a.compute_dtype), scan=True, remat=remat)

    step, state, batch = train_program(model(True), a.batch_size, a.length, layout)
    plain_step, _, _ = train_program(model(False), a.batch_size, a.length, layout)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def trace(step: Callable) -> Any:
        with layout.active():
            return jax.jit(step, donate_argnums=0).trace(state, batch)

    traced = trace(step)
    return _report(a, "train", topology, layout, traced, parameters, trace(plain_step), batch_size=a.batch_size)


def train_program(model: Any, batch_size: int, length: int, layout: Layout) -> tuple[Callable, Any, Any]:
    """(step, abstract state, abstract batch): the step of train/step.py, with arrays sharded by `layout`."""
    import jax
    import jax.numpy as jnp

    from classer.data.pipeline import Batch
    from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
    from classer.train.config import Recipe
    from classer.train.step import LossConfig, init_state, learning_rate_schedule, make_optimizer, make_train_step

    recipe = Recipe()
    optimizer = make_optimizer(recipe, learning_rate_schedule(recipe, 100_000))
    labels = tuple(Label(str(i)) for i in range(model.num_labels))
    table = Taxonomy((Task("all", TaskKind.MULTICLASS, labels),)).table
    run = make_train_step(model, table, optimizer, LossConfig(recipe.label_smoothing))

    def init() -> Any:
        tokens_BS, lengths_B = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
        return init_state(model.init(jax.random.key(0), tokens_BS, lengths_B)["params"], optimizer)

    def placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    shapes = jax.eval_shape(init)
    shardings = layout.shardings(shapes)
    state = jax.tree.map(placed, shapes, shardings)
    arrays = {
        "tokens_BS": ((batch_size, length), jnp.int32),
        "lengths_B": ((batch_size,), jnp.int32),
        "targets_BL": ((batch_size, model.num_labels), jnp.float32),
        "weights_B": ((batch_size,), jnp.float32),
        "tasks_B": ((batch_size,), jnp.int32),
    }
    batch = {name: jax.ShapeDtypeStruct(*shape, sharding=layout.batch) for name, shape in arrays.items()}

    def step(state: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        new, metrics = run(state, Batch(**batch))
        return jax.lax.with_sharding_constraint(new, shardings), metrics

    return step, state, batch


def compile_serve(a: AotArguments, topology: Topology) -> Report:
    """Compiles the INT8 program of a server: dense (no focus), on one device of the topology."""
    import jax

    from classer.model.config import EncoderConfig
    from classer.model.sharding import make_layout

    # A server's replicas are independent, so that one device's program is enough.
    layout = make_layout(devices_of(topology)[:1])
    config: EncoderConfig = native(a.preset, vocab_size=a.vocab_size, max_positions=max(a.length, 512))
    forward, arguments = serve_program(config, a.labels, a.serve_batch, a.length)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated), arguments
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
    traced = jax.jit(forward).trace(*arguments)
    expected = 4 * config.num_layers
    report = _report(a, "serve", topology, layout, traced, parameters, traced, batch_size=a.serve_batch)
    int8 = report.products.get("s8×s8→s32", 0)
    if int8 < expected:
        said = f"{int8} of {expected} products of the encoder are int8 with int32 results in {report.products}."
        return dataclasses.replace(report, faults=(*report.faults, f"The INT8 program for {topology} is not: {said}"))
    return report


def serve_program(config: Any, num_labels: int, batch_size: int, length: int) -> tuple[Callable, Any]:
    """(forward, abstract arguments): the function that `Predictor` compiles for an INT8 bundle."""
    import jax
    import jax.numpy as jnp

    from classer.model.classifier import TextClassifier

    model = TextClassifier(config, num_labels, jnp.dtype("bfloat16"), Precision.int8)

    def forward(variables: Any, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
        return model.apply(variables, tokens_BS, lengths_B)  # type: ignore

    tokens_BS = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    lengths_B = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones(1, jnp.int32))
    )
    return forward, (variables, tokens_BS, lengths_B)


def _report(
    a: AotArguments,
    program: str,
    topology: Topology,
    layout: Layout,
    traced: Any,
    parameters: int,
    plain: Any,
    *,
    batch_size: int,
) -> Report:
    started = time.monotonic()
    with captured_stderr() as said:
        compiled = traced.lower().compile()
    said = said()
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    code = instructions(compiled.as_text())
    limit = topology.accelerator.memory
    outputs = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    faults = []
    if peak > limit:
        faults.append(f"{program} on {topology} needs {peak / GIB:.1f} GiB a device, which has {limit / GIB:.1f}.")
    if warnings := said.count(REMATERIALISED):
        faults.append(f"XLA copies {warnings} whole arrays in {program} on {topology} ('{REMATERIALISED}').")
    return Report(
        program=program,
        topology=str(topology),
        devices=layout.mesh.size,
        preset=a.preset,
        mesh=dict(layout.mesh.shape),
        batch_size=batch_size,
        length=a.length,
        parameters=parameters,
        seconds=round(seconds, 1),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=outputs,
        memory=limit,
        flops=count_flops(traced.jaxpr.jaxpr),
        model_flops=count_flops(plain.jaxpr.jaxpr),
        products=dict(products(code).most_common()),
        collectives=tuple(collectives(code, layout.mesh.size, topology.per_host)),
        faults=tuple(faults),
    )


def describe_report(report: Report, texts: int) -> str:
    """A report as text; for training it includes an estimate of the time for `texts` texts."""
    accelerator = Topology.parse(report.topology).accelerator
    peak = accelerator.bf16 if report.program == "train" else accelerator.int8
    mesh = " × ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    lines = [
        f"{report.preset}, {report.program}: {report.devices} × {accelerator.name} ({report.topology}), mesh {mesh}",
        f"  {report.parameters / 1e6:,.1f} M parameters, {report.batch_size:,} texts × {report.length} tokens; "
        f"compiled in {report.seconds:.0f} s",
        f"  memory a device: {report.arguments / GIB:.2f} GiB arguments + {report.temporaries / GIB:.2f} temporaries + "
        f"{report.outputs / GIB:.2f} outputs = {report.peak / GIB:.2f} of {report.memory / GIB:.1f} GiB",
        f"  FLOPs a run: {report.flops:.3e} in all, {report.model_flops:.3e} without rematerialisation; at the peak of "
        f"{peak / 1e12:,.0f} T/s a device {report.flops / report.devices / peak * 1e3:.1f} ms",
        "  products: " + (", ".join(f"{n} {types}" for types, n in report.products.items()) or "none seen"),
    ]
    for one in report.collectives:
        where = f"{one.group} devices" + (f" of {one.hosts} hosts" if one.hosts > 1 else "")
        lines.append(f"  {one.kind} among {where}: {one.count:,}, {one.bytes / 1e9:.2f} GB")
    if not report.collectives:
        lines.append("  no collectives")
    if report.program == "train":
        hours = report.step * texts / report.batch_size / 3600
        lines.append(
            f"  a step computes for {report.computing * 1e3:.0f} ms at {UTILISATION:.0%} of the peak and moves for at "
            f"least {report.moving * 1e3:.0f} ms; {texts:,} texts take {hours:,.1f} h, if both go on at once"
        )
    return "\n".join(lines + [f"  FAULT: {fault}" for fault in report.faults])


@contextlib.contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """Captures file descriptor 2, which C++ libraries write to; the yielded function returns the text afterwards."""
    text = ""
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield lambda: text
        finally:
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            text = held.read().decode(errors="replace")
