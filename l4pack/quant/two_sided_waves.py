"""The inner loops of two-sided rounding for many tiles at once, in torch operations: as many, however many tiles there are.

Where Triton is there to compile it, a CUDA device carries out each loop as one kernel, see `two_sided_triton`.

What a weight should be depends on the errors above it and left of it alone, so that to solve a tile its diagonals can be taken
one after the other, all weights of one at once: m + n - 1 steps where `two_sided_tiles`, a weight after the other, takes m n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l4pack.quant.gptq_columns import compiles
from l4pack.quant.grid import Grid
from l4pack.quant.torch_ops import levels_of
from l4pack.quant.two_sided_tiles import SolvedTile

MOST = 128  # rows or columns of a tile that a kernel takes


def solve_tiles(
    wanted: Tensor, across: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> SolvedTile:
    """Round tiles [tiles, m, n] as `two_sided_tiles.solve_tile` does; levels are in the dtype of `wanted`.

    `across` [tiles, m, m] and `upper` [tiles, n, n] are their parts of U_O and U_I; `scale` and `zero_point` [tiles, m, n] are
    each weight's own.
    """
    if _as_a_kernel(wanted):
        from l4pack.quant import two_sided_triton

        return two_sided_triton.solve_tiles(wanted, across, upper, scale, zero_point, grid)
    return solve_tiles_torch(wanted, across, upper, scale, zero_point, grid)


def solve_tiles_torch(
    wanted: Tensor, across: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> SolvedTile:
    """`solve_tiles` in torch operations, for any device and dtype."""
    wanted, scale, zero_point = (part.flip(1) for part in (wanted, scale, zero_point))  # so that diagonals go down
    beside, above = upper.mT, across.flip(1, 2).mT
    turns, corners = (part.diagonal(dim1=-2, dim2=-1) for part in (above, beside))
    levels, errors, left = (torch.zeros_like(wanted, memory_format=torch.contiguous_format) for _ in range(3))
    height, width = wanted.shape[1:]
    for offset in range(1 - height, width):
        count = min(height, width - offset) - max(0, -offset)
        rows, columns = (slice(first, first + count) for first in (max(0, -offset), max(0, offset)))
        own, s, z = (part.diagonal(offset, -2, -1) for part in (wanted, scale, zero_point))
        own = own - (left[:, rows] * beside[:, columns]).sum(-1)
        aim = own - (errors.mT[:, columns] * above[:, rows]).sum(-1)
        level = levels_of(aim / s, grid, z)
        value = (level - z) * s
        levels.diagonal(offset, -2, -1).copy_(level)
        left.diagonal(offset, -2, -1).copy_((own - value) / corners[:, columns])
        errors.diagonal(offset, -2, -1).copy_((aim - value) / turns[:, rows])
    errors.div_(corners[:, None])
    return SolvedTile(*(part.flip(1) for part in (levels, errors, left)))


def descend_tiles(
    levels: Tensor, pull: Tensor, outputs: Tensor, inputs: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> Tensor:
    """Let the weights of tiles [tiles, m, n] take their best levels as `two_sided_tiles.descend_tile` does: by how much the
    values changed.

    `levels`, in the grid's `level_dtype`, are moved in place; `outputs` [tiles, m, m] and `inputs` [tiles, n, n] are the tiles' parts of H_O and H_I,
    both damped, and `pull` of H_O R H_I; `scale` and `zero_point` [tiles, m, n] are each weight's own.
    """
    if _as_a_kernel(pull):
        from l4pack.quant import two_sided_triton

        return two_sided_triton.descend_tiles(levels, pull, outputs, inputs, scale, zero_point, grid)
    return descend_tiles_torch(levels, pull, outputs, inputs, scale, zero_point, grid)


def descend_tiles_torch(
    levels: Tensor, pull: Tensor, outputs: Tensor, inputs: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> Tensor:
    """`descend_tiles` in torch operations, for any device and dtype: a weight of every tile after the other."""
    pull, changes = pull.clone(), torch.zeros_like(pull)
    curvature = outputs.diagonal(dim1=-2, dim2=-1)
    for j in range(pull.shape[-1]):
        old, own, s, z = levels[..., j].to(pull.dtype), pull[..., j], scale[..., j], zero_point[..., j]
        step = curvature * s
        wanted = own / (step * inputs[:, j, j, None]) + (old - z)
        level = _row_by_row(old, wanted, outputs * s[:, None] / step[..., None], z, grid)
        moved = (level - old) * s
        levels[..., j], changes[..., j] = level, moved
        pull[..., j + 1 :].baddbmm_(outputs @ moved[..., None], inputs[:, j : j + 1, j + 1 :], alpha=-1)
    return changes


def _row_by_row(old: Tensor, wanted: Tensor, pulls: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The best levels of a column [tiles, m], from `old` ones: each is `wanted`, used up here, to lie so far from its zero point
    if none above it moves, and less by what `pulls` [tiles, m, m] makes of those that do."""
    level = torch.empty_like(wanted)
    for i in range(wanted.shape[1]):
        level[:, i] = levels_of(wanted[:, i], grid, zero_point[:, i])
        moved = level[:, i] - old[:, i]
        wanted[:, i + 1 :].addcmul_(pulls[:, i + 1 :, i], moved[:, None], value=-1)
    return level


def _as_a_kernel(tiles: Tensor) -> bool:
    """Whether a real CUDA device has the tiles, in a shape and dtype that the kernels are for."""
    return tiles.dtype is torch.float32 and max(tiles.shape[1:]) <= MOST and compiles(tiles)
