"""compressed-tensors' `float-quantized`: FP8 weights, a byte each, with scales by row, matrix or block."""

from __future__ import annotations

from l4pack.formats.configuration import Activations
from l4pack.formats.format import Accepts, Format, Holds, Piece
from l4pack.quant.grid import NumberType
from l4pack.quant.scheme import Strategy
from l4pack.quant.suffixes import Suffix

_CHANNEL, _TENSOR, _BLOCK = Strategy.CHANNEL, Strategy.TENSOR, Strategy.BLOCK

FLOAT_QUANTIZED = Format(
    name="float-quantized",
    title="compressed-tensors float-quantized, FP8 E4M3 weights",
    accepts=Accepts(
        type=NumberType.FLOAT,
        num_bits=[8],
        strategies=[_CHANNEL, _TENSOR, _BLOCK],
        block_structures=[(128, 128)],
        symmetric=[True],
        activations=[way for way in Activations if way is not Activations.LOCAL_GROUP],
    ),
    pieces=(
        Piece(
            suffix=Suffix.WEIGHT,
            holds=Holds.VALUES,
            dtype="F8_E4M3",
            shape={_CHANNEL: ["out", "in"], _TENSOR: ["out", "in"], _BLOCK: ["out", "in"]},
        ),
        Piece(
            suffix=Suffix.SCALE,
            holds=Holds.SCALE,
            dtype="scale",
            shape={_CHANNEL: ["out", "1"], _TENSOR: ["1"], _BLOCK: ["out/rows", "in/columns"]},
        ),
        Piece(
            suffix=Suffix.INPUT_SCALE,
            holds=Holds.INPUT_SCALE,
            dtype="scale",
            shape={_CHANNEL: ["1"], _TENSOR: ["1"], _BLOCK: ["1"]},
            when="static_activations",
        ),
    ),
)
