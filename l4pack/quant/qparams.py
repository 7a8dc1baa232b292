"""Scale and zero point of a range of weights, in float32 NumPy arithmetic.

    symmetric integers   scale = amax / ((2^bits - 1) / 2), or amax / 2^(bits-1) under Meta's rule
    asymmetric integers  scale = (high - low) / (2^bits - 1), zero point = clamp(rint(qmin - low / scale))
    FP8                  scale = amax / 448

Scales are rounded to the dtype they are stored in first, and everything after uses the stored scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.quant.floats import E4M3_MAX, Float32Array, FloatName, store_scale, widen
from l4pack.quant.scheme import NumberType, ScaleRule, Scheme


@dataclass(frozen=True)
class QParams:
    """Scales as written to disk (`stored`) and as float32, and signed float32 zero points, all of one shape."""

    stored: NDArray[Any]
    scale: Float32Array
    zero_point: Float32Array


def top_level(scheme: Scheme) -> float:
    """What the largest magnitude of a symmetric range is divided by to get the scale."""
    if scheme.type is NumberType.FLOAT:
        return E4M3_MAX
    if scheme.scale_rule is ScaleRule.META:
        return float(2 ** (scheme.num_bits - 1))
    return float(2**scheme.num_bits - 1) / 2


def qparams_of_range(low: Float32Array, high: Float32Array, scheme: Scheme, name: FloatName) -> QParams:
    """Scale and zero point of float32 ranges that include zero, of any shape; `name` is the dtype of the scale."""
    if scheme.symmetric:
        amax: Float32Array = np.maximum(-low, high)
        stored = store_scale(np.divide(amax, np.float32(top_level(scheme)), dtype=np.float32), name)
        scale = widen(stored)
        return QParams(stored, scale, np.zeros_like(scale))
    lowest, highest = np.float32(-(2 ** (scheme.num_bits - 1))), np.float32(2 ** (scheme.num_bits - 1) - 1)
    with np.errstate(over="ignore"):  # an infinite width is limited to the largest finite scale
        stored = store_scale((high - low) / (highest - lowest), name)
    scale = widen(stored)
    return QParams(stored, scale, np.clip(np.rint(lowest - low / scale), lowest, highest))
