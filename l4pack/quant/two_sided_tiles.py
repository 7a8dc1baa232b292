"""The inner loops of two-sided rounding: the weights of one tile in turn, by Numba kernels, whatever device has the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l4pack.quant.codes import KINDS, kept_level, kernel, least_apart, level_in, level_of
from l4pack.quant.gptq_blocks import NEARLY_HALF
from l4pack.quant.grid import Grid
from l4pack.quant.levels import level_dtype

FEW = 8  # rows after which all those below learn of their errors


@dataclass(frozen=True)
class SolvedTile:
    """A tile [m, n] once rounded: `levels` in the grid's `level_dtype`, its part of E, and `left`, its own part of U_O^T E."""

    levels: Tensor
    errors: Tensor
    left: Tensor


@dataclass(frozen=True)
class TileScales:
    """Scales and zero points [m, groups] of a tile's rows, and int64 [n] which group is each column's."""

    scale: Tensor
    zero_point: Tensor
    group: Tensor

    def arrays(self, dtype: torch.dtype) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
        """The three for a kernel that computes in `dtype`."""
        return self.scale.to(dtype).numpy(), self.zero_point.to(dtype).numpy(), self.group.numpy()


def solve_tile(tile: Tensor, across: Tensor, upper: Tensor, scales: TileScales, grid: Grid) -> SolvedTile:
    """Round the columns of a tile [m, n] in turn, and in each its rows; `across` [m, m] and `upper` [n, n] are its parts of
    U_O and U_I."""
    own = tile.T.clone(memory_format=torch.contiguous_format).numpy()
    rows, columns = (part.to(tile.dtype).contiguous().numpy() for part in (across, upper))
    levels, errors, left = (torch.empty(tile.T.shape, dtype=dtype) for dtype in (torch.int8, tile.dtype, tile.dtype))
    _solve(
        own,
        rows,
        columns,
        *scales.arrays(tile.dtype),
        grid.bits,
        KINDS[grid],
        levels.numpy(),
        errors.numpy(),
        left.numpy(),
    )
    return SolvedTile(levels.view(level_dtype(grid)).T, errors.T, left.T)


@kernel
def _pass_on(wanted: NDArray[Any], across: NDArray[Any], found: NDArray[Any], first: int, last: int) -> None:
    """Let the rows after some learn of the errors `found` in those, four at a time."""
    i = first
    while i + 4 <= last:
        a, b, c, d = found[i], found[i + 1], found[i + 2], found[i + 3]
        of_a, of_b, of_c, of_d = across[i], across[i + 1], across[i + 2], across[i + 3]
        for r in range(last, wanted.size):
            wanted[r] = wanted[r] - a * of_a[r] - b * of_b[r] - c * of_c[r] - d * of_d[r]
        i += 4
    while i < last:
        a, of_a = found[i], across[i]
        for r in range(last, wanted.size):
            wanted[r] -= a * of_a[r]
        i += 1


@kernel
def _solve(
    tile: NDArray[Any],
    across: NDArray[Any],
    upper: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    group: NDArray[np.int64],
    num_bits: int,
    kind: int,
    levels: NDArray[np.int8],
    errors: NDArray[Any],
    left: NDArray[Any],
) -> None:
    """`solve_tile` with columns outermost, [n, m]; `tile` is used up."""
    columns, rows = tile.shape
    found = np.empty(rows, tile.dtype)
    for j in range(columns):
        wanted = tile[j].copy()
        for first in range(0, rows, FEW):
            last = min(first + FEW, rows)
            for i in range(first, last):
                s, z = scale[i, group[j]], zero_point[i, group[j]]
                level = level_of(wanted[i] / s, z, num_bits, kind)
                value = (level - z) * s
                error = (wanted[i] - value) / across[i, i]
                levels[j, i], found[i] = kept_level(level, kind), error
                errors[j, i], left[j, i] = error / upper[j, j], (tile[j, i] - value) / upper[j, j]
                for r in range(i + 1, last):
                    wanted[r] -= error * across[i, r]
            _pass_on(wanted, across, found, first, last)
        own = left[j]
        for k in range(j + 1, columns):
            factor, other = upper[j, k], tile[k]
            for i in range(rows):
                other[i] -= own[i] * factor


def descend_tile(
    levels: Tensor, pull: Tensor, outputs: Tensor, inputs: Tensor, scales: TileScales, grid: Grid
) -> Tensor:
    """Let every weight of a tile [m, n] take its best level, column by column: by how much the values changed [m, n].

    `levels` [m, n] are moved in place; `outputs` [m, m] and `inputs` [n, n] are the tile's parts of H_O and H_I, both
    damped, and `pull` [m, n] of H_O R H_I.
    """
    moved, change = levels.T.contiguous().view(torch.int8), torch.zeros(pull.T.shape, dtype=pull.dtype)
    own = pull.T.clone(memory_format=torch.contiguous_format).numpy()
    across, along = (part.contiguous().numpy() for part in (outputs, inputs))
    _descend(moved.numpy(), own, across, along, *scales.arrays(pull.dtype), grid.bits, KINDS[grid], change.numpy())
    levels.copy_(moved.view(levels.dtype).T)
    return change.T


@kernel
def _descend(
    levels: NDArray[np.int8],
    pull: NDArray[Any],
    outputs: NDArray[Any],
    inputs: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    group: NDArray[np.int64],
    num_bits: int,
    kind: int,
    change: NDArray[Any],
) -> None:
    """`descend_tile` with columns outermost, [n, m]; `pull` is used up. Few weights move: only those are looked at that are
    pulled by nearly half a level."""
    columns, rows = pull.shape
    least = pull.dtype.type(NEARLY_HALF) * pull.dtype.type(least_apart(kind))
    curvature, spread = np.empty(rows, pull.dtype), np.empty(rows, pull.dtype)
    for j in range(columns):
        own, here = pull[j], inputs[j, j]
        found = np.int32(0)
        for i in range(rows):
            curvature[i] = outputs[i, i] * here
            found = np.int32(found | np.int32(abs(own[i]) > least * scale[i, group[j]] * curvature[i]))
        if found == 0:
            continue
        spread[:] = 0
        for i in range(rows):
            s, z = scale[i, group[j]], zero_point[i, group[j]]
            if abs(own[i]) <= least * s * curvature[i]:
                continue
            old = own.dtype.type(level_in(levels[j, i], kind))
            level = level_of(((old - z) * s + own[i] / curvature[i]) / s, z, num_bits, kind)
            if level == old:
                continue
            moved = (level - old) * s
            levels[j, i], change[j, i] = kept_level(level, kind), moved
            line = outputs[i]
            for r in range(rows):
                spread[r] += moved * line[r]
                own[r] -= moved * line[r] * here
        for k in range(j + 1, columns):
            factor, other = inputs[j, k], pull[k]
            for r in range(rows):
                other[r] -= spread[r] * factor
