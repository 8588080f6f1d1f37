"""Conversion between one array for each layer and one array for all layers, as `Encoder(scan=True)` takes them.

The first layer is separate in both forms: in a pre-norm encoder it has one norm less.
"""

from __future__ import annotations

import re

import numpy as np

from .quantize import Weights

_ONE = re.compile(r"encoder\.layer_(\d+)\.(.+)")
_STACKED = re.compile(r"encoder\.layers\.layer\.(.+)")


def stack_layers(weights: Weights) -> Weights:
    """Stacks `encoder.layer_1.x`, `encoder.layer_2.x`, … as the rows of `encoder.layers.layer.x`."""
    stacked: Weights = {}
    rows: dict[str, dict[int, np.ndarray]] = {}
    for name, value in weights.items():
        found = _ONE.fullmatch(name)
        if found and int(found[1]) > 0:
            rows.setdefault(f"encoder.layers.layer.{found[2]}", {})[int(found[1])] = value
        else:
            stacked[name] = value
    return stacked | {name: np.stack([by_layer[i] for i in sorted(by_layer)]) for name, by_layer in rows.items()}


def unstack_layers(weights: Weights) -> Weights:
    """The inverse of `stack_layers`; weights that are not stacked stay as they are."""
    unstacked: Weights = {}
    for name, value in weights.items():
        if found := _STACKED.fullmatch(name):
            unstacked |= {f"encoder.layer_{i}.{found[1]}": row for i, row in enumerate(value, start=1)}
        else:
            unstacked[name] = value
    return unstacked
