"""Four-bit codes from the order of int32 words into that of ggml's blocks, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.quant.codes import kernel
from l4pack.quant.floats import Float32Array

HALF_BLOCK = 8  # bytes that hold half of a block of 32 codes
HALF_RUN = 16  # the same of the runs of 64 that a super-block of Q4_K is made of


@kernel
def interleave(packed: NDArray[np.uint8], blocks: NDArray[np.uint8], first: Any, half: int) -> None:
    """Codes of `packed` uint8 [rows, bytes], two neighbours a byte, into `blocks` uint8 [rows, blocks, bytes of a block].

    From byte `first` of a block on there are runs of 2 `half` bytes: of each, byte j holds code j in its low half and code
    j + 2 `half` in its high one.
    """
    runs = (blocks.shape[2] - first) // (2 * half)
    for o in range(packed.shape[0]):
        for b in range(blocks.shape[1]):
            for run in range(runs):
                start = 2 * half * (runs * b + run)
                low, high = packed[o, start : start + half], packed[o, start + half : start + 2 * half]
                target = blocks[o, b, first + 2 * half * run : first + 2 * half * (run + 1)]
                for j in range(half):
                    target[2 * j] = (low[j] & 15) | ((high[j] & 15) << 4)
                    target[2 * j + 1] = (low[j] >> 4) | (high[j] & 0xF0)


@kernel
def differing(packed: NDArray[np.uint8], blocks: NDArray[np.uint8], first: Any, half: int) -> int:
    """0 where `blocks` hold the codes of `packed`, laid out as `interleave` does it, and nothing of another one."""
    found = np.uint8(0)
    runs = (blocks.shape[2] - first) // (2 * half)
    for o in range(packed.shape[0]):
        for b in range(blocks.shape[1]):
            for run in range(runs):
                held = blocks[o, b, first + 2 * half * run : first + 2 * half * (run + 1)]
                start = 2 * half * (runs * b + run)
                low, high = packed[o, start : start + half], packed[o, start + half : start + 2 * half]
                for j in range(half):
                    here, there = held[2 * j], held[2 * j + 1]
                    found |= ((here & 15) | ((there & 15) << 4)) ^ low[j]
                    found |= ((here >> 4) | (there & 0xF0)) ^ high[j]
    return int(found)


_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def halves_differ(blocks: NDArray[np.uint8], wanted: Float32Array, in_group: int) -> bool:
    """Whether a block of `blocks` uint8 [rows, blocks, bytes of a block] begins with another F16 number than its group's.

    `wanted`: float32 [rows, groups], each of `in_group` blocks.
    """
    return bool(_unequal_halves(blocks, wanted, in_group, _HALVES))


@kernel
def _unequal_halves(blocks: NDArray[np.uint8], wanted: Float32Array, in_group: int, halves: Float32Array) -> int:
    """How many do."""
    found = 0
    for o in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            bits = np.uint16(blocks[o, b, 0]) | (np.uint16(blocks[o, b, 1]) << np.uint16(8))
            found += halves[bits] != wanted[o, b // in_group]
    return found
