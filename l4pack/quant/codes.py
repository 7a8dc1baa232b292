"""One number at a time, for Numba kernels: its code on a grid, and the grid's number that is nearest to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np

from l4pack.quant.grid import E2M1, E4M3, INT4, INT8

P = ParamSpec("P")
R = TypeVar("R")

MAGIC = np.float32(1.5 * 2**23)  # float32 spacing here is 1: adding it rounds half to even, the integer in the low bits
INT_KIND, E4M3_KIND, E2M1_KIND = 0, 1, 2
KINDS = {INT4: INT_KIND, INT8: INT_KIND, E4M3: E4M3_KIND, E2M1: E2M1_KIND}  # what kernels know a grid by
E2M1_LIMIT = np.float32(E2M1.highest)
E4M3_LIMIT = np.float32(E4M3.highest)
E4M3_SMALLEST_NORMAL = np.uint32(0x3C800000)  # 2^-6 as float32 bits
E4M3_SUBNORMAL_MAGIC = np.float32(2.0**14)  # float32 spacing here is 2^-9, that of E4M3 subnormals
E4M3_SUBNORMAL_BITS = np.uint32(0x46800000)  # the same as bits
E4M3_SUBNORMAL_SPACING = np.float32(1.5 * 2.0**14)  # the same for numbers of either sign
E4M3_REBIAS = np.uint32((127 - 7) << 3)
E4M3_STEP = E4M3.step


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile on first call, into Numba's on-disk cache where a folder for it can be written."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # no writable cache folder at all
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


@kernel
def value_of(pattern: Any, shift: Any) -> Any:
    """The float32 of a bit pattern, shifted up to the width of one."""
    return np.uint32(np.uint32(pattern) << shift).view(np.float32)


@kernel
def int_code(value: Any, scale: Any, zero: Any, lowest: Any, highest: Any) -> Any:
    """Level of `value` plus 2^(bits-1), in the low bits."""
    level = min(max(np.rint(value / scale) + zero, lowest), highest)
    return np.uint8(np.uint32(np.float32(level + (MAGIC - lowest)).view(np.uint32)))


@kernel
def e4m3_code(value: Any, scale: Any) -> Any:
    """E4M3FN code of value / scale, rounded to nearest even and saturated at 448."""
    bits = np.uint32(np.float32(min(max(value / scale, -E4M3_LIMIT), E4M3_LIMIT)).view(np.uint32))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    rounded = np.uint32(magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1)))
    normal = np.uint32((rounded >> np.uint32(20)) - E4M3_REBIAS)
    shifted = np.float32(np.uint32(magnitude).view(np.float32) + E4M3_SUBNORMAL_MAGIC)
    subnormal = np.uint32(np.uint32(np.float32(shifted).view(np.uint32)) - E4M3_SUBNORMAL_BITS)
    code = normal if magnitude >= E4M3_SMALLEST_NORMAL else subnormal
    return np.uint8(code | ((bits >> np.uint32(24)) & np.uint32(0x80)))


@kernel
def e2m1_level(halves: Any) -> Any:
    """The nearest of 0, 1, 2, 3, 4, 6, 8 and 12 of either sign, E2M1's numbers in halves; half to the even code."""
    number = type(halves)
    magnitude = min(abs(halves), number(12))
    apart = number(1) if magnitude < number(4) else (number(2) if magnitude < number(8) else number(4))
    level = np.rint(magnitude / apart) * apart
    return level if halves >= 0 else -level


@kernel
def e2m1_code(value: Any, scale: Any) -> Any:
    """E2M1 code of value / scale, rounded to nearest even and saturated at 6; zero has no sign."""
    level = np.int32(e2m1_level(value / scale * np.float32(2)))
    halves = abs(level)
    code = halves if halves < 4 else (halves // 2 + 2 if halves < 8 else halves // 4 + 4)
    return np.uint8(code | (np.int32(8) if level < 0 else np.int32(0)))


@kernel
def e4m3_value(ratio: Any) -> Any:
    """`ratio` rounded to the nearest E4M3FN value, half to even, saturated at 448."""
    limited = np.float32(min(max(ratio, -E4M3_LIMIT), E4M3_LIMIT))
    bits = np.uint32(limited.view(np.uint32))
    rounded = np.uint32(bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1)))
    normal = np.uint32(rounded & np.uint32(0xFFF00000)).view(np.float32)
    subnormal = np.float32(np.float32(limited + E4M3_SUBNORMAL_SPACING) - E4M3_SUBNORMAL_SPACING)
    return normal if np.uint32(bits & np.uint32(0x7FFFFFFF)) >= E4M3_SMALLEST_NORMAL else subnormal


@kernel
def e4m3_number(code: Any) -> Any:
    """The float32 that an E4M3FN code stands for, which is no NaN."""
    magnitude = np.uint32(code) & np.uint32(0x7F)
    normal = np.uint32((magnitude + E4M3_REBIAS) << np.uint32(20)).view(np.float32)
    number = normal if magnitude >= np.uint32(8) else np.float32(magnitude) * np.float32(E4M3_STEP)
    return -number if np.uint32(code) & np.uint32(0x80) else number


@kernel
def e2m1_value(ratio: Any) -> Any:
    """`ratio` rounded to the nearest E2M1 value, half to even, saturated at 6."""
    return e2m1_level(ratio * np.float32(2)) * np.float32(0.5)


@kernel
def level_of(ratio: Any, zero: Any, bits: int, kind: int) -> Any:
    """The level nearest to value / scale: an integer, an E2M1 number in halves, or an E4M3 number; of the type of `ratio`."""
    number = type(ratio)
    if kind == E2M1_KIND:
        return e2m1_level(ratio)
    if kind == E4M3_KIND:
        return number(e4m3_value(np.float32(ratio)))
    return min(max(np.rint(ratio) + zero, number(-(1 << (bits - 1)))), number((1 << (bits - 1)) - 1))


@kernel
def kept_level(level: Any, kind: int) -> Any:
    """The int8 that a level is kept in: the level itself, or its E4M3 code."""
    return np.int8(e4m3_code(np.float32(level), np.float32(1))) if kind == E4M3_KIND else np.int8(level)


@kernel
def level_in(kept: Any, kind: int) -> Any:
    """The float32 level that an int8 keeps."""
    return e4m3_number(kept) if kind == E4M3_KIND else np.float32(kept)


@kernel
def least_apart(kind: int) -> Any:
    """How far levels are apart where they are nearest."""
    return np.float32(E4M3_STEP) if kind == E4M3_KIND else np.float32(1)


@kernel
def apart(level: Any, kind: int) -> Any:
    """How far the next level is at least: E4M3 numbers are a sixteenth to an eighth apart."""
    return max(abs(level) * np.float32(0.0625), np.float32(E4M3_STEP)) if kind == E4M3_KIND else np.float32(1)
