"""MLX's quantized matrices: codes in 32-bit words along a matrix's inputs, which are the artifact's own, bit for bit.

In mode `affine` a weight is scale * code + bias; a symmetric level is its code less half the range, so the bias is the
scale times a power of two. In mode `mxfp4` scales are the artifact's E8M0 bytes. Layout: mlx `mlx/ops.cpp`, `quantize` and
`dequantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from l4pack.formats.carrier import Carrier, RowPart, SolvedRows
from l4pack.quant.dtypes import FloatName
from l4pack.quant.floats import HELD_AS, Float32Array, round_to_bfloat16, widen
from l4pack.quant.grid import E2M1, ScaleDtype
from l4pack.quant.packing import packed_columns, unpack_zero_points
from l4pack.quant.scheme import Scheme, Strategy

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUPS = (128, 64, 32)
WEIGHT, SCALES, BIASES = "weight", "scales", "biases"


@dataclass(frozen=True)
class Affine:
    """Integers of `bits` bits in groups of `group`, with scales and biases in `dtype`."""

    bits: int
    group: int
    dtype: FloatName
    mode: str = "affine"

    @property
    def name(self) -> str:
        """As `4 bit, groups of 128`."""
        return f"{self.bits} bit, groups of {self.group}"

    def parts(self, columns: int) -> tuple[RowPart, ...]:
        """Words, scales and biases."""
        words, groups = packed_columns(columns, self.bits), columns // self.group
        width = np.dtype(HELD_AS[self.dtype]).itemsize
        floats = (RowPart(suffix, self.dtype, groups, groups * width) for suffix in (SCALES, BIASES))
        return (RowPart(WEIGHT, "U32", words, 4 * words), *floats)

    def inexact(self, scale: Float32Array, zero_point: Float32Array | None) -> NDArray[Any]:
        """Where the scale's dtype does not have the bias."""
        bias = self._bias(scale, zero_point)
        lost: NDArray[Any] = widen(_stored(bias, self.dtype)) != bias
        return lost

    def encode(self, rows: SolvedRows) -> tuple[NDArray[Any], ...]:
        """int32 words [rows, words], scales and biases [rows, groups] as they are stored."""
        quantized, scheme, columns = rows.quantized, rows.scheme, rows.columns
        zero_point = None
        if quantized.zero_point is not None:
            zero_point = unpack_zero_points(quantized.zero_point, self.bits, len(quantized.values)).astype(np.float32)
        repeats = scheme.group_columns(columns) // self.group
        scale = widen(quantized.scale)
        bias = self._bias(scale, zero_point)
        made = (np.repeat(_stored(values, self.dtype), repeats, axis=1) for values in (scale, bias))
        return (quantized.values, *made)

    def _bias(self, scale: Float32Array, zero_point: Float32Array | None) -> Float32Array:
        """The weight of code 0, exact in float32."""
        half = np.float32(1 << (self.bits - 1))
        return -half * scale if zero_point is None else -(zero_point + half) * scale


@dataclass(frozen=True)
class Microscaling:
    """MXFP4: two E2M1 codes in a byte, groups of 32 with powers of two for scales."""

    bits: int = 4
    group: int = 32
    mode: str = "mxfp4"
    name: str = "MXFP4"

    def parts(self, columns: int) -> tuple[RowPart, ...]:
        """Words and scales; there are no biases."""
        words, groups = packed_columns(columns, self.bits), columns // self.group
        return (RowPart(WEIGHT, "U32", words, 4 * words), RowPart(SCALES, "U8", groups, groups))

    def inexact(self, scale: Float32Array, zero_point: Float32Array | None) -> NDArray[Any]:
        """Nowhere: both have the same scales."""
        del zero_point
        return np.zeros(scale.shape, np.bool_)

    def encode(self, rows: SolvedRows) -> tuple[NDArray[Any], ...]:
        """uint8 codes [rows, bytes of a row] and scales [rows, groups]."""
        return rows.quantized.values, rows.quantized.scale


ROUNDED_TO = Scheme(num_bits=8, strategy=Strategy.GROUP, group_size=32, scale_dtype=ScaleDtype.BFLOAT16)
"""What weights are rounded to where affine groups don't keep them and the user allows that."""


def carrier_of(scheme: Scheme, columns: int, scale: str) -> Carrier | str:
    """What carries a matrix of `columns` input features with scales in `scale` as it was solved, or why nothing does."""
    if scheme.grid is E2M1 and scheme.scale_dtype is ScaleDtype.E8M0:
        return Microscaling()
    if scheme.strategy is Strategy.TENSOR_GROUP:
        return "mlx-lm has a place for the global scales of NVFP4 in experts only"
    if not scheme.grid.even:
        return f"MLX's affine groups hold integers, not FP{scheme.num_bits}"
    if scheme.super_blocked:
        return "MLX's affine groups hold no 6-bit scales and minima"
    own = scheme.group_columns(columns)
    group = next((size for size in GROUPS if own % size == 0 and columns % own == 0), None)
    if group is None:
        return f"MLX's groups have {', '.join(map(str, sorted(GROUPS)))} weights, groups of {own} are not made of them"
    return Affine(scheme.num_bits, group, scheme.scale_float(cast("FloatName", scale)))


def _stored(values: Float32Array, dtype: FloatName) -> NDArray[Any]:
    """Rounded to nearest even where the dtype does not have them."""
    with np.errstate(over="ignore"):
        return round_to_bfloat16(values) if dtype == "BF16" else values.astype(HELD_AS[dtype])
