"""The column loops of `gptq_columns` as one kernel each, in Triton, which comes with torch for CUDA.

A program has some rows of one matrix, and a block's columns of them in registers. Every operation is that of the torch
loop, each rounded once: products are not fused with sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # of a matrix in one program: with 128 columns, 8 numbers of each array a thread


def _nearest(ratio: tl.tensor, zero_point: tl.tensor, lowest: tl.tensor, highest: tl.tensor) -> tl.tensor:
    """The level of a float32 value / scale: halves go to even, as adding 1.5 x 2^23 rounds them."""
    ratio = tl.minimum(tl.maximum(ratio, -1048576.0), 1048576.0)
    rounded = (ratio + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded + zero_point, lowest), highest)


def _solve_rows(
    block: tl.tensor,
    upper: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    levels: tl.tensor,
    errors: tl.tensor,
    rows: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    COLUMNS: tl.constexpr,  # noqa: N803
    TOGETHER: tl.constexpr,  # noqa: N803
) -> None:
    """See `gptq_columns.solve_block`."""
    matrix = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    column = tl.arange(0, COLUMNS)
    start = (matrix * rows + row) * COLUMNS
    place = start[:, None] + column[None, :]
    there = row < rows
    here = there[:, None]
    tile = tl.load(block + place, mask=here, other=0.0)
    corner = upper + matrix * COLUMNS * COLUMNS
    for i in range(COLUMNS):
        own = column[None, :] == i
        w = tl.sum(tl.where(own, tile, 0.0), 1)
        s = tl.load(scale + start + i, mask=there, other=1.0)
        z = tl.load(zero_point + start + i, mask=there, other=0.0)
        level = nearest_level(tl.div_rn(w, s), z, lowest, highest)
        error = tl.div_rn((z - level) * s + w, tl.load(corner + i * COLUMNS + i))
        factors = tl.load(corner + i * COLUMNS + column)
        tile = tl.where(column[None, :] > i, tile - error[:, None] * factors[None, :], tile)
    # A column stayed as it was at its turn.
    scales = tl.load(scale + place, mask=here, other=1.0)
    zeros = tl.load(zero_point + place, mask=here, other=0.0)
    found = nearest_level(tl.div_rn(tile, scales), zeros, lowest, highest)
    turns = tl.load(corner + column * COLUMNS + column)[None, :] + tl.zeros_like(tile)
    tl.store(levels + place, found, mask=here)
    tl.store(errors + place, tl.div_rn((zeros - found) * scales + tile, turns), mask=here)


def _descend_rows(
    levels: tl.tensor,
    pull: tl.tensor,
    hessian: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    new: tl.tensor,
    changes: tl.tensor,
    gain: tl.tensor,
    rows: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    COLUMNS: tl.constexpr,  # noqa: N803
    TOGETHER: tl.constexpr,  # noqa: N803
) -> None:
    """See `gptq_columns.descend_block`."""
    matrix = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    column = tl.arange(0, COLUMNS)
    start = (matrix * rows + row) * COLUMNS
    place = start[:, None] + column[None, :]
    there = row < rows
    here = there[:, None]
    tile = tl.load(pull + place, mask=here, other=0.0)
    pulls, found = tl.zeros_like(tile), tl.zeros_like(tile)
    corner = hessian + matrix * COLUMNS * COLUMNS
    for i in range(COLUMNS):
        own = column[None, :] == i
        p = tl.sum(tl.where(own, tile, 0.0), 1)
        o = tl.load(levels + start + i, mask=there, other=0.0)
        s = tl.load(scale + start + i, mask=there, other=1.0)
        z = tl.load(zero_point + start + i, mask=there, other=0.0)
        wanted = tl.div_rn(p, tl.load(corner + i * COLUMNS + i)) + (o - z) * s
        level = nearest_level(tl.div_rn(wanted, s), z, lowest, highest)
        factors = tl.load(corner + i * COLUMNS + column)
        tile -= ((level - o) * s)[:, None] * factors[None, :]
        pulls = tl.where(own, p[:, None], pulls)
        found = tl.where(own, level[:, None], found)
    old = tl.load(levels + place, mask=here, other=0.0)
    moved = (found - old) * tl.load(scale + place, mask=here, other=1.0)
    curvature = tl.load(corner + column * COLUMNS + column)[None, :].to(tl.float64)
    wide = moved.to(tl.float64)
    tl.store(new + place, found, mask=here)
    tl.store(changes + place, moved, mask=here)
    tl.store(gain + matrix * rows + row, tl.sum(wide * (2 * pulls.to(tl.float64) - wide * curvature), 1), mask=there)


nearest_level: Any = triton.jit(_nearest)
_solve: Any = triton.jit(_solve_rows)
_descend: Any = triton.jit(_descend_rows)


def solve_block(
    block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int
) -> tuple[Tensor, Tensor]:
    """See `gptq_columns.solve_block`: float32 blocks [matrices, out, n], n a power of two."""
    given = [part.contiguous() for part in (block, upper, scale, zero_point)]
    levels, errors = (torch.empty_like(given[0]) for _ in range(2))
    _launch(_solve, [*given, levels, errors], block.shape, num_bits)
    return levels, errors


def descend_block(
    levels: Tensor, pull: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `gptq_columns.descend_block`: float32 blocks [matrices, out, n], n a power of two."""
    given = [part.contiguous() for part in (levels, pull, hessian, scale, zero_point)]
    new, changes = (torch.empty_like(given[0]) for _ in range(2))
    gain = torch.empty(pull.shape[:2], dtype=torch.float64, device=pull.device)
    _launch(_descend, [*given, new, changes, gain], pull.shape, num_bits)
    return new, changes, gain


def _launch(kernel: Any, tensors: list[Tensor], shape: torch.Size, num_bits: int) -> None:
    matrices, rows, columns = shape
    kernel[(triton.cdiv(rows, ROWS), matrices)](
        *tensors, rows, *limits(num_bits), COLUMNS=columns, TOGETHER=ROWS, enable_fp_fusion=False
    )


def limits(num_bits: int) -> tuple[float, float]:
    """The lowest and the highest level of integers."""
    return float(-(2 ** (num_bits - 1))), float(2 ** (num_bits - 1) - 1)
