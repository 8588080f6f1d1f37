"""Memory and speed of the accelerators in `classer aot` and `tools/dev/plan_scale.py`, with sources."""

from __future__ import annotations

import dataclasses
import math
import re

from classer.data.errors import InputError

GIB = 2**30
# Model FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B).
UTILISATION = 0.40
UTILISATION_SOURCE = (
    "what llm-foundry's benchmarks (mosaicml/llm-foundry, scripts/train/benchmarking/README.md) report for a decoder "
    "of 1.3 billion parameters at bfloat16 with full sharding: 40.9 % on 64 H100 at 2,048 tokens, 43.2 % on 8 at 512; "
    "assumed for TPUs too, and measured by us on neither"
)


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device.

    Attributes:
      name: the vendor's name.
      memory: bytes of HBM.
      bf16, int8: peak dense operations per second.
      link: bytes per second in each direction, within a host on GPUs, between chips on TPUs.
      port: bytes per second in each direction, between hosts.
      source: the source of these figures.
    """

    name: str
    memory: int
    bf16: float
    int8: float
    link: float
    port: float
    source: str


_TPU = "https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, the page of the generation"
ACCELERATORS = {
    "h100": Accelerator(
        "NVIDIA H100 SXM 80 GB",
        84_942_979_072,
        989.4e12,
        1978.9e12,
        450e9,
        50e9,
        "NVIDIA H100 datasheet, dense (half of sparse), NVLink in one direction; DGX H100 datasheet, one 400 Gb/s port "
        "a GPU",
    ),
    "v5e": Accelerator("TPU v5e", 16 * GIB, 197e12, 394e12, 200e9, 200e9, _TPU),
    "v5p": Accelerator("TPU v5p", 95 * GIB, 459e12, 918e12, 600e9, 600e9, _TPU),
    "v6e": Accelerator("TPU v6e", 32 * GIB, 918e12, 1836e12, 448e9, 448e9, _TPU),
}
# Dense bfloat16 operations per second by GPU model, longer names first; NVIDIA's datasheets, half of sparse.
_BF16 = {
    "B200": 2250e12,
    "GH200": ACCELERATORS["h100"].bf16,
    "H200": ACCELERATORS["h100"].bf16,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": ACCELERATORS["h100"].bf16,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
}


def bf16_peak(device_kind: str) -> float | None:
    """Peak dense bfloat16 operations per second of a GPU; None if unknown.

    Args:
      device_kind: JAX's `device_kind`, such as "NVIDIA A100-SXM4-80GB".
    """
    return next((peak for name, peak in _BF16.items() if re.search(rf"\b{name}\b", device_kind)), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A grid of devices of one kind: "h100:8x8" is eight hosts with eight GPUs each, "v5p:4x4x4" is a cube."""

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Parses "KIND:AxBxC".

        Raises:
          InputError: unknown kind, or a grid that the kind does not have.
        """
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})", text)
        if not found or found[1] not in ACCELERATORS:
            kinds = ", ".join(ACCELERATORS)
            raise InputError(f"'{text}' is no topology; write KIND:GRID, such as h100:8x8 or v5p:4x4x4 ({kinds}).")
        shape: tuple[int, ...] = tuple(map(int, found[2].split("x")))
        if found[1] == "h100" and (len(shape) > 2 or int(found[2].split("x")[-1]) > 8):
            raise InputError(f"'{text}': H100s are GPUS, or HOSTSxGPUS with at most 8 a host, such as h100:8x8.")
        if found[1] != "h100" and len(shape) != (3 if found[1] == "v5p" else 2):
            raise InputError(f"'{text}': {found[1]} is a grid of {'three' if found[1] == 'v5p' else 'two'} sides.")
        return cls(found[1], shape)

    @property
    def accelerator(self) -> Accelerator:
        return ACCELERATORS[self.kind]

    @property
    def per_host(self) -> int:
        """Number of devices that fast links connect; for TPUs all devices."""
        return self.shape[-1] if self.kind == "h100" else self.num_devices

    def moving(self, kind: str, size: int, group: int, hosts: int) -> float:
        """Lower bound of a collective's time in seconds.

        Between hosts, the devices of a group on the same host transfer an array together, each through its own port, as
        in NCCL's rings. Within a host, and between TPUs, all data goes through each device's own links.

        Args:
          kind: the collective, such as "all-gather"; "all-reduce" moves twice the size of its arrays.
          size: bytes of the arrays.
          group: number of devices in a group.
          hosts: number of hosts that a group spans.
        """
        one = self.accelerator
        speed = one.link if hosts == 1 else min(one.link, group / hosts * one.port)
        return (2 if kind == "all-reduce" else 1) * size / speed

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"
