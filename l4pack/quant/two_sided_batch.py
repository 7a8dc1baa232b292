"""Two-sided rounding of several matrices of equal shape at once: the same solution as `two_sided_gptq` of each, on a device.

As in `gptq_batch`, a device is asked nothing on the way, and what it is asked to do does not depend on how many matrices there
are. All tiles of a diagonal of the grid, of all matrices, are rounded side by side, see `two_sided_waves`; products are those
of `two_sided`, of all matrices at once. Sweeps take as many turns as there may be, for nobody asks whether anything moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from l4pack.quant import gptq_batch, two_sided_waves
from l4pack.quant.gptq import chosen
from l4pack.quant.gptq_batch import Factors, Problems, Solutions, all_finite, clear, columns_of, factorize
from l4pack.quant.grid import Grid
from l4pack.quant.levels import level_dtype, rearranged
from l4pack.quant.precision import whole_factors
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Kept, Rounded
from l4pack.quant.triangular import divide_by_upper, divide_by_upper_transposed, quadratic_form
from l4pack.quant.two_sided import Tile, diagonals, slices

CHOICES = (Kept.NESTED, Kept.GPTQ, Kept.RTN)  # in the order in which the first of the least losses is kept
AS_IT_WAS = CHOICES.index(Kept.GPTQ)


@dataclass(frozen=True)
class Outputs:
    """See `two_sided.Outputs`: of several matrices, `damped` [matrices, out, out]; bool [matrices] says which moments are
    `finite` and which could be factored. What is not has an identity's factor."""

    damped: Tensor
    factors: Factors
    finite: Tensor
    definite: Tensor

    def shared_by(self, matrices: int) -> Outputs:
        """Those of one matrix as those of several, in the same memory."""
        parts = (self.factors.upper, self.factors.order, self.factors.added, self.damped, self.finite, self.definite)
        upper, order, added, damped, *known = (part.expand(matrices, *part.shape[1:]) for part in parts)
        return Outputs(damped, Factors(upper, order, added), *known)


@whole_factors()
def prepare_outputs(moments: Tensor, fraction: Tensor, *, act_order: bool) -> Outputs:
    """See `two_sided.prepare_outputs`: factor moments [matrices, out, out], used up here, each with its own `fraction` of the
    mean diagonal [matrices] added."""
    finite = all_finite(moments)
    clear(moments, ~finite)
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    moments.div_(torch.where(mean > 0, mean, 1.0)[:, None, None])
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    factors, definite = factorize(moments, diagonal, fraction, act_order)
    diagonal.add_(factors.added)
    return Outputs(moments, factors, finite, definite)


def solve_nested(
    target: Tensor, inputs: Factors, outputs: Factors, start: Rounded, grid: Grid
) -> tuple[Rounded, Tensor]:
    """See `two_sided.solve_nested`: round `target` [matrices, out, in] with the scales of `start`; also E, rows and columns in
    the order of their visits."""
    permuted = columns_of(_rows_of(start.raised(target), outputs.order), inputs.order).to(inputs.upper.dtype)
    nested = _Nested(
        permuted,
        torch.zeros_like(permuted),
        torch.empty(target.shape, dtype=level_dtype(grid), device=target.device),
        inputs.upper,
        outputs.upper,
        _Scales.of(start, permuted.dtype, outputs.order, inputs.order),
    )
    for tiles in diagonals(*target.shape[-2:]):
        for _, alike in groupby(sorted(tiles, key=_size), key=_size):
            nested.solve(list(alike), grid)
    back = torch.argsort(outputs.order), torch.argsort(inputs.order)
    levels = rearranged(nested.levels, lambda kept: columns_of(_rows_of(kept, back[0]), back[1]))
    return replace(start, levels=levels), nested.remaining


def _rows_of(matrices: Tensor, order: Tensor) -> Tensor:
    """Rows of [matrices, out, n] in an order of each one's own, [matrices, out]."""
    return matrices.gather(1, order[:, :, None].expand(-1, -1, matrices.shape[2]))


def _size(tile: Tile) -> tuple[int, int]:
    rows, columns = tile
    return rows.stop - rows.start, columns.stop - columns.start


@dataclass(frozen=True)
class _Scales:
    """Scales and zero points [matrices, out, groups] of rows in the order of their visits, and int64 [matrices, in] which
    group is each column's."""

    scale: Tensor
    zero_point: Tensor
    group: Tensor

    @classmethod
    def of(cls, start: Rounded, dtype: torch.dtype, rows: Tensor, columns: Tensor) -> _Scales:
        size = start.levels.shape[-1] // start.scale.shape[-1]
        scale, zero_point = (_rows_of(part.to(dtype), rows) for part in (start.scale, start.zero_point))
        return cls(scale, zero_point, columns // size)

    def each(self, tiles: Sequence[Tile]) -> tuple[Tensor, Tensor]:
        """Those of each weight of tiles of one size, [matrices x tiles, m, n]."""
        height = _size(tiles[0])[0]
        group = _stacked(self.group[:, None, block] for _, block in tiles).expand(-1, height, -1)
        parts = (_stacked(part[:, rows] for rows, _ in tiles) for part in (self.scale, self.zero_point))
        scale, zero_point = (part.gather(2, group) for part in parts)
        return scale, zero_point


def _stacked(parts: Iterable[Tensor]) -> Tensor:
    """Tiles [matrices, m, n] of one size as [matrices x tiles, m, n]."""
    return torch.stack(list(parts), 1).flatten(0, 1)


@dataclass(frozen=True)
class _Nested:
    """Matrices [matrices, out, in] on their way through a nested solve, in the order of visits: what `remains` to be met, E
    where that is done; U_O^T E of the rows above; levels; and the factors of both sides."""

    remaining: Tensor
    carried: Tensor
    levels: Tensor
    upper: Tensor
    across: Tensor
    scales: _Scales

    def solve(self, tiles: Sequence[Tile], grid: Grid) -> None:
        """Round tiles of a diagonal, all of one size, and let the rest learn of their errors."""
        upper = _stacked(self.upper[:, block, block] for _, block in tiles)
        across = _stacked(self.across[:, rows, rows] for rows, _ in tiles)
        carried, remaining = (_stacked(part[:, *tile] for tile in tiles) for part in (self.carried, self.remaining))
        wanted = remaining.baddbmm_(carried, upper, alpha=-1)
        solved = two_sided_waves.solve_tiles(wanted, across, upper, *self.scales.each(tiles), grid)
        parts = (solved.levels, solved.errors, carried.add_(solved.left))
        found = [part.view(-1, len(tiles), *_size(tiles[0])).unbind(1) for part in parts]
        for tile, levels, errors, left in zip(tiles, *found, strict=True):
            self._pass_on(tile, errors, left)
            self.levels[:, *tile], self.remaining[:, *tile] = levels, errors

    def _pass_on(self, tile: Tile, errors: Tensor, left: Tensor) -> None:
        """Let the rows below a tile, and the columns beside it, learn of its errors, and of U_O^T E in it."""
        rows, block = tile
        across, upper = self.across[:, rows, rows.stop :], self.upper[:, block, block.stop :]
        self.carried[:, rows.stop :, block].baddbmm_(across.mT, errors)
        self.remaining[:, rows, block.stop :].baddbmm_(left, upper, alpha=-1)


def pull_of_errors(errors: Tensor, inputs: Factors, outputs: Factors) -> Tensor:
    """See `two_sided.pull_of_errors`; `errors` [matrices, out, in] are used up."""
    divide_by_upper_transposed(errors, inputs.upper)
    divide_by_upper_transposed(errors.mT, outputs.upper)
    return columns_of(_rows_of(errors, torch.argsort(outputs.order)), torch.argsort(inputs.order))


def descend(
    pull: Tensor, hessian: Tensor, added: Tensor, outputs: Tensor, start: Rounded, grid: Grid, *, sweeps: int
) -> Rounded:
    """See `two_sided.descend`: `pull` [matrices, out, in] is that of the result in the end."""
    levels, (matrices, height, width) = start.levels.clone(), pull.shape
    scale, zero_point = (part.to(pull.dtype) for part in (start.scale, start.zero_point))
    group = torch.arange(width, device=pull.device) // (width // scale.shape[-1])
    for _ in range(sweeps):
        for block in slices(width):
            part = hessian[:, block].clone()
            part[..., block].diagonal(dim1=-2, dim2=-1).add_(added[:, block])
            spread = pull.new_zeros(matrices, block.stop - block.start, height)
            scales, zeros = (one[..., group[block]] for one in (scale, zero_point))
            for rows in slices(height):
                own = torch.baddbmm(pull[:, rows, block], spread[..., rows].mT, part[..., block], alpha=-1)
                across = outputs[:, rows, rows]
                changes = two_sided_waves.descend_tiles(
                    levels[:, rows, block], own, across, part[..., block], scales[:, rows], zeros[:, rows], grid
                )
                spread.baddbmm_(changes.mT, outputs[:, rows])
            pull.baddbmm_(spread.mT, part, alpha=-1)
    return replace(start, levels=levels)


def loss_of(residual: Tensor, inputs: Factors, outputs: Factors) -> Tensor:
    """See `two_sided.loss_of`: float64 [matrices] of R = `residual` [matrices, out, in]."""
    errors = columns_of(_rows_of(residual, outputs.order), inputs.order)
    divide_by_upper(errors, inputs.upper)
    divide_by_upper(errors.mT, outputs.upper)
    return _product_sum(errors, errors)


def _product_sum(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1).double().sum(-1)


@dataclass(frozen=True)
class BySides:
    """Matrices solved by both sides: as `Solutions`, but losses are those of whole matrices, float64 [matrices], and so is how
    many rows are `kept` as they are rounded to nearest. `losses` [3, matrices] are by both sides, of `CHOICES`, of which each
    matrix `ended` with one, int64 [matrices]."""

    rounded: Rounded
    loss: Tensor
    rtn_loss: Tensor
    kept: Tensor
    losses: Tensor
    ended: Tensor


@whole_factors()
def solve_by_sides(
    problems: Problems,
    outputs: Outputs,
    weight: Tensor,
    scheme: Scheme,
    found: Solutions,
    *,
    target: Tensor,
    sweeps: int,
    over: Tensor | None = None,
) -> BySides:
    """See `two_sided_gptq.solve_two_sided`: of weights [matrices, out, in] the nested solve, what was `found` by inputs alone,
    or the nearest levels, whichever has the least loss; what can't be solved stays as it was found. The others are those of
    `gptq_batch.solve_problems`."""
    inputs = problems.factors
    nearest = gptq_batch.round_to_nearest(weight, scheme, problems.importance, over)
    others = [loss_of(target - one.values(), inputs, outputs.factors) for one in (found.rounded, nearest)]
    nested, own = best_nested(target, problems.hessian, inputs, outputs, found.rounded, scheme.grid, sweeps=sweeps)
    losses = torch.stack((own, *others))
    solvable = problems.finite & problems.definite & outputs.finite & outputs.definite
    ended = torch.where(solvable, losses.nan_to_num(nan=torch.inf).argmin(0), AS_IT_WAS)
    error = quadratic_form(target - nested.values(), problems.hessian).sum(-1)
    rounded = chosen(ended[:, None, None] == CHOICES.index(Kept.RTN), nearest, found.rounded)
    rounded = chosen(ended[:, None, None] == CHOICES.index(Kept.NESTED), nested, rounded)
    rtn, kept = found.rtn_loss.sum(-1), found.kept.double().sum(-1)
    errors = torch.stack((error, found.loss.sum(-1), rtn))
    rows = torch.stack((torch.zeros_like(kept), kept, torch.full_like(kept, weight.shape[1])))
    error, kept = (each.gather(0, ended[None])[0] for each in (errors, rows))
    return BySides(rounded, error, rtn, kept, losses, ended)


def best_nested(
    target: Tensor, hessian: Tensor, inputs: Factors, outputs: Outputs, start: Rounded, grid: Grid, *, sweeps: int
) -> tuple[Rounded, Tensor]:
    """Nested GPTQ and its sweeps, with the scales of `start`; and their losses by both sides, float64 [matrices]."""
    solved, errors = solve_nested(target, inputs, outputs.factors, start, grid)
    if not sweeps:
        return solved, _product_sum(errors, errors)
    pull = pull_of_errors(errors, inputs, outputs.factors)
    del errors
    solved = descend(pull, hessian, inputs.added, outputs.damped, solved, grid, sweeps=sweeps)
    return solved, _product_sum(target - solved.values(), pull)
