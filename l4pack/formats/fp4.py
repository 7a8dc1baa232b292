"""compressed-tensors' four-bit floats, two E2M1 codes in a byte: NVFP4, groups of 16 with E4M3 scales over a global scale,
and MXFP4, groups of 32 with powers of two for scales.

A global scale divides: a weight is code * scale / weight_global_scale, and so with inputs and `input_global_scale`. vLLM
0.33 asks for the latter where routed experts are weight-only too, and does not use it (`compressed_tensors_moe_w4a4_nvfp4`).
"""

from __future__ import annotations

from l4pack.formats.configuration import Activations
from l4pack.formats.format import Accepts, Format, Holds, Piece
from l4pack.quant.grid import NumberType
from l4pack.quant.scheme import Strategy
from l4pack.quant.suffixes import Suffix

_GROUP, _TENSOR_GROUP = Strategy.GROUP, Strategy.TENSOR_GROUP

NVFP4_PACK_QUANTIZED = Format(
    name="nvfp4-pack-quantized",
    title="compressed-tensors nvfp4-pack-quantized, FP4 weights in groups of 16 with FP8 scales",
    accepts=Accepts(
        type=NumberType.FLOAT,
        num_bits=[4],
        strategies=[_TENSOR_GROUP],
        group_sizes=[16],
        symmetric=[True],
        activations=[Activations.NONE, Activations.LOCAL_GROUP],
    ),
    pieces=(
        Piece(suffix=Suffix.PACKED, holds=Holds.VALUES, dtype="U8", shape={_TENSOR_GROUP: ["out", "in/byte"]}),
        Piece(suffix=Suffix.SCALE, holds=Holds.SCALE, dtype="F8_E4M3", shape={_TENSOR_GROUP: ["out", "in/group"]}),
        Piece(suffix=Suffix.GLOBAL_SCALE, holds=Holds.GLOBAL_SCALE, dtype="F32", shape={_TENSOR_GROUP: ["1"]}),
        Piece(
            suffix=Suffix.INPUT_GLOBAL_SCALE,
            holds=Holds.UNIT_INPUT_SCALE,
            dtype="F32",
            shape={_TENSOR_GROUP: ["1"]},
            when="weight_only_expert",
        ),
        Piece(
            suffix=Suffix.INPUT_GLOBAL_SCALE,
            holds=Holds.INPUT_SCALE,
            dtype="F32",
            shape={_TENSOR_GROUP: ["1"]},
            when="static_activations",
        ),
    ),
)

MXFP4_PACK_QUANTIZED = Format(
    name="mxfp4-pack-quantized",
    title="compressed-tensors mxfp4-pack-quantized, FP4 weights in groups of 32 with powers of two for scales",
    accepts=Accepts(
        type=NumberType.FLOAT,
        num_bits=[4],
        strategies=[_GROUP],
        group_sizes=[32],
        symmetric=[True],
        activations=[Activations.NONE],
    ),
    pieces=(
        Piece(suffix=Suffix.PACKED, holds=Holds.VALUES, dtype="U8", shape={_GROUP: ["out", "in/byte"]}),
        Piece(suffix=Suffix.SCALE, holds=Holds.SCALE, dtype="U8", shape={_GROUP: ["out", "in/group"]}),
    ),
)
