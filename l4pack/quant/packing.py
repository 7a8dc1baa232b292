"""Integer levels in int32 words, as compressed-tensors' `pack_to_int32` stores them.

The stored code of a level is level + 2^(bits-1); code k of a row sits in word k // (32 / bits), lowest bits first; the
last word is padded with zero bits. On the little-endian machines NumPy and Numba run on here, that is the byte order
of the codes themselves, two to a byte for four bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def packed_columns(columns: int, num_bits: int) -> int:
    """int32 words that hold one row of `columns` levels."""
    return -(-columns * num_bits // 32)


def pack_levels(levels: NDArray[Any], num_bits: int) -> NDArray[np.int32]:
    """Pack signed levels [rows, columns] (int8) into int32 words [rows, ceil(columns * num_bits / 32)].

    Levels must lie in [-2^(num_bits-1), 2^(num_bits-1)); num_bits is 4 or 8.
    """
    rows, columns = levels.shape
    words = packed_columns(columns, num_bits)
    codes: NDArray[np.uint8] = np.zeros((rows, words * 32 // num_bits), np.uint8)
    np.add(levels.view(np.uint8), np.uint8(1 << (num_bits - 1)), out=codes[:, :columns])
    if num_bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return codes.view("<i4").astype(np.int32, copy=False)


def unpack_levels(words: NDArray[np.int32], num_bits: int, columns: int) -> NDArray[np.int8]:
    """The int8 levels [rows, columns] of `pack_levels`' words."""
    stored = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    if num_bits == 4:
        stored = np.stack((stored & 15, stored >> 4), axis=-1).reshape(words.shape[0], -1)
    return (stored[:, :columns] - np.uint8(1 << (num_bits - 1))).view(np.int8)


def pack_zero_points(zero_point: NDArray[Any], num_bits: int) -> NDArray[np.int32]:
    """Pack signed zero points [out, groups] along out, into int32 [ceil(out * num_bits / 32), groups]."""
    across = np.ascontiguousarray(zero_point.T.astype(np.int8))
    return np.ascontiguousarray(pack_levels(across, num_bits).T)


def unpack_zero_points(words: NDArray[np.int32], num_bits: int, out_features: int) -> NDArray[np.int8]:
    """The int8 zero points [out, groups] of `pack_zero_points`' words."""
    return np.ascontiguousarray(unpack_levels(words.T, num_bits, out_features).T)
