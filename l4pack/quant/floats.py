"""The floating-point formats of a checkpoint as NumPy arrays, without torch.

bfloat16 has no NumPy dtype: an array of it holds its bit patterns as uint16, the upper half of the float32 with the
same value. E4M3FN (FP8; Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433) is held as uint8 codes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from l4pack.quant.scheme import ScaleDtype, Scheme

FloatName = Literal["BF16", "F16", "F32"]
"""A float dtype by its safetensors name."""

Float32Array = NDArray[np.float32]

E4M3_MAX = 448.0

STORED: dict[ScaleDtype, FloatName] = {
    ScaleDtype.BFLOAT16: "BF16",
    ScaleDtype.FLOAT16: "F16",
    ScaleDtype.FLOAT32: "F32",
}
"""The safetensors name of every scale dtype but `source`."""

_NARROWED_AT_ONCE = 1 << 20
_BF16_LARGEST = float(np.uint32(0x7F7F0000).view(np.float32))
_FLOAT32_SMALLEST = float(np.finfo(np.float32).smallest_normal)

SCALE_LIMITS: dict[FloatName, tuple[float, float]] = {
    "BF16": (_FLOAT32_SMALLEST, _BF16_LARGEST),
    "F16": (float(np.finfo(np.float16).smallest_normal), float(np.finfo(np.float16).max)),
    "F32": (_FLOAT32_SMALLEST, float(np.finfo(np.float32).max)),
}
"""Smallest normal and largest finite value of each float dtype."""


def scale_float(scheme: Scheme, source: FloatName) -> FloatName:
    """The dtype that `scheme` stores its scales in, for a matrix whose weights are `source`."""
    return source if scheme.scale_dtype is ScaleDtype.SOURCE else STORED[scheme.scale_dtype]


def round_to_bfloat16(values: Float32Array) -> NDArray[np.uint16]:
    """Finite float32 values [...] as bfloat16 bit patterns, uint16 [...], rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def store_scale(scale: Float32Array, name: FloatName) -> NDArray[Any]:
    """Round positive float32 scales [...] to the stored dtype, kept within its normal, finite range.

    Returns [...] as uint16 bit patterns for BF16, float16 or float32.
    """
    smallest, largest = SCALE_LIMITS[name]
    limited = np.clip(scale, np.float32(smallest), np.float32(largest))
    if name == "BF16":
        return round_to_bfloat16(limited)
    return limited.astype(np.float16 if name == "F16" else np.float32)


def widen(stored: NDArray[Any]) -> Float32Array:
    """float32 values [...] of an array of bfloat16 bit patterns (uint16), float16 or float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def narrowed(values: Float32Array, name: FloatName) -> NDArray[Any]:
    """Finite float32 values [rows, ...] rounded to nearest even as `BF16` (uint16 bit patterns) or `F16`, contiguous.

    A value that is too large becomes infinite. Little memory beside the result is taken.
    """
    result = np.empty(values.shape, np.uint16 if name == "BF16" else np.float16)
    step = max(1, _NARROWED_AT_ONCE // max(1, math.prod(values.shape[1:])))
    with np.errstate(over="ignore"):
        for start in range(0, len(values), step):
            part = np.ascontiguousarray(values[start : start + step])
            result[start : start + step] = round_to_bfloat16(part) if name == "BF16" else part.astype(np.float16)
    return result


def e4m3_values() -> Float32Array:
    """The float32 value of each of the 256 E4M3FN codes; 0x7F and 0xFF are NaN, there is no infinity."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    fraction = np.where(exponent == 0, mantissa / 8, 1 + mantissa / 8)
    magnitude = fraction * 2.0 ** (np.maximum(exponent, 1) - 7)
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    values: Float32Array = np.where(codes < 128, magnitude, -magnitude).astype(np.float32)
    return values
