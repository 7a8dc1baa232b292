"""Q4_K's scales: super-blocks of 256 weights in 8 blocks of 32, whose scales and minima are 6-bit codes over two F16 numbers.

    weight = (d * scale code) * level - dmin * minimum code,    levels 0 to 15

The 16 bytes of a super-block that hold them are ggml's own (`ggml-common.h`, `block_q4_K`): d, dmin, and 12 bytes of
codes. Products are exact in float32, and a weight is rounded once, as every reader of the type computes it.

Scales are found in two steps that weigh each column's squared error: for each block the scale and minimum of least error,
of its range with its ends drawn in and fitted to the levels that gives (least squares); then the codes, of those next to it.
`torch_superblocks` gives the same bytes: both add terms by halving them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.quant.codes import kernel
from l4pack.quant.floats import Float32Array
from l4pack.quant.scheme import HEADER_COLUMNS, SUPER_BLOCK

SUPER, BLOCK = SUPER_BLOCK
BLOCKS = SUPER // BLOCK
HEADER = SUPER // HEADER_COLUMNS
"""Bytes of a super-block's scales."""

HIGHEST_CODE = 63
HIGHEST_LEVEL = 15
ZERO_POINT = -8
"""The zero point of levels from -8 to 7, for a weight to which its minimum was added."""

SMALLEST, LARGEST = 2.0**-24, 65504.0  # what F16 has
FRACTIONS = tuple((low, high) for low in (1.0, 0.9, 0.8) for high in (1.0, 0.9, 0.8))
"""Of the lower and the upper end of a block's range, tried in this order; a tie keeps the earlier. With the codes that are
tried, normal weights have 4 % less rounding error than ggml's own search leaves; 16 pairs would gain another percent."""
NEIGHBOURS = ((0, 0), (0, 1), (0, -1), (1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1))
"""Steps of the codes of scale and minimum that are tried, likewise."""

_FRACTIONS = np.array(FRACTIONS, np.float32)
_NEIGHBOURS = np.array(NEIGHBOURS, np.float32)


def search(weight: Float32Array, importance: Float32Array) -> NDArray[np.uint8]:
    """The scales of finite weights [rows, columns], 16 bytes a super-block: uint8 [rows, columns / 16].

    `importance` [columns], not negative, weighs each column's squared error.
    """
    shape = len(weight), weight.shape[1] // BLOCK
    scale, minimum = np.empty(shape, np.float32), np.empty(shape, np.float32)
    _fit_blocks(weight, importance, _FRACTIONS, scale, minimum)
    wide_scale, wide_minimum = _step(scale), _step(minimum)
    codes = np.empty((*shape, 2), np.uint8)
    scale_step, minimum_step = (
        np.repeat(wide.astype(np.float32), BLOCKS, axis=1) for wide in (wide_scale, wide_minimum)
    )
    _choose_codes(weight, importance, scale, minimum, scale_step, minimum_step, _NEIGHBOURS, codes)
    return _packed(wide_scale, wide_minimum, codes)


def values_of(headers: NDArray[np.uint8]) -> tuple[Float32Array, Float32Array]:
    """float32 scales and minima of blocks, [rows, blocks] each, of uint8 [rows, columns / 16]."""
    rows = len(headers)
    each = np.ascontiguousarray(headers).reshape(rows, -1, HEADER)
    wide = each[..., :4].copy().view("<f2").astype(np.float32)
    packed = each[..., 4:]
    low, high, both = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = np.concatenate((low & 63, (both & 15) | (low >> 6 << 4)), axis=-1)
    minimum = np.concatenate((high & 63, (both >> 4) | (high >> 6 << 4)), axis=-1)
    products = (codes.astype(np.float32) * wide[..., k, None] for k, codes in enumerate((scale, minimum)))
    scales, minima = (one.reshape(rows, -1) for one in products)
    return scales, minima


def _step(values: Float32Array) -> NDArray[np.float16]:
    """What codes of [rows, blocks] are multiplied by: float16 [rows, super-blocks]."""
    largest = values.reshape(len(values), -1, BLOCKS).max(axis=-1) / np.float32(HIGHEST_CODE)
    step: NDArray[np.float16] = np.clip(largest, np.float32(SMALLEST), np.float32(LARGEST)).astype(np.float16)
    return step


def _packed(
    wide_scale: NDArray[np.float16], wide_minimum: NDArray[np.float16], codes: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """ggml's 16 bytes of each super-block; `codes` [rows, blocks, 2] are of scale and minimum."""
    rows, supers = wide_scale.shape
    made = np.empty((rows, supers, HEADER), np.uint8)
    made[..., :2] = wide_scale[..., None].view(np.uint8)
    made[..., 2:4] = wide_minimum[..., None].view(np.uint8)
    each = codes.reshape(rows, supers, BLOCKS, 2)
    low, high = each[:, :, :4], each[:, :, 4:]
    made[..., 4:8] = low[..., 0] | (high[..., 0] >> 4 << 6)
    made[..., 8:12] = low[..., 1] | (high[..., 1] >> 4 << 6)
    made[..., 12:] = (high[..., 0] & 15) | ((high[..., 1] & 15) << 4)
    return made.reshape(rows, -1)


@kernel
def _halved(terms: NDArray[np.float32]) -> Any:
    """The sum of a block's terms, its upper half added onto its lower until one is left; they are used up."""
    half = BLOCK // 2
    while half:
        for i in range(half):
            terms[i] += terms[half + i]
        half //= 2
    return terms[0]


@kernel
def _round_levels(x: NDArray[np.float32], scale: Any, minimum: Any, level: NDArray[np.float32]) -> None:
    """The nearest levels of a block's weights."""
    inverse = np.float32(1) / scale
    for i in range(BLOCK):
        level[i] = min(max(np.rint((x[i] + minimum) * inverse), np.float32(0)), np.float32(HIGHEST_LEVEL))


@kernel
def _error(
    x: NDArray[np.float32],
    w: NDArray[np.float32],
    level: NDArray[np.float32],
    scale: Any,
    minimum: Any,
    terms: NDArray[np.float32],
) -> Any:
    """Weighted squared error of a block."""
    for i in range(BLOCK):
        off = (level[i] * scale - minimum) - x[i]
        terms[i] = (off * off) * w[i]
    return _halved(terms)


@kernel
def _fit(
    x: NDArray[np.float32],
    w: NDArray[np.float32],
    level: NDArray[np.float32],
    scale: Any,
    minimum: Any,
    terms: NDArray[np.float32],
) -> tuple[Any, Any]:
    """Scale and minimum of least weighted error for given levels; those given where levels or weights don't tell."""
    for i in range(BLOCK):
        terms[i] = w[i]
    sum_w = _halved(terms)
    for i in range(BLOCK):
        terms[i] = w[i] * level[i]
    sum_l = _halved(terms)
    for i in range(BLOCK):
        terms[i] = (w[i] * level[i]) * level[i]
    sum_ll = _halved(terms)
    for i in range(BLOCK):
        terms[i] = w[i] * x[i]
    sum_x = _halved(terms)
    for i in range(BLOCK):
        terms[i] = (w[i] * level[i]) * x[i]
    sum_lx = _halved(terms)
    determinant = sum_w * sum_ll - sum_l * sum_l
    fitted = (sum_w * sum_lx - sum_l * sum_x) / determinant
    offset = (sum_l * fitted - sum_x) / sum_w
    if not offset >= np.float32(0):  # of minima only what is not negative can be stored
        fitted, offset = sum_lx / sum_ll, np.float32(0)
    if determinant > np.float32(0) and fitted > np.float32(0) and fitted < np.float32(LARGEST):
        return fitted, offset
    return scale, minimum


@kernel
def _fit_blocks(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    fractions: NDArray[np.float32],
    scales: NDArray[np.float32],
    minima: NDArray[np.float32],
) -> None:
    """The best scale and minimum of every block, not yet codes: [rows, blocks]."""
    level, terms = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for row in range(len(weight)):
        for block in range(scales.shape[1]):
            x = weight[row, block * BLOCK : (block + 1) * BLOCK]
            w = importance[block * BLOCK : (block + 1) * BLOCK]
            low, high = min(x.min(), np.float32(0)), x.max()
            least = np.float32(np.inf)
            for k in range(len(fractions)):
                minimum = -low * fractions[k, 0]
                scale = max((high * fractions[k, 1] + minimum) / np.float32(HIGHEST_LEVEL), np.float32(SMALLEST))
                _round_levels(x, scale, minimum, level)
                scale, minimum = _fit(x, w, level, scale, minimum, terms)
                error = _error(x, w, level, scale, minimum, terms)
                if error < least:
                    least = error
                    scales[row, block], minima[row, block] = scale, minimum
            if least == np.float32(np.inf):  # errors that float32 does not have
                scales[row, block], minima[row, block] = (high - low) / np.float32(HIGHEST_LEVEL), -low


@kernel
def _choose_codes(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    scales: NDArray[np.float32],
    minima: NDArray[np.float32],
    scale_steps: NDArray[np.float32],
    minimum_steps: NDArray[np.float32],
    neighbours: NDArray[np.float32],
    codes: NDArray[np.uint8],
) -> None:
    """The codes of least error next to those of every block's scale and minimum, into [rows, blocks, 2]."""
    level, terms = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    highest = np.float32(HIGHEST_CODE)
    for row in range(len(weight)):
        for block in range(scales.shape[1]):
            x = weight[row, block * BLOCK : (block + 1) * BLOCK]
            w = importance[block * BLOCK : (block + 1) * BLOCK]
            d, dmin = scale_steps[row, block], minimum_steps[row, block]
            first, second = np.rint(scales[row, block] / d), np.rint(minima[row, block] / dmin)
            least = np.float32(np.inf)
            codes[row, block] = np.uint8(min(max(first, np.float32(1)), highest)), np.uint8(min(second, highest))
            for k in range(len(neighbours)):
                a = min(max(first + neighbours[k, 0], np.float32(1)), highest)
                b = min(max(second + neighbours[k, 1], np.float32(0)), highest)
                _round_levels(x, d * a, dmin * b, level)
                error = _error(x, w, level, d * a, dmin * b, terms)
                if error < least:
                    least = error
                    codes[row, block, 0], codes[row, block, 1] = np.uint8(a), np.uint8(b)


@kernel
def levels_of(
    weight: NDArray[np.float32],
    scales: NDArray[np.float32],
    minima: NDArray[np.float32],
    levels: NDArray[np.int8],
) -> None:
    """The nearest levels, from -8 to 7, into [rows, columns]."""
    for row in range(len(weight)):
        for block in range(scales.shape[1]):
            scale, minimum = scales[row, block], minima[row, block]
            for i in range(block * BLOCK, (block + 1) * BLOCK):
                ratio = np.rint((weight[row, i] + minimum) / scale)
                level = min(max(ratio, np.float32(0)), np.float32(HIGHEST_LEVEL))
                levels[row, i] = np.int8(level + np.float32(ZERO_POINT))


@kernel
def dequantize(
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    minima: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """scale * level - minimum into float32 [rows, columns], from the bytes of packed levels."""
    for row in range(len(out)):
        for block in range(scales.shape[1]):
            scale, minimum = scales[row, block], minima[row, block]
            for j in range(block * BLOCK // 2, (block + 1) * BLOCK // 2):
                pair = packed[row, j]
                out[row, 2 * j] = np.float32(pair & 15) * scale - minimum
                out[row, 2 * j + 1] = np.float32(pair >> 4) * scale - minimum
