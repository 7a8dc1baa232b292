"""The floating-point formats of a checkpoint as NumPy arrays, without torch.

bfloat16 has no NumPy dtype: an array of it holds its bit patterns as uint16, the upper half of the float32 with the
same value. FP8 is held as uint8 codes, whose values `grid.E4M3` lists.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.quant.dtypes import FLOATS, FloatName

Float32Array = NDArray[np.float32]

HELD_AS: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
"""NumPy's type of an array of each float dtype."""

_NARROWED_AT_ONCE = 1 << 20


def round_to_bfloat16(values: Float32Array) -> NDArray[np.uint16]:
    """Finite float32 values [...] as bfloat16 bit patterns, uint16 [...], rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def store_scale(scale: Float32Array, name: FloatName) -> NDArray[Any]:
    """Round positive float32 scales [...] to the stored dtype, kept within its normal, finite range.

    Returns [...] as uint16 bit patterns for BF16, float16 or float32.
    """
    limited = np.clip(scale, np.float32(FLOATS[name].smallest), np.float32(FLOATS[name].largest))
    if name == "BF16":
        return round_to_bfloat16(limited)
    return limited.astype(HELD_AS[name])


def widen(stored: NDArray[Any]) -> Float32Array:
    """float32 values [...] of an array of bfloat16 bit patterns (uint16), float16 or float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def narrowed(values: Float32Array, name: FloatName) -> NDArray[Any]:
    """Finite float32 values [rows, ...] rounded to nearest even as `BF16` (uint16 bit patterns) or `F16`, contiguous.

    A value that is too large becomes infinite. Little memory beside the result is taken.
    """
    result = np.empty(values.shape, HELD_AS[name])
    step = max(1, _NARROWED_AT_ONCE // max(1, math.prod(values.shape[1:])))
    with np.errstate(over="ignore"):
        for start in range(0, len(values), step):
            part = np.ascontiguousarray(values[start : start + step])
            result[start : start + step] = round_to_bfloat16(part) if name == "BF16" else part.astype(np.float16)
    return result


def not_finite(values: NDArray[Any], name: FloatName) -> NDArray[np.bool_]:
    """Which numbers of an array are infinite or NaN, in its shape: bit patterns of `name`, or floats of that width."""
    exponent = FLOATS[name].exponent
    bits = values.view(f"u{values.itemsize}")
    wrong: NDArray[np.bool_] = (bits & exponent) == exponent
    return wrong
