"""Numba kernels: weight blocks as float bit patterns in, ranges, codes or squared errors out.

A block comes as the flat, contiguous memory from its first to its last element plus a row stride, because Numba
vectorises only what it knows to be contiguous, and a half of a fused tensor is not. Elements are bit patterns, uint16
for bfloat16 and uint32 for float32. Every kernel is single-threaded, releases the GIL and touches each output row's
data in an order that does not depend on the other rows.

The in x out kernels walk tiles of TILE contiguous output features, so that every operation is a vector operation along
them, and write each tile's packed words transposed: no transposed copy of the source is ever made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.quant.codes import (
    E2M1_KIND,
    E4M3_KIND,
    e2m1_code,
    e2m1_value,
    e4m3_code,
    e4m3_value,
    int_code,
    kernel,
    value_of,
)

TILE = 2048  # output features of a tile: 4 KB of each source row, a page; shorter runs starve the prefetcher
CHUNK = 64  # input features coded before their words are written: with TILE, 128 KB of codes stay in the L2 cache

ERROR_TILE = 32  # output features transposed at once: one cache line of bfloat16
TAIL = 16  # terms of a sum: fewer are one vector or less

QUIET_NAN = np.uint32(0x7FC00000)


@kernel
def _sort_key(pattern: Any, shift: Any) -> Any:
    """A float's bits as an int32 that orders like the float; infinities and NaN lie outside every finite key."""
    bits = np.int32(np.uint32(pattern) << shift)
    return np.int32(bits ^ np.int32(np.uint32(bits >> 31) >> np.uint32(1)))


@kernel
def ranges_in_out(
    flat: NDArray[Any],
    stride: int,
    in_features: int,
    group: int,
    low: NDArray[np.int32],
    high: NDArray[np.int32],
) -> None:
    """Sort keys of the smallest and largest value of each group, zero included, into [out, groups]."""
    shift = np.uint32(32 - 8 * flat.itemsize)
    smallest = np.empty(TILE, np.int32)
    largest = np.empty(TILE, np.int32)
    for first in range(0, low.shape[0], TILE):
        width = min(TILE, low.shape[0] - first)
        for g in range(low.shape[1]):
            smallest[:] = 0
            largest[:] = 0
            for i in range(g * group, min((g + 1) * group, in_features)):
                row = flat[i * stride + first : i * stride + first + width]
                for c in range(width):
                    key = _sort_key(row[c], shift)
                    smallest[c] = min(smallest[c], key)
                    largest[c] = max(largest[c], key)
            for c in range(width):
                low[first + c, g] = smallest[c]
                high[first + c, g] = largest[c]


@kernel
def ranges_out_in(
    flat: NDArray[Any],
    stride: int,
    in_features: int,
    group: int,
    low: NDArray[np.int32],
    high: NDArray[np.int32],
) -> None:
    """As `ranges_in_out`, for a block stored [out, in]."""
    shift = np.uint32(32 - 8 * flat.itemsize)
    for o in range(low.shape[0]):
        row = flat[o * stride : o * stride + in_features]
        for g in range(low.shape[1]):
            smallest = np.int32(0)
            largest = np.int32(0)
            segment = row[g * group : min((g + 1) * group, in_features)]
            for i in range(segment.size):  # iterating over the elements instead is not vectorised
                key = _sort_key(segment[i], shift)
                smallest = np.int32(min(smallest, key))
                largest = np.int32(max(largest, key))
            low[o, g] = smallest
            high[o, g] = largest


@kernel
def e4m3_codes(values: NDArray[np.float32], codes: NDArray[np.uint8]) -> None:
    """E4M3FN codes of values [n], rounded to nearest even and saturated."""
    for i in range(values.size):
        codes[i] = e4m3_code(values[i], np.float32(1))


@kernel
def _pack_columns(codes: Any, rows: int, width: int, bits: int, words: Any) -> Any:
    """Pack `rows` rows of codes, each a column of `width` outputs, into words[word, output]; returns the word count."""
    per_word = 32 // bits
    count = (rows + per_word - 1) // per_word
    codes[rows : count * per_word] = 0
    for j in range(count):
        word = words[j]
        if bits == 4:
            k = 8 * j
            c0, c1, c2, c3 = codes[k], codes[k + 1], codes[k + 2], codes[k + 3]
            c4, c5, c6, c7 = codes[k + 4], codes[k + 5], codes[k + 6], codes[k + 7]
            for c in range(width):
                word[c] = (
                    np.uint32(c0[c] | (c1[c] << 4))
                    | (np.uint32(c2[c] | (c3[c] << 4)) << 8)
                    | (np.uint32(c4[c] | (c5[c] << 4)) << 16)
                    | (np.uint32(c6[c] | (c7[c] << 4)) << 24)
                )
        else:
            c0, c1, c2, c3 = codes[4 * j], codes[4 * j + 1], codes[4 * j + 2], codes[4 * j + 3]
            for c in range(width):
                word[c] = (
                    np.uint32(c0[c]) | (np.uint32(c1[c]) << 8) | (np.uint32(c2[c]) << 16) | (np.uint32(c3[c]) << 24)
                )
    return count


@kernel
def _store_transposed(words: Any, packed: Any) -> None:
    for c in range(packed.shape[0]):
        target = packed[c]
        for j in range(target.size):
            target[j] = words[j, c]


@kernel
def _encode_tile_row(row: Any, s: Any, z: Any, lowest: Any, highest: Any, kind: int, code: Any) -> None:
    """Codes of one input feature of a tile: element c has its own scale and zero point."""
    shift = np.uint32(32 - 8 * row.itemsize)
    if kind == E4M3_KIND:
        for c in range(row.size):
            code[c] = e4m3_code(value_of(row[c], shift), s[c])
    elif kind == E2M1_KIND:
        for c in range(row.size):
            code[c] = e2m1_code(value_of(row[c], shift), s[c])
    else:
        for c in range(row.size):
            code[c] = int_code(value_of(row[c], shift), s[c], z[c], lowest, highest)


@kernel
def encode_in_out(
    flat: NDArray[Any],
    stride: int,
    in_features: int,
    group: int,
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    bits: int,
    kind: int,
    packed: NDArray[np.uint32],
) -> None:
    """Quantize a block with given float32 scale and zero point [out, groups] into packed words [out, words]."""
    lowest = np.float32(-(1 << (bits - 1)))
    highest = np.float32((1 << (bits - 1)) - 1)
    s = np.empty(TILE, np.float32)
    z = np.empty(TILE, np.float32)
    codes = np.empty((CHUNK, TILE), np.uint8)
    words = np.empty((CHUNK // 4, TILE), np.uint32)
    for first in range(0, packed.shape[0], TILE):
        width = min(TILE, packed.shape[0] - first)
        for g in range(scale.shape[1]):
            for c in range(width):
                s[c] = scale[first + c, g]
                z[c] = zero[first + c, g]
            end = min((g + 1) * group, in_features)
            for start in range(g * group, end, CHUNK):
                rows = min(CHUNK, end - start)
                for i in range(rows):
                    at = (start + i) * stride + first
                    _encode_tile_row(flat[at : at + width], s, z, lowest, highest, kind, codes[i])
                count = _pack_columns(codes, rows, width, bits, words)
                at = start * bits // 32
                _store_transposed(words, packed[first : first + width, at : at + count])


@kernel
def encode_out_in(
    flat: NDArray[Any],
    stride: int,
    in_features: int,
    group: int,
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    bits: int,
    kind: int,
    packed: NDArray[np.uint8],
) -> None:
    """As `encode_in_out`, for a block stored [out, in]; `packed` is the same memory as bytes."""
    shift = np.uint32(32 - 8 * flat.itemsize)
    lowest = np.float32(-(1 << (bits - 1)))
    highest = np.float32((1 << (bits - 1)) - 1)
    codes = np.zeros(packed.shape[1] * 8 // bits, np.uint8)
    pairs = codes.view(np.uint16)
    for o in range(packed.shape[0]):
        row = flat[o * stride : o * stride + in_features]
        for g in range(scale.shape[1]):
            end = min((g + 1) * group, in_features)
            segment = row[g * group : end]
            code = codes[g * group : end]
            s = scale[o, g]
            z = zero[o, g]
            if kind == E4M3_KIND:
                for i in range(segment.size):
                    code[i] = e4m3_code(value_of(segment[i], shift), s)
            elif kind == E2M1_KIND:
                for i in range(segment.size):
                    code[i] = e2m1_code(value_of(segment[i], shift), s)
            else:
                for i in range(segment.size):
                    code[i] = int_code(value_of(segment[i], shift), s, z, lowest, highest)
        target = packed[o]
        if bits == 4:
            for j in range(target.size):
                target[j] = np.uint8(pairs[j] | (pairs[j] >> 4))
        else:
            target[:] = codes


@kernel
def _unpack(packed: Any, bits: int, codes: Any) -> None:
    """The codes of a row's bytes; of two in a byte the lower half comes first."""
    if bits == 4:
        for j in range(packed.size):
            codes[2 * j] = packed[j] & 15
            codes[2 * j + 1] = packed[j] >> 4
    else:
        codes[:] = packed


@kernel
def dequantize_int(
    packed: NDArray[np.uint8],
    bits: int,
    group: int,
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """(level - zero point) * scale into float32 [out, in], from the bytes of the packed words."""
    offset = np.float32(1 << (bits - 1))
    codes = np.empty(packed.shape[1] * 8 // bits, np.uint8)
    for o in range(out.shape[0]):
        _unpack(packed[o], bits, codes)
        for g in range(scale.shape[1]):
            start = g * group
            target = out[o, start : start + group]
            code = codes[start : start + target.size]
            s = scale[o, g]
            z = zero[o, g] + offset
            for i in range(target.size):
                target[i] = (np.float32(code[i]) - z) * s


@kernel
def dequantize_table(
    packed: NDArray[np.uint8],
    bits: int,
    table: NDArray[np.float32],
    group: int,
    scale: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """table[code] * scale into float32 [out, in], from the bytes of the codes."""
    codes = np.empty(packed.shape[1] * 8 // bits, np.uint8)
    for o in range(out.shape[0]):
        _unpack(packed[o], bits, codes)
        for g in range(scale.shape[1]):
            start = g * group
            target = out[o, start : start + group]
            code = codes[start : start + target.size]
            s = scale[o, g]
            for i in range(target.size):
                target[i] = table[code[i]] * s


@kernel
def to_bfloat16(values: NDArray[np.float32]) -> None:
    """Round float32 [rows, columns] to the nearest bfloat16 values, half to even, in place."""
    for o in range(values.shape[0]):
        row = values[o].view(np.uint32)
        for i in range(row.size):
            sign = np.uint32(row[i] & np.uint32(0x80000000))
            bits = min(np.uint32(row[i] & np.uint32(0x7FFFFFFF)), QUIET_NAN)  # rounding up would make 0 of a larger one
            rounded = np.uint32(bits + np.uint32(0x7FFF) + np.uint32((bits >> np.uint32(16)) & np.uint32(1)))
            row[i] = np.uint32(sign | (rounded & np.uint32(0xFFFF0000)))


@kernel
def _halve(terms: Any, count: int, least: int) -> Any:
    """Add the upper half of `count` terms (or rows of terms) onto the lower, until no more than `least` are left.

    An order of summing that every device can follow.
    """
    while count > least:
        half = count // 2
        lower = terms[:half]
        upper = terms[count - half : count]
        for i in range(half):
            lower[i] += upper[i]
        count -= half
    return count


@kernel
def _halve_rows(rows: Any, count: int) -> None:
    """Go on halving to one, for every column of `rows` at once."""
    while count > 1:
        half = count // 2
        for i in range(half):
            lower = rows[i]
            upper = rows[count - half + i]
            for k in range(lower.size):
                lower[k] += upper[k]
        count -= half


@kernel
def _group_errors(
    values: Any, weight: Any, scale: Any, zero: Any, bits: int, kind: int, terms: Any, tails: Any, out: Any
) -> None:
    """Weighted squared error of one group under each candidate scale and zero point, into out[candidate].

    The last steps of each sum are dependent additions: they wait in `tails` [TAIL, candidates] to be made for all at
    once.
    """
    lowest = np.float32(-(1 << (bits - 1)))
    highest = np.float32((1 << (bits - 1)) - 1)
    count = 0
    for k in range(scale.size):
        s = scale[k]
        z = zero[k]
        inverse = np.float32(1) / s
        if kind == E4M3_KIND:
            for i in range(values.size):
                error = e4m3_value(values[i] * inverse) * s - values[i]
                terms[i] = (error * error) * weight[i]
        elif kind == E2M1_KIND:
            for i in range(values.size):
                error = e2m1_value(values[i] * inverse) * s - values[i]
                terms[i] = (error * error) * weight[i]
        else:
            for i in range(values.size):
                level = min(max(np.rint(values[i] * inverse) + z, lowest), highest)
                error = (level - z) * s - values[i]
                terms[i] = (error * error) * weight[i]
        count = _halve(terms, values.size, TAIL)
        for i in range(count):
            tails[i, k] = terms[i]
    _halve_rows(tails, count)
    out[:] = tails[0]


@kernel
def errors_in_out(
    flat: NDArray[Any],
    stride: int,
    in_features: int,
    group: int,
    weight: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    bits: int,
    kind: int,
    errors: NDArray[np.float32],
) -> None:
    """Squared errors of each group under K candidates: scale, zero and errors are float32 [out, groups, K].

    `weight` [groups * group] multiplies each input feature's error. The last group is filled up with zero weights.
    """
    shift = np.uint32(32 - 8 * flat.itemsize)
    tile = np.zeros((ERROR_TILE, group), np.float32)
    terms = np.empty(group, np.float32)
    tails = np.empty((TAIL, errors.shape[2]), np.float32)
    for first in range(0, errors.shape[0], ERROR_TILE):
        width = min(ERROR_TILE, errors.shape[0] - first)
        for g in range(errors.shape[1]):
            rows = min(group, in_features - g * group)
            tile[:, rows:] = 0
            for i in range(rows):
                at = (g * group + i) * stride + first
                row = flat[at : at + width]
                for c in range(width):
                    tile[c, i] = value_of(row[c], shift)
            part = weight[g * group : (g + 1) * group]
            for c in range(width):
                o = first + c
                _group_errors(tile[c], part, scale[o, g], zero[o, g], bits, kind, terms, tails, errors[o, g])


@kernel
def errors_out_in(
    flat: NDArray[Any],
    stride: int,
    in_features: int,
    group: int,
    weight: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    bits: int,
    kind: int,
    errors: NDArray[np.float32],
) -> None:
    """As `errors_in_out`, for a block stored [out, in]."""
    shift = np.uint32(32 - 8 * flat.itemsize)
    values = np.zeros(group, np.float32)
    terms = np.empty(group, np.float32)
    tails = np.empty((TAIL, errors.shape[2]), np.float32)
    for o in range(errors.shape[0]):
        row = flat[o * stride : o * stride + in_features]
        for g in range(errors.shape[1]):
            segment = row[g * group : min((g + 1) * group, in_features)]
            for i in range(segment.size):
                values[i] = value_of(segment[i], shift)
            values[segment.size :] = 0
            part = weight[g * group : (g + 1) * group]
            _group_errors(values, part, scale[o, g], zero[o, g], bits, kind, terms, tails, errors[o, g])
