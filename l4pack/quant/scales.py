"""Scales of four-bit floats, a byte each: powers of two (E8M0), or E4M3 numbers over a global scale of the whole matrix.

    E8M0   2^(code - 127), code = floor(log2 amax) - 2 + 127, and one more where amax is at least 1.75 times its power of
           two: the smaller one would clip it by more than the larger one rounds it (compressed-tensors `generate_mx_scales`)
    E4M3   (the code's value) / g, the value nearest to amax / 6 * g, where g is the global scale

compressed-tensors takes 448 * 6 / amax for g. Any g is read, and a power of two is exact: a weight, a code of two
significant bits times a scale of four, stays a bfloat16 number, so that no runtime rounds it otherwise than another.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from l4pack.quant import cpu
from l4pack.quant.floats import Float32Array
from l4pack.quant.grid import E2M1, E4M3, ScaleDtype

Codes = NDArray[np.uint8]

NEIGHBOURS = {ScaleDtype.E8M0: (0, 1, -1), ScaleDtype.E4M3: (0, 1, 2, 3, 4, 5, -1, -2, -3, -4)}
"""Codes that the MSE observer tries, told from that of the range; a tie keeps the earlier. E4M3 numbers are 6 to 12 % apart:
the largest magnitude may come to lie on 4 instead of 6, or be clipped by a third."""

HIGHEST_CODE = {ScaleDtype.E8M0: 252, ScaleDtype.E4M3: 126}  # above, six times the scale is no float32, or the code NaN
LOWEST_CODE = {ScaleDtype.E8M0: 0, ScaleDtype.E4M3: 1}  # a scale of zero divides nothing
EMPTY_CODE = 0x20  # 0.125: what compressed-tensors gives a group of zeros
ROUNDS_UP = 0x200000  # a quarter, in the mantissa of a float32: with it, 1.75 and more come to lie in the next binade
# Half of what all codes reach: scales that are searched for, or made for a moved target, may be larger.
GLOBAL_RANGE = E4M3.highest * E2M1.highest / 2
SMALLEST_OVER, LARGEST_OVER = 2.0**-100, 2.0**100
_E4M3_VALUES = np.array(E4M3.values, np.float32)


def global_scale(amax: float) -> float:
    """The power of two that takes the scales of weights up to `amax`, a float32 number, near to the largest E4M3 number."""
    if amax == 0:
        return 1.0
    ratio = min(max(GLOBAL_RANGE / amax, SMALLEST_OVER), LARGEST_OVER)  # of subnormal weights it is no float32 yet
    return 2.0 ** (math.frexp(ratio)[1] - 1)


def input_global_scale(amax: float) -> float:
    """The global scale of inputs up to `amax`, as compressed-tensors has it; 1 where nothing was seen."""
    scale = E4M3.highest * E2M1.highest / amax if amax > 0 else math.inf
    return scale if scale <= float(np.finfo(np.float32).max) else 1.0


def codes_of(amax: Float32Array, kind: ScaleDtype, over: float) -> Codes:
    """Codes of the scales for groups of largest magnitude `amax`, in its shape; `over` is the global scale."""
    amax = np.abs(amax)  # zero may have a sign
    if kind is ScaleDtype.E8M0:
        exponent = ((amax.view(np.uint32) + np.uint32(ROUNDS_UP)) >> np.uint32(23)).astype(np.int32)
        return np.clip(exponent - 2, 0, HIGHEST_CODE[kind]).astype(np.uint8)
    codes = np.empty(amax.shape, np.uint8)
    cpu.e4m3_codes((amax / np.float32(E2M1.highest) * np.float32(over)).reshape(-1), codes.reshape(-1))
    return np.where(codes == 0, np.uint8(EMPTY_CODE), codes)


def values_of(codes: Codes, kind: ScaleDtype, over: float) -> Float32Array:
    """The float32 scales that codes stand for, in their shape."""
    if kind is ScaleDtype.E8M0:
        bits = codes.astype(np.uint32)
        return np.where(bits == 0, np.uint32(1 << 22), bits << np.uint32(23)).view(np.float32)
    values: Float32Array = _E4M3_VALUES[codes] / np.float32(over)
    return values


def neighbours(codes: Codes, kind: ScaleDtype) -> Codes:
    """What to try instead of `codes`, themselves first, along a new last axis."""
    tried = codes[..., None].astype(np.int16) + np.array(NEIGHBOURS[kind], np.int16)
    return np.clip(tried, LOWEST_CODE[kind], HIGHEST_CODE[kind]).astype(np.uint8)
