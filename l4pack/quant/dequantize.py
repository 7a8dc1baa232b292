"""The float32 weights that a quantized matrix stands for, on the CPU without torch."""

from __future__ import annotations

import numpy as np

from l4pack.quant import cpu
from l4pack.quant.floats import Float32Array, widen
from l4pack.quant.packing import unpack_zero_points
from l4pack.quant.quantize import spread
from l4pack.quant.quantized import Quantized
from l4pack.quant.scheme import Scheme


def dequantize(quantized: Quantized, scheme: Scheme, out_features: int, in_features: int) -> Float32Array:
    """(level - zero point) * scale, or the E4M3 value times scale: float32 [out_features, in_features].

    Products are exact in float32 for bfloat16 and float16 scales; a runtime then rounds them to its own dtype.
    """
    group = scheme.group_columns(in_features)
    shape = (out_features, -(-in_features // group))
    scale = spread(widen(quantized.scale), scheme, shape)
    out = np.empty((out_features, in_features), np.float32)
    values = np.ascontiguousarray(quantized.values).view(np.uint8)
    if not scheme.grid.even:
        cpu.dequantize_table(values, np.array(scheme.grid.values, np.float32), group, scale, out)
        return out
    zero_point = np.zeros_like(scale)
    if quantized.zero_point is not None:
        zero_point = unpack_zero_points(quantized.zero_point, scheme.num_bits, out_features).astype(np.float32)
    cpu.dequantize_int(values, scheme.num_bits, group, scale, zero_point, out)
    return out
