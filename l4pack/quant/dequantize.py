"""The float32 weights that a quantized matrix stands for, on the CPU without torch."""

from __future__ import annotations

import numpy as np

from l4pack.quant import cpu, superblocks
from l4pack.quant.floats import Float32Array, widen
from l4pack.quant.packing import unpack_zero_points
from l4pack.quant.quantize import spread
from l4pack.quant.quantized import Quantized
from l4pack.quant.scales import values_of
from l4pack.quant.scheme import Scheme


def scales_of(quantized: Quantized, scheme: Scheme) -> Float32Array:
    """What codes are multiplied by, float32 in the shape of the stored scales; [out, groups] of super-blocks."""
    if scheme.super_blocked:
        return superblocks.values_of(quantized.scale)[0]
    if scheme.coded_scales:
        return values_of(quantized.scale, scheme.scale_dtype, quantized.over)
    return widen(quantized.scale)


def zero_points_of(quantized: Quantized, scheme: Scheme, out_features: int) -> Float32Array | None:
    """The level that stands for zero in each group, float32 [out, groups]; None for symmetric schemes.

    Where minima are stored, no level need be zero: what is given for it lies between two.
    """
    if scheme.super_blocked:
        scale, minimum = superblocks.values_of(quantized.scale)
        return minimum / scale + np.float32(superblocks.ZERO_POINT)
    if quantized.zero_point is None:
        return None
    return unpack_zero_points(quantized.zero_point, scheme.num_bits, out_features).astype(np.float32)


class Dequantizer:
    """(level - zero point) * scale, or the float of a code times scale, of any rows of one matrix.

    Products are exact in float32 for bfloat16 and float16 scales; a runtime then rounds them to its own dtype. Of
    super-blocks it is scale * code - minimum, rounded once to float32, as ggml has it.
    """

    def __init__(self, quantized: Quantized, scheme: Scheme, out_features: int, in_features: int) -> None:
        self.shape = out_features, in_features
        self._bits, self._group = scheme.num_bits, scheme.group_columns(in_features)
        groups = (out_features, -(-in_features // self._group))
        self._scale = spread(scales_of(quantized, scheme), scheme, groups)
        self._codes = np.ascontiguousarray(quantized.values).view(np.uint8)
        self._table = None if scheme.grid.even else np.array(scheme.grid.values, np.float32)
        self._minimum = superblocks.values_of(quantized.scale)[1] if scheme.super_blocked else None
        zero_point = None if self._table is not None else zero_points_of(quantized, scheme, out_features)
        self._zero_point = np.zeros_like(self._scale) if zero_point is None else zero_point

    def rows(self, rows: slice, out: Float32Array) -> None:
        """Write some rows into `out`, float32 [rows, in_features]."""
        codes, scale = self._codes[rows], self._scale[rows]
        if self._minimum is not None:
            superblocks.dequantize(codes, scale, self._minimum[rows], out)
        elif self._table is not None:
            cpu.dequantize_table(codes, self._bits, self._table, self._group, scale, out)
        else:
            cpu.dequantize_int(codes, self._bits, self._group, scale, self._zero_point[rows], out)

    def whole(self) -> Float32Array:
        """All rows, float32 [out_features, in_features]."""
        out = np.empty(self.shape, np.float32)
        self.rows(slice(None), out)
        return out


def dequantize(quantized: Quantized, scheme: Scheme, out_features: int, in_features: int) -> Float32Array:
    """float32 [out_features, in_features], all rows of a `Dequantizer`."""
    return Dequantizer(quantized, scheme, out_features, in_features).whole()
