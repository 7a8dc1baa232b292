"""Two-sided rounding: GPTQ that weighs a matrix' outputs as well as its inputs.

The loss is tr(H_O R H_I R^T) (YAQA, Tseng et al. 2025, https://arxiv.org/abs/2505.22988): R [out, in] is what rounding leaves
of the target, H_I the second moments of the inputs, and H_O [out, out] those of the end loss' gradients with respect to the
outputs; H_O = 1 is GPTQ. With H_I^-1 = U_I^T U_I and H_O^-1 = U_O^T U_O, both of damped matrices, the errors E of a nested
solve, over the columns and within each over the rows, satisfy

    R = U_O^T E U_I,    tr(H_O R H_I R^T) = tr(E E^T),    H_O R H_I = U_O^-1 E U_I^-T.

What a weight should be depends on the errors above it and left of it alone. So tiles are taken along the grid's diagonals,
all those of a diagonal side by side, and the rest learns of their errors by products: the rows below through U_O^T E, which
is kept, and the columns to the right through (U_O^T E) U_I, where U_O^T E is what E is for GPTQ. Sweeps of coordinate descent
go through the tiles of a block of columns in turn; the block's rows below learn of a tile's moves at once, the other columns
when the block has had its turn.

Here one matrix is solved on the CPU; `two_sided_batch` solves several on a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l4pack.quant import two_sided_tiles
from l4pack.quant.factor import Factor, factorize
from l4pack.quant.grid import Grid
from l4pack.quant.levels import level_dtype, rearranged
from l4pack.quant.solution import Rounded
from l4pack.quant.triangular import divide_by_upper, divide_by_upper_transposed
from l4pack.quant.two_sided_tiles import SolvedTile, TileScales

TILE = 128  # rows and columns of a tile

Tile = tuple[slice, slice]


@dataclass(frozen=True)
class Outputs:
    """H_O [out, out] with its dampening added, its mean diagonal 1 before that, and its factor."""

    damped: Tensor
    factor: Factor


def prepare_outputs(moments: Tensor, *, dampening: float, act_order: bool = True) -> Outputs | None:
    """Factor the moments [out, out] of gradients, of any scale, which are used up; None if no dampening is enough.

    An output that no gradient ever had counts as much as the mean. `dampening` is a fraction of the mean diagonal.
    """
    mean = moments.diagonal().mean()
    moments.div_(torch.where(mean > 0, mean, 1.0))
    factor = factorize(moments, act_order=act_order, dampening=dampening)
    if factor is None:
        return None
    moments.diagonal().add_(factor.added)
    return Outputs(moments, factor)


def solve_nested(
    target: Tensor, inputs: Factor, outputs: Outputs, start: Rounded, grid: Grid
) -> tuple[Rounded, Tensor]:
    """Round `target` [out, in] with the scales of `start`; also E [out, in], rows and columns in the order of their visits:
    the sum of its squares is the damped loss."""
    across, rows, columns = outputs.factor.upper, outputs.factor.order, inputs.order
    remaining = start.raised(target).index_select(0, rows).index_select(1, columns).to(across.dtype)
    carried, levels = torch.zeros_like(remaining), torch.empty(target.shape, dtype=level_dtype(grid))
    scales = _Scales(start, rows, columns)
    for tiles in diagonals(*target.shape):
        wanted = [remaining[tile] - carried[tile] @ inputs.upper[tile[1], tile[1]] for tile in tiles]
        for tile, solved in zip(tiles, _solve_tiles(tiles, wanted, inputs, outputs, scales, grid), strict=True):
            (own, block), errors = tile, solved.errors
            levels[tile] = solved.levels
            carried[own.stop :, block].addmm_(across[own, own.stop :].T, errors)
            left = carried[tile] + solved.left
            remaining[own, block.stop :].addmm_(left, inputs.upper[block, block.stop :], alpha=-1)
            remaining[tile] = errors
    back = torch.argsort(scales.rows), torch.argsort(scales.columns)
    levels = rearranged(levels, lambda kept: kept.index_select(0, back[0]).index_select(1, back[1]))
    return replace(start, levels=levels), remaining


@dataclass(frozen=True)
class _Scales:
    """Scales and zero points of single weights, of rows and columns in the order of their visits."""

    start: Rounded
    rows: Tensor
    columns: Tensor

    def of(self, tile: Tile) -> TileScales:
        """Those of a tile."""
        group = self.columns[tile[1]] // (self.start.levels.shape[1] // self.start.scale.shape[1])
        rows = self.rows[tile[0]]
        return TileScales(self.start.scale[rows], self.start.zero_point[rows], group)


def diagonals(rows: int, columns: int) -> Iterator[list[Tile]]:
    """The tiles of a grid's diagonals, from the first corner on: what a tile waits for lies on those before its own."""
    down, along = list(slices(rows)), list(slices(columns))
    for both in range(len(down) + len(along) - 1):
        first = max(0, both - len(along) + 1)
        yield [(down[k], along[both - k]) for k in range(first, min(both + 1, len(down)))]


def slices(size: int) -> Iterator[slice]:
    """The rows, or the columns, of each tile."""
    for first in range(0, size, TILE):
        yield slice(first, min(first + TILE, size))


def _solve_tiles(
    tiles: Sequence[Tile],
    wanted: Sequence[Tensor],
    inputs: Factor,
    outputs: Outputs,
    scales: _Scales,
    grid: Grid,
) -> list[SolvedTile]:
    """The tiles of a diagonal, shared between as many threads as torch uses."""
    across, upper = outputs.factor.upper, inputs.upper
    given = [
        (own, across[rows, rows], upper[block, block], scales.of((rows, block)), grid)
        for own, (rows, block) in zip(wanted, tiles, strict=True)
    ]
    threads = min(torch.get_num_threads(), len(tiles))
    if threads == 1:
        return [two_sided_tiles.solve_tile(*one) for one in given]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda one: two_sided_tiles.solve_tile(*one), given))


def pull_of_errors(errors: Tensor, inputs: Factor, outputs: Factor) -> Tensor:
    """H_O R H_I, both damped, [out, in] in the matrix' own order, from the errors of `solve_nested`, used up here."""
    divide_by_upper_transposed(errors, inputs.upper)
    divide_by_upper_transposed(errors.mT, outputs.upper)
    rows, columns = torch.argsort(outputs.order), torch.argsort(inputs.order)
    return errors.index_select(0, rows).index_select(1, columns)


def descend(
    pull: Tensor, hessian: Tensor, added: Tensor, outputs: Tensor, start: Rounded, grid: Grid, *, sweeps: int
) -> Rounded:
    """Sweeps of coordinate descent from `start`: no step raises the damped loss.

    `pull` [out, in] is H_O R H_I of `start`, and in the end of the result; `added` [in] is the damping that `hessian`
    lacks, `outputs` [out, out] has its own. Ends early where a whole sweep moves nothing.
    """
    levels = start.levels.clone()
    scales = _Scales(start, *(torch.arange(size) for size in levels.shape))
    across = [outputs[rows, rows] for rows in slices(len(levels))]
    for _ in range(sweeps):
        moved = False
        for block in slices(pull.shape[1]):
            part = hessian[block].clone()
            part[:, block].diagonal().add_(added[block])
            turn = _Turn(pull[:, block], part[:, block], outputs, levels[:, block])
            spread = turn.taken(across, scales, block, grid)
            if spread is not None:
                moved = True
                pull.addmm_(spread.T, part, alpha=-1)
        if not moved:
            break
    return replace(start, levels=levels)


@dataclass(frozen=True)
class _Turn:
    """One turn of a block's columns: their `pull` [out, n] before it, their part of H_I [n, n], damped like `outputs`
    [out, out], and their levels."""

    pull: Tensor
    inputs: Tensor
    outputs: Tensor
    levels: Tensor

    def taken(self, across: Sequence[Tensor], scales: _Scales, block: slice, grid: Grid) -> Tensor | None:
        """Move levels, one tile after the other: (H_O times how values changed)^T [n, out], None where nothing moved."""
        spread: Tensor | None = None
        for rows, own in zip(slices(len(self.levels)), across, strict=True):
            pull = self.pull[rows]
            if spread is not None:
                pull = torch.addmm(pull, spread[:, rows].T, self.inputs, alpha=-1)
            own_scales = scales.of((rows, block))
            change = two_sided_tiles.descend_tile(self.levels[rows], pull, own, self.inputs, own_scales, grid)
            if bool(change.any()):
                spread = spread if spread is not None else torch.zeros_like(self.pull.T)
                self._add(spread, change, rows)
        return spread

    def _add(self, spread: Tensor, change: Tensor, rows: slice) -> None:
        """Add (H_O C)^T for changes C [m, n] of some rows, of which few rows and columns have any."""
        own, columns = change.any(1).nonzero()[:, 0], change.any(0).nonzero()[:, 0]
        few = change[own][:, columns].T
        spread.index_add_(0, columns, few @ self.outputs[rows].index_select(0, own))


def loss_of(residual: Tensor, inputs: Factor, outputs: Factor) -> float:
    """tr(H_O R H_I R^T) of R = `residual` [out, in], both damped: the sum of squares of E = U_O^-T R U_I^-1."""
    errors = residual.index_select(0, outputs.order).index_select(1, inputs.order)
    divide_by_upper(errors, inputs.upper)
    divide_by_upper(errors.mT, outputs.upper)
    return float(product_sum(errors, errors))


def product_sum(left: Tensor, right: Tensor) -> Tensor:
    """The sum of the products of two matrices' elements, rows in float32, their sums in float64."""
    return (left * right).sum(1).double().sum()
