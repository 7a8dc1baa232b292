"""Numba kernels of the value checks: one pass over the bits each, no temporary arrays, the GIL released."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.quant.codes import E2M1_KIND, E2M1_LIMIT, E4M3_KIND, E4M3_LIMIT, INT_KIND, e2m1_value, kernel

SLACK = 1.06
"""How much further than half a step a weight may lie: scales and ratios rounded to bfloat16 by other writers."""

STATISTICS = 5  # columns of `compare`'s result: too far, squared error, squared RTN error, squares, products
_TILE_ROWS, _TILE_COLUMNS = 32, 64


@kernel
def scan(bits: NDArray[Any], exponent: int, magnitude: int) -> tuple[int, bool]:
    """How many bit patterns [n] have all `exponent` bits set (infinite or NaN), and whether any value is not zero."""
    bad = 0
    seen = np.uint32(0)
    for i in range(bits.size):
        value = np.uint32(bits[i])
        bad += np.uint32(value & exponent) == np.uint32(exponent)
        seen |= np.uint32(value & magnitude)
    return bad, seen != 0


@kernel
def widen_transposed(block: NDArray[Any], out: NDArray[np.float32]) -> None:
    """float32 [columns, rows] of a block [rows, columns] of bfloat16 (uint16) or float32 (uint32) bit patterns."""
    shift = np.uint32(32 - 8 * block.itemsize)
    rows, columns = block.shape
    # A row of the tile is a little longer than a power of two, or its columns would share a few cache sets.
    tile = np.empty((_TILE_ROWS, _TILE_COLUMNS + 8), np.float32)
    for left in range(0, columns, _TILE_COLUMNS):
        width = min(_TILE_COLUMNS, columns - left)
        for top in range(0, rows, _TILE_ROWS):
            height = min(_TILE_ROWS, rows - top)
            for row in range(height):
                source, wide = block[top + row, left : left + width], tile[row]
                for column in range(width):
                    wide[column] = np.uint32(np.uint32(source[column]) << shift).view(np.float32)
            for column in range(width):
                target = out[left + column, top : top + height]
                for row in range(height):
                    target[row] = tile[row, column]


@kernel
def group_ranges(weight: NDArray[np.float32], group: int, low: NDArray[np.float32], high: NDArray[np.float32]) -> None:
    """Smallest and largest value of each group of columns, zero included, into [rows, groups]."""
    for row in range(weight.shape[0]):
        for g in range(low.shape[1]):
            smallest = np.float32(0)
            largest = np.float32(0)
            for value in weight[row, g * group : (g + 1) * group]:
                smallest = min(smallest, value)
                largest = max(largest, value)
            low[row, g] = smallest
            high[row, g] = largest


@kernel
def compare(
    weight: NDArray[np.float32],
    stored: NDArray[np.float32],
    group: int,
    bits: int,
    kind: int,
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    rtn_scale: NDArray[np.float32],
    rtn_zero: NDArray[np.float32],
    statistics: NDArray[np.float64],
    slopes: NDArray[np.float32],
    energies: NDArray[np.float32],
) -> None:
    """Statistics of `stored` (dequantized) against `weight`, both float32 [rows, in], into [rows, STATISTICS], and the
    factor that takes each group's weights, cut to the range of the scale, nearest to the stored ones into `slopes`
    [rows, groups], 1 where they are all zero; their sums of squares into `energies`.

    A weight within the range of its group may lie half a step from its stored value; one beyond must be stored as the
    range's end. `rtn_scale` and `rtn_zero` are those of min-max rounding, for the error that rounding would make.
    """
    lowest = np.float32(-(1 << (bits - 1)))
    highest = np.float32((1 << (bits - 1)) - 1)
    for row in range(weight.shape[0]):
        far, square_error, square_rtn, squares, products = 0, 0.0, 0.0, 0.0, 0.0
        for g in range(scale.shape[1]):
            start, stop = g * group, min((g + 1) * group, weight.shape[1])
            w, d = weight[row, start:stop], stored[row, start:stop]
            s, z, rs, rz = scale[row, g], zero[row, g], rtn_scale[row, g], rtn_zero[row, g]
            low, high = (lowest - z) * s, (highest - z) * s
            if kind != INT_KIND:
                limit = E4M3_LIMIT if kind == E4M3_KIND else E2M1_LIMIT
                low, high = -limit * s, limit * s
            beyond, slopes[row, g], energies[row, g] = _too_far(w, d, low, high, s, kind)
            far += beyond
            error, rtn, square, product = _sums(w, d, lowest, highest, rs, rz, kind)
            square_error += error
            square_rtn += rtn
            squares += square
            products += product
        statistics[row, 0] = far
        statistics[row, 1] = square_error
        statistics[row, 2] = square_rtn
        statistics[row, 3] = squares
        statistics[row, 4] = products


@kernel
def _power(value: Any) -> Any:
    """The power of two at or below a magnitude."""
    return np.uint32(np.uint32(np.float32(value).view(np.uint32)) & np.uint32(0x7F800000)).view(np.float32)


@kernel
def _half_step(magnitude: Any, scale: Any, kind: int) -> Any:
    """Half of how far apart the numbers next to a magnitude are."""
    if kind == E4M3_KIND:
        return max(magnitude * np.float32(1 / 16), np.float32(1 / 1024) * scale)
    if kind == E2M1_KIND:
        half = np.float32(0.25) if magnitude < 2 * scale else np.float32(0.5)
        return (half if magnitude < 4 * scale else np.float32(1)) * scale
    return np.float32(0.5) * scale


@kernel
def _too_far(w: Any, d: Any, low: Any, high: Any, scale: Any, kind: int) -> tuple[int, Any, Any]:
    far, squares, products = 0, 0.0, 0.0
    for i in range(w.size):
        nearest = min(max(w[i], low), high)
        allowed = np.float32(SLACK) * _half_step(abs(nearest), scale, kind)
        # Written so that a NaN counts as too far.
        far += not abs(d[i] - nearest) <= allowed
        squares += nearest * nearest
        products += d[i] * nearest
    return far, (products / squares if squares else 1.0), squares


@kernel
def _sums(w: Any, d: Any, lowest: Any, highest: Any, scale: Any, zero: Any, kind: int) -> tuple[Any, Any, Any, Any]:
    """Squared error, squared error of rounding to nearest, squares and products, in float64 over one group."""
    error, rtn, squares, products = 0.0, 0.0, 0.0, 0.0
    subnormal = np.float32(2.0**-6) * scale
    inverse = np.float32(1) / scale
    for i in range(w.size):
        difference = d[i] - w[i]
        error += difference * difference
        squares += w[i] * w[i]
        products += d[i] * w[i]
        if kind == E4M3_KIND:
            step = max(_power(w[i]), subnormal) * np.float32(0.125)
            rtn += step * step * np.float32(1 / 12)
        elif kind == E2M1_KIND:
            miss = e2m1_value(w[i] * inverse) * scale - w[i]
            rtn += miss * miss
        else:
            level = min(max(np.rint(w[i] * inverse) + zero, lowest), highest)
            miss = (level - zero) * scale - w[i]
            rtn += miss * miss
    return error, rtn, squares, products
