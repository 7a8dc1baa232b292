"""ggml's block types, which GGUF files hold: rows cut into blocks of 32 weights that share a scale.

Byte layouts and the order of codes: ggml `ggml-common.h` (`block_q4_0`, `block_q4_1`, `block_q8_0`) and `ggml-quants.c`.
The scale is an F16 number, so one in BF16 is kept where F16 has it: from 2^-17 to 65504.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from l4pack.formats.carrier import Carrier, RowPart, SolvedRows
from l4pack.quant.floats import Float32Array, widen
from l4pack.quant.grid import NumberType, ScaleDtype
from l4pack.quant.nibbles import HALF_BLOCK, HALF_RUN, interleave
from l4pack.quant.packing import unpack_levels, unpack_zero_points
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.quant.superblocks import HEADER, SUPER

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 32
_SCALE_BYTES = 2
_HALF_RANGE = 8  # a stored code of four bits is its level plus this


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types of blocks of 32 integers; `minimum`: weights are d * code + m, not d * (code - half)."""

    name: str
    bits: int
    minimum: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return _SCALE_BYTES * (2 if self.minimum else 1) + BLOCK * self.bits // 8

    def parts(self, columns: int) -> tuple[RowPart, ...]:
        """One tensor: the blocks of a row follow each other."""
        return (RowPart("", self.name, columns, columns // BLOCK * self.block_bytes),)

    def inexact(self, scale: Float32Array, zero_point: Float32Array | None) -> NDArray[Any]:
        """Where F16 does not have the scale, or the minimum (the weight of code 0)."""
        lost = _lost_in_f16(scale)
        return lost if zero_point is None else lost | _lost_in_f16(_minimum(scale, zero_point))

    def encode(self, rows: SolvedRows) -> tuple[NDArray[np.uint8]]:
        """uint8 [rows, bytes of a row]."""
        quantized, blocks = rows.quantized, rows.columns // BLOCK
        count = len(quantized.values)
        group = rows.scheme.group_columns(rows.columns)
        scale = widen(quantized.scale)
        made = np.empty((count, blocks, self.block_bytes), np.uint8)
        _put(made, 0, _each_block(scale, group, blocks))
        first = _SCALE_BYTES
        if self.minimum:
            assert quantized.zero_point is not None
            zero_point = unpack_zero_points(quantized.zero_point, self.bits, count).astype(np.float32)
            _put(made, first, _each_block(_minimum(scale, zero_point), group, blocks))
            first += _SCALE_BYTES
        if self.bits == 4:
            interleave(np.ascontiguousarray(quantized.values).view(np.uint8), made, first, HALF_BLOCK)
        else:
            levels = unpack_levels(quantized.values, self.bits, rows.columns)
            made[..., first:] = levels.reshape(count, blocks, BLOCK).view(np.uint8)
        return (made.reshape(count, -1),)


@dataclass(frozen=True)
class MicroscalingType:
    """ggml's MXFP4: a power of two, as its E8M0 byte, before 32 E2M1 codes; the artifact's own bytes in another order."""

    name: str = "MXFP4"

    def parts(self, columns: int) -> tuple[RowPart, ...]:
        """One tensor: the blocks of a row follow each other."""
        return (RowPart("", self.name, columns, columns // BLOCK * (1 + BLOCK // 2)),)

    def inexact(self, scale: Float32Array, zero_point: Float32Array | None) -> NDArray[Any]:
        """Nowhere: both have the same scales."""
        del zero_point
        return np.zeros(scale.shape, np.bool_)

    def encode(self, rows: SolvedRows) -> tuple[NDArray[np.uint8]]:
        """uint8 [rows, bytes of a row]."""
        scale = rows.quantized.scale
        made = np.empty((*scale.shape, 1 + BLOCK // 2), np.uint8)
        made[..., 0] = scale
        interleave(np.ascontiguousarray(rows.quantized.values).view(np.uint8), made, 1, HALF_BLOCK)
        return (made.reshape(len(made), -1),)


@dataclass(frozen=True)
class SuperBlockType:
    """ggml's Q4_K: the 16 bytes of scales of 256 weights, which the artifact has as they are, before four runs of 64 codes."""

    name: str = "Q4_K"

    def parts(self, columns: int) -> tuple[RowPart, ...]:
        """One tensor: the super-blocks of a row follow each other."""
        return (RowPart("", self.name, columns, columns // SUPER * (HEADER + SUPER // 2)),)

    def inexact(self, scale: Float32Array, zero_point: Float32Array | None) -> NDArray[Any]:
        """Nowhere: both have the same scales."""
        del zero_point
        return np.zeros(scale.shape, np.bool_)

    def encode(self, rows: SolvedRows) -> tuple[NDArray[np.uint8]]:
        """uint8 [rows, bytes of a row]."""
        headers = rows.quantized.scale
        count = len(headers)
        made = np.empty((count, rows.columns // SUPER, HEADER + SUPER // 2), np.uint8)
        made[..., :HEADER] = headers.reshape(count, -1, HEADER)
        interleave(np.ascontiguousarray(rows.quantized.values).view(np.uint8), made, HEADER, HALF_RUN)
        return (made.reshape(count, -1),)


Q4_K = SuperBlockType()
MXFP4 = MicroscalingType()
Q4_0, Q4_1, Q8_0 = BlockType("Q4_0", 4), BlockType("Q4_1", 4, minimum=True), BlockType("Q8_0", 8)
ROUNDED_TO = Scheme(num_bits=8, strategy=Strategy.GROUP, group_size=BLOCK, scale_dtype=ScaleDtype.FLOAT16)
"""What weights are rounded to where no type keeps them and the user allows that; Q8_0 carries it."""


def carrier_of(scheme: Scheme, columns: int) -> Carrier | str:
    """The type that carries a matrix of `columns` input features as it was solved, or why there is none."""
    if scheme.super_blocked:
        return Q4_K
    if scheme.num_bits == 4 and scheme.type is NumberType.FLOAT and scheme.strategy is Strategy.GROUP:
        return MXFP4
    if scheme.strategy is Strategy.TENSOR_GROUP:
        return "llama.cpp's Llama 4 ignores the global scales of NVFP4"
    if not scheme.grid.even:
        return f"ggml has no type for FP{scheme.num_bits}"
    group = scheme.group_columns(columns)
    if columns % BLOCK or (group % BLOCK and group < columns):
        return (
            f"ggml's blocks have {BLOCK} weights, and neither rows of {columns} nor groups of {group} are made of them"
        )
    if scheme.symmetric:
        return Q4_0 if scheme.num_bits == 4 else Q8_0
    return Q4_1 if scheme.num_bits == 4 else "ggml has no type for integers of 8 bits with a zero point"


def _minimum(scale: Float32Array, zero_point: Float32Array) -> Float32Array:
    """The weight of code 0, exact in float32."""
    return -(zero_point + np.float32(_HALF_RANGE)) * scale


def _lost_in_f16(values: Float32Array) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        lost: NDArray[Any] = values.astype(np.float16).astype(np.float32) != values
    return lost


def _each_block(values: Float32Array, group: int, blocks: int) -> NDArray[np.float16]:
    """float16 [rows, blocks] of one value a group; the same for every block of it."""
    with np.errstate(over="ignore"):
        return np.repeat(values.astype(np.float16), max(1, group // BLOCK), axis=1)[:, :blocks]


def _put(made: NDArray[np.uint8], first: int, values: NDArray[np.float16]) -> None:
    """One F16 number a block, from its byte `first` on; as one field, which is ten times as fast as two bytes."""
    rows, blocks, nbytes = made.shape
    field = np.dtype({"names": ["scale"], "formats": ["<f2"], "offsets": [first], "itemsize": nbytes})
    made.reshape(rows, blocks * nbytes).view(field)["scale"] = values
