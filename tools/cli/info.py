"""The command `classer info`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .arguments import BundleArgument, parse


@dataclasses.dataclass(frozen=True)
class InfoArguments:
    """
    Attributes:
      bundle: the bundle to describe.
    """

    bundle: BundleArgument


def info(argv: Sequence[str]) -> None:
    """Check a bundle and describe what it holds."""
    from classer.model.bundle import load_bundle

    bundle = load_bundle(parse(InfoArguments, argv, "classer info", info.__doc__).bundle)
    encoder = bundle.encoder
    parameters = sum(value.size for name, value in bundle.weights.items() if not name.endswith("_scale"))
    print(f"{bundle.path}: whole, {bundle.precision}, version {bundle.version}")
    print(
        f"  encoder: {encoder.num_layers} layers, {encoder.d_model} wide, {encoder.num_heads} heads, "
        f"{parameters / 1e6:.1f} M parameters; texts are read up to {bundle.max_length} tokens"
    )
    for task in bundle.taxonomy.tasks:
        calibration = bundle.calibration[task.name]
        print(
            f"  task '{task.name}': {task.kind}, {len(task.labels)} labels, temperature {calibration.temperature:.3f}"
        )
        for i, label in enumerate(task.labels):
            threshold = f"  from {calibration.thresholds[i]:.3f}" if calibration.thresholds else ""
            description = f"  {label.description}" if label.description else ""
            print(f"    {'  ' * int(task.depth_L[i])}{label.name}{threshold}{description}")
