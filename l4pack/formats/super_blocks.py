"""l4pack's own home for ggml's Q4_K: levels as in `pack-quantized`, and the 16 bytes of scales that a super-block has in GGUF.

No runtime loads it as it lies there, and none is to try: compressed-tensors has no such format and no such kind of scale, so
what reads a configuration through it refuses it by those names. `l4pack export --to gguf` puts the same bytes into a GGUF file.
"""

from __future__ import annotations

from l4pack.formats.configuration import Activations
from l4pack.formats.format import Accepts, Format, Holds, Piece
from l4pack.quant.grid import NumberType, ScaleDtype
from l4pack.quant.scheme import SUPER_BLOCK, Strategy
from l4pack.quant.suffixes import Suffix

_GROUP = Strategy.GROUP

GGML_Q4_K = Format(
    name="ggml-q4_k",
    title="ggml's Q4_K for GGUF files, int4 in groups of 32 with 6-bit scales and minima in super-blocks of 256",
    accepts=Accepts(
        type=NumberType.INT,
        num_bits=[4],
        strategies=[_GROUP],
        group_sizes=[SUPER_BLOCK[1]],
        symmetric=[False],
        scale_dtype=ScaleDtype.Q4_K,
        activations=[Activations.NONE],
    ),
    pieces=(
        Piece(suffix=Suffix.PACKED, holds=Holds.VALUES, dtype="I32", shape={_GROUP: ["out", "in/pack"]}),
        Piece(suffix=Suffix.SCALE, holds=Holds.SCALE, dtype="U8", shape={_GROUP: ["out", "in/header"]}),
    ),
)
