"""How many rows are computed at once: fixed by the device's kind and the matrix' width, whatever memory there is.

A row's product with a matrix, and a sum over rows, round differently when other rows stand beside them; cut at places that
memory decides, an artifact's bytes and an evaluation's figures would depend on it. Measured on a CPU, at widths of 4,096 to
8,192: 256 rows at once take 5 to 18 % more time than 2,048, by phase. A GPU is not filled by so few, nor is a CPU at a width
of 256, where what starting an operation costs is most of it: narrow rows are taken more at a time, as many as weigh the same.
"""

from __future__ import annotations

CPU_ROWS, GPU_ROWS = 256, 2048
NUMBERS_AT_ONCE = 1 << 20  # 4 MB of float32, about a core's second-level cache and a half
MOST_ROWS = 4096
HEAD_ROWS = 8192  # of the vocabulary: the head is walked in chunks
TOKENS_SCORED = 512  # tokens whose logits over a chunk are there at once
IMAGE_TILES = 4  # of images: their states are there together, and the vision tower's weights are read for them
TILE_OUTPUTS = 256  # of a matrix that stays as it is stored: a float32 tile of them is 5 to 8 MB


def rows_at_once(device: str, width: int) -> int:
    """Tokens run, and output rows solved, at once on a kind of device (`cpu` or `cuda`), each of `width` numbers."""
    least = CPU_ROWS if device == "cpu" else GPU_ROWS
    narrow = NUMBERS_AT_ONCE // max(1, width) // CPU_ROWS * CPU_ROWS
    return max(least, min(MOST_ROWS, narrow))


# Hidden states that stay on a device are put on disk after every so many layers; odd, so that sides take turns.
LAYERS_KEPT = 3
