"""How many rows are computed at once: a fixed number, whatever memory there is.

A row's product with a matrix, and a sum over rows, round differently when other rows stand beside them; cut at places that
memory decides, an artifact's bytes and an evaluation's figures would depend on it. Measured on a CPU, at widths of 4,096 to
8,192: 256 rows at once take 5 to 18 % more time than 2,048, by phase. A GPU is not filled by so few.
"""

from __future__ import annotations

CPU_ROWS, GPU_ROWS = 256, 2048


def rows_at_once(device: str) -> int:
    """Tokens run, and output rows solved, at once on a kind of device (`cpu` or `cuda`)."""
    return CPU_ROWS if device == "cpu" else GPU_ROWS
