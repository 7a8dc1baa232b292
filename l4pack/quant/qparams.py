"""Scale and zero point of a range of weights, in float32 NumPy arithmetic.

    symmetric integers   scale = amax / ((2^bits - 1) / 2), or amax / 2^(bits-1) under Meta's rule
    asymmetric integers  scale = (high - low) / (2^bits - 1), zero point = clamp(rint(qmin - low / scale))
    FP8                  scale = amax / 448, its largest number
    FP4                  see `scales`

Scales are rounded to the dtype they are stored in first, and everything after uses the stored scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.quant.dtypes import FloatName
from l4pack.quant.floats import Float32Array, store_scale, widen
from l4pack.quant.scales import codes_of, neighbours, values_of
from l4pack.quant.scheme import ScaleRule, Scheme

SHRINK = (*(round(1 - 0.02 * step, 2) for step in range(11)), 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3)
"""Fractions of a group's range that the MSE observer tries, largest first; a tie keeps the larger range.

Squared error against min-max on normal, Laplace and Student-t (4) weights of 2048 inputs: int4 group 128 -17 %, the
same asymmetric -9 to -11 %, int4 channel -39 to -57 % (only there are fractions below 0.7 chosen much), int8 and FP8
-1 to -4 %, where min-max will do. A grid of 61 fractions gains no more than 0.3 % of the error for groups.
"""


@dataclass(frozen=True)
class QParams:
    """Scales as written to disk (`stored`) and as float32, and signed float32 zero points, all of one shape.

    Float32 scales are what weights are divided by: codes over a global scale have been divided by it.
    """

    stored: NDArray[Any]
    scale: Float32Array
    zero_point: Float32Array


def top_level(scheme: Scheme) -> float:
    """What the largest magnitude of a symmetric range is divided by to get the scale."""
    grid = scheme.grid
    return -grid.lowest if scheme.scale_rule is ScaleRule.META else (grid.highest - grid.lowest) / 2


def qparams_of_range(
    low: Float32Array, high: Float32Array, scheme: Scheme, name: FloatName, over: float = 1.0
) -> QParams:
    """Scale and zero point of float32 ranges that include zero, of any shape; `name` is the dtype of the scale, and `over`
    the global scale."""
    if scheme.symmetric:
        amax: Float32Array = np.maximum(-low, high)
        if scheme.coded_scales:
            return _coded(codes_of(amax, scheme.scale_dtype, over), scheme, over)
        stored = store_scale(np.divide(amax, np.float32(top_level(scheme)), dtype=np.float32), name)
        scale = widen(stored)
        return QParams(stored, scale, np.zeros_like(scale))
    lowest, highest = np.float32(scheme.grid.lowest), np.float32(scheme.grid.highest)
    with np.errstate(over="ignore"):  # an infinite width is limited to the largest finite scale
        stored = store_scale((high - low) / (highest - lowest), name)
    scale = widen(stored)
    return QParams(stored, scale, np.clip(np.rint(lowest - low / scale), lowest, highest))


def _coded(codes: NDArray[np.uint8], scheme: Scheme, over: float) -> QParams:
    scale = values_of(codes, scheme.scale_dtype, over)
    return QParams(codes, scale, np.zeros_like(scale))


def candidates(low: Float32Array, high: Float32Array, scheme: Scheme, name: FloatName, over: float = 1.0) -> QParams:
    """The scales and zero points of every fraction in `SHRINK` of the ranges, or the neighbours of those that are codes,
    along a new last axis."""
    if scheme.coded_scales:
        codes = codes_of(np.maximum(-low, high), scheme.scale_dtype, over)
        return _coded(neighbours(codes, scheme.scale_dtype), scheme, over)
    fractions = np.array(SHRINK, np.float32)
    return qparams_of_range(low[..., None] * fractions, high[..., None] * fractions, scheme, name)


def least_error(tried: QParams, errors: Float32Array) -> QParams:
    """Of `candidates`, those with the smallest error; `errors` has the same shape."""
    best = np.zeros(errors.shape[:-1], np.intp)
    smallest = errors[..., 0].copy()
    for k in range(1, errors.shape[-1]):
        better = errors[..., k] < smallest  # not argmin: an overflowed error must never win, and ties go to the first
        best[better] = k
        smallest[better] = errors[..., k][better]

    def pick(values: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(values, best[..., None], axis=-1)[..., 0]

    return QParams(pick(tried.stored), pick(tried.scale), pick(tried.zero_point))


def halving_sum(terms: Float32Array) -> Float32Array:
    """Sum along axis 1 by adding its upper half onto its lower until one is left, the order of the kernels."""
    while (count := terms.shape[1]) > 1:
        half = count // 2
        terms = np.concatenate((terms[:, :half] + terms[:, count - half :], terms[:, half : count - half]), axis=1)
    return terms[:, 0]
