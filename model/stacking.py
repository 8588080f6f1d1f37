"""One array for all layers, for `Encoder(scan=True)`, and one a layer, as everything else names them.

The first layer is its own in both: with norms before it has one less.
"""

from __future__ import annotations

import re

import numpy as np

from .quantize import Weights

_ONE = re.compile(r"encoder\.(layer|gate)_(\d+)\.(.+)")
_STACKED = re.compile(r"encoder\.layers\.(layer|gate)\.(.+)")


def stack_layers(weights: Weights) -> Weights:
    """`encoder.layer_1.x`, `encoder.layer_2.x`, … → `encoder.layers.layer.x`, a layer a row; gates likewise."""
    stacked: Weights = {}
    rows: dict[str, dict[int, np.ndarray]] = {}
    for name, value in weights.items():
        found = _ONE.fullmatch(name)
        if found and int(found[2]) > 0:
            rows.setdefault(f"encoder.layers.{found[1]}.{found[3]}", {})[int(found[2])] = value
        else:
            stacked[name] = value
    return stacked | {name: np.stack([by_layer[i] for i in sorted(by_layer)]) for name, by_layer in rows.items()}


def unstack_layers(weights: Weights) -> Weights:
    """Undoes `stack_layers`; weights that are not stacked stay as they are."""
    unstacked: Weights = {}
    for name, value in weights.items():
        if found := _STACKED.fullmatch(name):
            unstacked |= {f"encoder.{found[1]}_{i}.{found[2]}": row for i, row in enumerate(value, start=1)}
        else:
            unstacked[name] = value
    return unstacked
