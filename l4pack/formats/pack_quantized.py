"""compressed-tensors' `pack-quantized`: integers in int32 words along a matrix's inputs, zero points along its outputs."""

from __future__ import annotations

from l4pack.formats.configuration import Activations
from l4pack.formats.format import Accepts, Format, Holds, Piece
from l4pack.quant.grid import NumberType
from l4pack.quant.scheme import Strategy
from l4pack.quant.suffixes import Suffix

_GROUP, _CHANNEL = Strategy.GROUP, Strategy.CHANNEL

PACK_QUANTIZED = Format(
    name="pack-quantized",
    title="compressed-tensors pack-quantized, integer weights packed into int32 words",
    accepts=Accepts(
        type=NumberType.INT,
        num_bits=[4, 8],
        strategies=[_GROUP, _CHANNEL],
        group_sizes=[32, 64, 128],
        symmetric=[True, False],
        activations=[Activations.NONE],
    ),
    pieces=(
        Piece(
            suffix=Suffix.PACKED,
            holds=Holds.VALUES,
            dtype="I32",
            shape={_GROUP: ["out", "in/pack"], _CHANNEL: ["out", "in/pack"]},
        ),
        Piece(
            suffix=Suffix.SCALE,
            holds=Holds.SCALE,
            dtype="scale",
            shape={_GROUP: ["out", "in/group"], _CHANNEL: ["out", "1"]},
        ),
        Piece(
            suffix=Suffix.ZERO_POINT,
            holds=Holds.ZERO_POINT,
            dtype="I32",
            shape={_GROUP: ["out/pack", "in/group"], _CHANNEL: ["out/pack", "1"]},
            when="asymmetric",
        ),
        Piece(suffix=Suffix.SHAPE, holds=Holds.SHAPE, dtype="I64", shape={_GROUP: ["2"], _CHANNEL: ["2"]}),
    ),
)
