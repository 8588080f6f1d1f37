"""The command `classer quantize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from .arguments import BundleArgument, check_can_make, parse


@dataclasses.dataclass(frozen=True)
class QuantizeArguments:
    """
    Attributes:
      bundle: a float32 bundle.
      out: a new folder for the INT8 one.
    """

    bundle: BundleArgument
    out: Path


def quantize(argv: Sequence[str]) -> None:
    """Turn a float32 bundle into an INT8 one."""
    from classer.model.bundle import load_bundle, quantize_bundle, save_bundle

    a = parse(QuantizeArguments, argv, "classer quantize", quantize.__doc__)
    check_can_make(a.out, new=True)
    before = load_bundle(a.bundle)
    after = save_bundle(quantize_bundle(before), a.out)
    old, new = (sum(weights.nbytes for weights in bundle.weights.values()) for bundle in (before, after))
    print(f"{a.out}: INT8, version {after.version}, weights {new / 1e6:.1f} MB ({new / old:.3f} of float32).")
