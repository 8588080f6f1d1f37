"""Products, collectives and FLOPs of a compiled program, from its optimised HLO text and its jaxpr.

XLA's own cost analysis counts the body of a loop once; here every computation is counted once per execution.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2}
_BYTES |= {"f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|branch_computations)=(?:\{([^}]*)\}|%?([\w.-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"(\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Groups are lists, or rows of an array of all devices: [groups,size]<=[sides]T(axes), or mesh['x'=2,'y'=4] {'y'}, with
# an optional device_ids=([sides]T(axes)) before the braces.
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_ROWS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_MATMUL = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a module.

    Attributes:
      name: the instruction's name.
      computation: the name of its computation.
      types: element type and shape of each result.
      operation: the operation, such as "dot".
      rest: the text after the operation's opening parenthesis.
      operand_types: element types of the operands that the computation defines.
      times: number of executions in one run of the program; the body of a loop of unknown length counts once.
    """

    name: str
    computation: str
    types: tuple[tuple[str, tuple[int, ...]], ...]
    operation: str
    rest: str
    operand_types: tuple[str, ...]
    times: int


def instructions(hlo: str) -> list[Instruction]:
    """All instructions of an optimised module; operands are resolved within their computation."""
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            current = found[2]
            computations[current] = []
            entry = current if found[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append((found[1], found[2], found[3], found[4]))
    times: collections.Counter[str] = collections.Counter()
    _count(entry, 1, computations, times)

    done: list[Instruction] = []
    for name, lines in computations.items():
        kinds = {line[0]: _SHAPE.search(line[1]) for line in lines}
        for result, types, operation, rest in lines:
            operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
            operand_types = tuple(kind[1] for operand in operands if (kind := kinds.get(operand)))
            shapes = tuple((k, tuple(int(n) for n in dims.split(",") if n)) for k, dims in _SHAPE.findall(types))
            done.append(Instruction(result, name, shapes, operation, rest, operand_types, times[name]))
    return done


def _count(name: str, factor: int, computations: dict, times: collections.Counter[str]) -> None:
    times[name] += factor
    for _, _, operation, rest in computations.get(name, ()):
        trips = _trips(rest, computations) if operation == "while" else 1
        for several, one in _CALLED.findall(rest):
            for called in re.findall(r"%?([\w.-]+)", several) if several else [one]:
                if called in computations:
                    _count(called, factor * trips, computations, times)


def _trips(loop: str, computations: dict) -> int:
    """Number of iterations of a loop; 1 if unknown.

    It is in the loop's attributes, or, as on TPUs, the bound with which the condition compares the counter.
    """
    if found := _TRIPS.search(loop):
        return int(found[1])
    condition = computations.get(found[1], ()) if (found := _CONDITION.search(loop)) else ()
    compares = any(operation == "compare" and "direction=LT" in rest for _, _, operation, rest in condition)
    bounds = [
        found[1] for _, _, operation, rest in condition if operation == "constant" and (found := _CONSTANT.match(rest))
    ]
    return int(bounds[0]) if compares and len(bounds) == 1 else 1


def _size(types: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    return int(sum(_BYTES.get(kind, 0) * math.prod(shape) for kind, shape in types))


def products(program: list[Instruction]) -> collections.Counter[str]:
    """Number of matrix products by type, such as {"s8×s8→s32": 132}: `dot`, `convolution` and library calls.

    The result type is part of the key: if a fused product converts int8 operands to floats, the operand types may still
    be s8. Custom calls of Triton and cuDNN, which hold whole fusions, are not analysed.
    """
    counts: collections.Counter[str] = collections.Counter()
    for one in program:
        is_call = one.operation == "custom-call" and _MATMUL.search(one.rest)
        if (one.operation in ("dot", "convolution") or is_call) and len(one.operand_types) >= 2:
            counts[f"{one.operand_types[0]}×{one.operand_types[1]}→{one.types[0][0]}"] += one.times
    return counts


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind, among groups of one size, in one run of a program.

    Attributes:
      kind: the collective, such as "all-gather".
      group: number of devices in a group.
      hosts: number of hosts that a group spans.
      count: number of collectives.
      bytes: total bytes of their arrays.
    """

    kind: str
    group: int
    hosts: int
    count: int = 0
    bytes: int = 0


def collectives(program: list[Instruction], num_devices: int, devices_per_host: int) -> list[Traffic]:
    """The collectives of a device, by kind, size of the groups, and hosts.

    Bytes are those of the whole array that a group gathers, reduces or scatters. This is about the number of bytes that
    each device receives in a gather or sends in a scatter; an all-reduce moves twice as much. TPU programs split a
    collective over several fusions with the same channel, and have a reduce-scatter in a computation that is named
    "all-reduce-scatter".
    """
    found: dict[tuple[str, int, int], Traffic] = {}
    seen = set()
    for one in program:
        kind = one.operation.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        if channel := _CHANNEL.search(one.rest):
            if (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel[1]))
        group = _first_group(one.rest, num_devices)
        results = [(k, shape) for k, shape in one.types if shape or k != "u32"]  # u32[] are handles
        if one.operation.endswith("-start") and kind != "all-reduce":
            results = results[len(results) // 2 :]  # "-start" lists operands, then results; all-reduce only results
        size = _size(results)
        if kind == "reduce-scatter":
            size *= len(group)
        if kind == "all-reduce" and one.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        hosts = len({device // devices_per_host for device in group})
        traffic = found.setdefault((kind, len(group), hosts), Traffic(kind, len(group), hosts))
        traffic.count += one.times
        traffic.bytes += size * one.times
    return [found[key] for key in sorted(found)]


def _first_group(rest: str, num_devices: int) -> list[int]:
    """The devices of a collective's first group; all devices if it has no groups."""
    if (listed := _LISTED.search(rest)) and (first := re.findall(r"\d+", listed[1].split("}")[0])):
        return list(map(int, first))
    if rows := _ROWS.search(rest):
        return _ordered(rows[3], rows[4]).reshape(int(rows[1]), int(rows[2]))[0].tolist()
    if mesh := _AXES.search(rest):
        sides = [(name, int(side)) for name, side in re.findall(r"'([^']*)'=(\d+)", mesh[1])]
        named = re.findall(r"'([^']*)'", mesh[4])
        order = _ordered(mesh[2] or str(math.prod(side for _, side in sides)), mesh[3])
        order = order.reshape([side for _, side in sides])
        return order[tuple(slice(None) if name in named else 0 for name, _ in sides)].reshape(-1).tolist()
    return list(range(num_devices))


def _ordered(sides: str, axes: str | None) -> np.ndarray:
    """All device ids in the layout [sides]T(axes), such as "16,4" and "1,0"."""
    shape = list(map(int, sides.split(",")))
    return np.arange(math.prod(shape)).reshape(shape).transpose(list(map(int, axes.split(","))) if axes else None)


def count_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products of a jaxpr, over all devices: 2 · M · N · K each, times the iterations of scans.

    A `cond` counts as its most expensive branch. Rematerialised products are in the jaxpr twice and are counted twice.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (lhs_contracting, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in lhs_contracting)
            continue
        inner = [count_flops(sub) for sub in _sub_jaxprs(equation.params)]
        if equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        elif equation.primitive.name == "cond":
            total += max(inner, default=0)
        else:
            total += sum(inner)
    return total


def _sub_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)  # a closed jaxpr holds one
            if hasattr(one, "eqns"):
                yield one
