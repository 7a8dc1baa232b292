"""The float dtypes of checkpoints, each named once: in safetensors, in configurations and torch, and by its bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FloatName = Literal["BF16", "F16", "F32"]
"""A float dtype by its safetensors name."""


@dataclass(frozen=True)
class FloatDtype:
    """A float dtype: its name in configurations and torch, its exponent's bits, and its normal, finite range.

    A bit pattern with all bits of the `exponent` set is infinite or NaN; `magnitude` are all bits but the sign.
    """

    word: str
    exponent: int
    magnitude: int
    smallest: float
    largest: float


FLOATS: dict[FloatName, FloatDtype] = {
    "BF16": FloatDtype("bfloat16", 0x7F80, 0x7FFF, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
    "F16": FloatDtype("float16", 0x7C00, 0x7FFF, 2.0**-14, (2 - 2.0**-10) * 2.0**15),
    "F32": FloatDtype("float32", 0x7F800000, 0x7FFFFFFF, 2.0**-126, (2 - 2.0**-23) * 2.0**127),
}

NAMES: dict[str, FloatName] = {float_dtype.word: name for name, float_dtype in FLOATS.items()}
"""The safetensors name by the word of configurations."""
