"""Sharding: the table of axes and its errors, and agreement of sharded and unsharded steps on 8 virtual devices."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from classer.data.errors import InputError
from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig, native
from classer.model.quantize import flatten
from classer.model.sharding import Layout, Rules, logical_axes, make_layout
from classer.tests.helpers import with_devices

WORKER = Path(__file__).with_name("sharding_worker.py")
TIMEOUT = 240
BERT = EncoderConfig(30, num_layers=2, d_model=16, num_heads=4, d_ff=32, max_positions=16, gated=True)
MESHES = ([1, 1], [8, 1], [2, 2])  # fsdp, tensor: 8×1×1, 1×8×1, 2×2×2


def shapes_of(config: EncoderConfig, *, scan: bool = False) -> dict[str, tuple[int, ...]]:
    model = TextClassifier(config, 5, scan=scan)
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))
    leaves = jax.tree_util.tree_leaves_with_path(init["params"])
    return {".".join(key.key for key in path): leaf.shape for path, leaf in leaves}


# The table


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("config", [BERT, native("classer-1b", vocab_size=30_522)], ids=["bert", "native"])
def test_every_parameter_has_an_axis_for_each_of_its_dimensions(config: EncoderConfig, scan: bool) -> None:
    for name, shape in shapes_of(config, scan=scan).items():
        assert len(logical_axes(name)) == len(shape), name
        assert (logical_axes(name)[0] == "layers") == (".layers." in name)


def test_what_is_large_is_divided_over_fsdp_and_tensor() -> None:
    """On a mesh with fsdp, all but 0.1 % of classer-1b's parameters are sharded."""
    shapes, rules = shapes_of(native("classer-1b", vocab_size=30_522), scan=True), Rules()
    divided = {name: "fsdp" in str(rules.spec(logical_axes(name), what=name)) for name in shapes}
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    assert sum(sizes.values()) > 1.1e9
    assert sum(size for name, size in sizes.items() if not divided[name]) < 1e-3 * sum(sizes.values())
    up = "encoder.layers.layer.feed_forward.up.kernel"
    assert rules.spec(logical_axes(up), what=up) == PartitionSpec(None, "fsdp", "tensor")


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'encoder\.layer_0\.router\.kernel' has no logical axes"):
        logical_axes("encoder.layer_0.router.kernel")


def test_two_axes_on_one_mesh_axis_are_an_error_that_names_the_parameter() -> None:
    rules = Rules(embed=("fsdp",), hidden=("tensor", "fsdp"))
    with pytest.raises(ValueError, match=r"the parameter 'x\.up\.kernel': .*'fsdp' would divide it twice"):
        Layout(make_layout().mesh, rules).sharding("x.up.kernel", (16, 32))


def test_rules_that_no_mesh_can_hold_are_errors() -> None:
    with pytest.raises(ValueError, match=r"the rule for 'heads': the mesh has no axis 'model'"):
        Rules(heads=("model",))
    with pytest.raises(ValueError, match=r"the rule for 'batch': .*'data' would divide it twice"):
        Rules(batch=("data", "data"))


def test_devices_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(InputError, match=r"1 devices cannot be laid out with fsdp=2 and tensor=1"):
        make_layout(jax.devices()[:1], fsdp=2)


def test_the_moments_of_an_optimizer_lie_as_their_parameters_do() -> None:
    kernel = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    params = {"encoder": {"layer_0": {"feed_forward": {"up": {"kernel": kernel}}}}}
    state = (params, (params, jax.ShapeDtypeStruct((), jnp.int32)))
    shardings = make_layout(jax.devices()[:1]).shardings(state)
    found = [sharding.spec for sharding in jax.tree.leaves(shardings)]
    assert found == [PartitionSpec(("fsdp",), ("tensor",))] * 2 + [PartitionSpec()]


def test_parameters_come_back_from_the_devices_as_they_went() -> None:
    layout = make_layout(jax.devices()[:1])
    values = {"up": {"kernel": np.arange(32, dtype=np.float32).reshape(4, 8)}}
    np.testing.assert_array_equal(flatten(layout.put(values))["up.kernel"], values["up"]["kernel"])


# Sharded and unsharded steps


@dataclasses.dataclass(frozen=True)
class Case:
    """A case of `sharding_worker.py`: a model, and the meshes to train it on."""

    kind: str
    scan: bool
    meshes: tuple[Any, ...]


def run_workers(cases: list[Case], *, processes: int = 1, devices: int = 8, folder: Path) -> list[dict[str, Any]]:
    """Runs the cases in one job of `processes` processes with `devices` devices in all; returns rank 0's results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    environment = with_devices(devices // processes)
    environment["TF_CPP_MIN_LOG_LEVEL"] = "1"  # print warnings, which the tests search for
    logs = [folder / f"worker-{rank}.log" for rank in range(processes)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(WORKER), str(folder), str(port), str(processes), str(rank)]
            with log.open("w") as file:
                workers.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
        for worker, log in zip(workers, logs, strict=True):
            assert worker.wait(TIMEOUT) == 0, log.read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
    assert not any("Involuntary full rematerialization" in log.read_text() for log in logs)
    return json.loads((folder / "found.json").read_text())


def check(found: list[dict[str, Any]], count: int) -> None:
    assert len(found) == count
    for case in found:
        assert case["loss"] > 0.1, case
        assert case["loss_error"] <= 1e-5, case
        assert case["gradient_error"] <= 1e-5 < case["largest_gradient"], case
        assert case["smallest_gradient"] > 1e-4, f"gradients that are all 0 would show nothing: {case}"
        if "collectives" in case and case["mesh"] == [8, 1, 1]:
            assert set(case["collectives"]) == {"all-reduce"}, "plain data parallelism gathers nothing"
        if case["mesh"][1] > 1:
            assert case["largest_share"] <= 0.5, "no device may hold a large parameter whole"
        _, fsdp, tensor = case["mesh"]
        assert case["table_share"] == 1 / (fsdp * tensor)
        assert -(-case["labels"] // tensor) in case["table_labels"], "a device has its share of the labels"
        if tensor > 1:
            whole = set(range(case["labels"], case["labels"] + tensor))  # padded or not
            assert not whole & set(case["table_labels"]), "no device ever has the whole label table"


def test_sharded_steps_are_the_unsharded_one(tmp_path: Path) -> None:
    """Compares the loss and all gradients, float32, tasks of all kinds, on meshes 8×1×1, 1×8×1, 2×2×2 and 1×2×4."""
    check(run_workers([Case("native", False, (*MESHES, [2, 4]))], folder=tmp_path), 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "native scan", "bert scan", "modernbert", "focus"])
def test_sharded_steps_are_the_unsharded_one_for_every_kind_of_model(tmp_path: Path, kind: str) -> None:
    check(run_workers([Case(kind.split()[0], "scan" in kind, MESHES)], folder=tmp_path), 3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_steps_over_several_processes_are_the_unsharded_one(tmp_path: Path, processes: int) -> None:
    """8 devices in all; each process addresses only its own devices and feeds only its own rows."""
    check(run_workers([Case("native", True, MESHES)], processes=processes, folder=tmp_path), len(MESHES))
