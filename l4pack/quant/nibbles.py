"""Four-bit codes from the order of int32 words into that of ggml's blocks, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.quant.codes import kernel

HALF = 8  # bytes that hold half of a block of 32 codes


@kernel
def interleave(packed: NDArray[np.uint8], blocks: NDArray[np.uint8], first: Any) -> None:
    """Codes of `packed` uint8 [rows, 16 * blocks], two neighbours a byte, into `blocks` uint8 [rows, blocks, bytes].

    From byte `first` of a block on, byte j holds code j of the block in its low half and code j + 16 in its high one.
    """
    for o in range(packed.shape[0]):
        for b in range(blocks.shape[1]):
            low = packed[o, 2 * HALF * b : 2 * HALF * b + HALF]
            high = packed[o, 2 * HALF * b + HALF : 2 * HALF * (b + 1)]
            target = blocks[o, b, first : first + 2 * HALF]
            for j in range(HALF):
                target[2 * j] = (low[j] & 15) | ((high[j] & 15) << 4)
                target[2 * j + 1] = (low[j] >> 4) | (high[j] & 0xF0)


@kernel
def differing(packed: NDArray[np.uint8], blocks: NDArray[np.uint8], first: Any) -> int:
    """0 where `blocks` hold the codes of `packed`, laid out as for `interleave`, and nothing of another one."""
    found = np.uint8(0)
    for o in range(packed.shape[0]):
        for b in range(blocks.shape[1]):
            held = blocks[o, b, first : first + 2 * HALF]
            low = packed[o, 2 * HALF * b : 2 * HALF * b + HALF]
            high = packed[o, 2 * HALF * b + HALF : 2 * HALF * (b + 1)]
            for j in range(HALF):
                here, there = held[2 * j], held[2 * j + 1]
                found |= ((here & 15) | ((there & 15) << 4)) ^ low[j]
                found |= ((here >> 4) | (there & 0xF0)) ^ high[j]
    return int(found)
