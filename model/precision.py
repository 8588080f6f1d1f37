"""The number formats that weights are stored in and that products are computed in."""

from __future__ import annotations

import enum
from typing import Literal


class Precision(enum.StrEnum):
    """A number format. Members are named as NumPy's dtypes are, and as JSON and the command line spell them.

    Stored weights are float32 or int8 (see `quantize`), activations float32 or bfloat16. A program is named by what it
    multiplies: float32, bfloat16 or int8; exports may also be float16.
    """

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


# The formats of activations.
ComputeDtype = Literal[Precision.float32, Precision.bfloat16]
