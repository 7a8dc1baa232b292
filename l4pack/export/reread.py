"""Whether a GGUF file's blocks or MLX's words hold a matrix' own codes and scales: integers beside integers, no weight is made.

A weight is its scale times what its code stands for, in the file as in the artifact, so weights are equal where both are.
Layouts are read from ggml's `ggml-common.h` once more here, not from what wrote them; `tests/export/test_reread.py` holds
them against the decoder of the gguf library for every code. It takes a tenth of that decoder's time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from l4pack.formats.carrier import Carrier, SolvedRows
from l4pack.formats.ggml import BLOCK, MXFP4, Q4_0, Q4_K, Q8_0
from l4pack.formats.mlx import Affine, Microscaling
from l4pack.quant.floats import HELD_AS, widen
from l4pack.quant.nibbles import HALF_BLOCK, HALF_RUN, differing, halves_differ
from l4pack.quant.superblocks import HEADER, SUPER

_SIGN = np.uint8(0x80)  # between a code of eight bits that begins at 0 and one in two's complement


def same_codes(carrier: Carrier, raw: NDArray[np.uint8], rows: SolvedRows) -> bool | None:
    """Whether `raw`, uint8 [rows, bytes of a row], holds them; None for a type that is not read here."""
    first = {Q4_0: 2, Q8_0: 2, MXFP4: 1, Q4_K: HEADER}.get(carrier)
    if first is None:
        return None
    count, blocks = len(raw), rows.columns // (SUPER if carrier is Q4_K else BLOCK)
    held = raw.reshape(count, blocks, -1)
    codes = np.ascontiguousarray(rows.quantized.values).view(np.uint8)
    if carrier is MXFP4 or carrier is Q4_K:
        scales = rows.quantized.scale.reshape(count, blocks, first)
        half = HALF_RUN if carrier is Q4_K else HALF_BLOCK
        return np.array_equal(held[..., :first], scales) and not differing(codes, held, first, half)
    in_group = max(1, rows.scheme.group_columns(rows.columns) // BLOCK)
    if halves_differ(held, widen(rows.quantized.scale), in_group):
        return False
    if carrier is Q4_0:
        return not differing(codes, held, first, HALF_BLOCK)
    return np.array_equal(held[..., first:] ^ _SIGN, codes.reshape(count, blocks, BLOCK))


def same_words(carrier: Affine | Microscaling, raw: Sequence[NDArray[np.uint8]], rows: SolvedRows) -> bool | None:
    """Whether MLX's words, scales and biases, uint8 [rows, bytes of a row] each, hold them.

    None where a product of scale and code may be rounded, of scales in float32, and with zero points.
    """
    codes = np.ascontiguousarray(rows.quantized.values).view(np.uint8).reshape(len(raw[0]), -1)
    if not np.array_equal(raw[0], codes):
        return False
    if isinstance(carrier, Microscaling):
        return np.array_equal(raw[1], rows.quantized.scale)
    if carrier.dtype == "F32" or rows.quantized.zero_point is not None:
        return None
    scale, bias = (widen(part.view(HELD_AS[carrier.dtype])) for part in raw[1:])
    wanted = np.repeat(widen(rows.quantized.scale), rows.scheme.group_columns(rows.columns) // carrier.group, axis=1)
    half = np.float32(1 << (carrier.bits - 1))
    return np.array_equal(scale, wanted) and np.array_equal(bias, -half * wanted)
