"""GPTQ of several matrices of equal shape at once, one Hessian each: the same solution as `gptq.solve_problem` of each.

A device is asked nothing on the way: what is not finite or can't be factored is marked and computed on with numbers that
harm nobody, and every loop has a length that shapes give. So the number of operations does not depend on the number of
matrices, and the host waits once, for the record at the end. A Hessian that a fraction of dampening was too little for is
solved anew with the next one, see `Attempt`.

Matrices of few inputs go through their Hessian here, like all: on a device its products cost less than operations of their
own would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l4pack.quant import gptq_columns, torch_ops, torch_superblocks
from l4pack.quant.dampening import visits
from l4pack.quant.gptq import chosen, of_super_blocks
from l4pack.quant.grid import Grid
from l4pack.quant.levels import level_dtype, rearranged, spread_scales
from l4pack.quant.precision import whole_factors
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Rounded
from l4pack.quant.triangular import (
    divide_by_upper_transposed,
    invert_lower,
    quadratic_form,
    reverse,
    times_upper,
    times_upper_transposed,
)

BLOCK = 128  # columns that are rounded before the others learn of it
ROWS_AT_ONCE = 1024  # output rows of each matrix whose scales are looked for together: it takes many copies of them


@dataclass(frozen=True)
class Factors:
    """U of each damped Hessian [matrices, in, in], visiting columns in `order`; `added` is what dampening added to the
    diagonals; both [matrices, in]."""

    upper: Tensor
    order: Tensor
    added: Tensor


@dataclass(frozen=True)
class Problems:
    """What the matrices with the same inputs share, see `gptq.Problem`; bool [matrices] says which moments are `finite`
    and which damped Hessians are `definite`."""

    hessian: Tensor
    cross: Tensor | None
    diagonal: Tensor
    factors: Factors
    finite: Tensor
    definite: Tensor
    shifting: bool

    @property
    def importance(self) -> Tensor:
        """How much each input counts where scales are looked for, [matrices, in]."""
        return torch.where(self.finite[:, None], self.diagonal, 1.0)


@dataclass(frozen=True)
class Solutions:
    """Solved matrices: `levels` [matrices, out, in], scales and zero points [matrices, out, groups] as float32 and
    in the dtype of scales. Losses are float64 [matrices, out]; rows with `kept` are rounded to nearest."""

    rounded: Rounded
    loss: Tensor
    rtn_loss: Tensor
    kept: Tensor
    sound: Tensor  # bool [matrices]: weights are finite


@whole_factors()
def prepare_problems(
    hessian: Tensor, cross: Tensor | None, fraction: Tensor, *, act_order: bool, outputs: int
) -> Problems:
    """Factor Hessians [matrices, in, in], each with its own `fraction` of the mean diagonal [matrices] added.

    `cross` is [matrices, in, in] too, and like `hessian` used up; see `gptq.prepare_problem`.
    """
    finite = all_finite(hessian) if cross is None else all_finite(hessian) & all_finite(cross)
    clear(hessian, ~finite)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    factors, definite = factorize(hessian, diagonal, fraction, act_order)
    shifting = cross is not None and outputs > hessian.shape[-1]
    if cross is not None:
        clear(cross, ~(finite & definite))
        if shifting:
            cross = times_inverse(cross, factors)
    return Problems(hessian, cross, diagonal, factors, finite, definite, shifting)


def all_finite(matrices: Tensor) -> Tensor:
    """Whether all elements of each of [matrices, m, n] are numbers: bool [matrices]."""
    return matrices.amax((-2, -1)).isfinite() & matrices.amin((-2, -1)).isfinite()


def clear(matrices: Tensor, which: Tensor) -> None:
    """Put zeros into some of [matrices, m, n]."""
    matrices.masked_fill_(which[:, None, None], 0)


def factorize(hessian: Tensor, diagonal: Tensor, fraction: Tensor, act_order: bool) -> tuple[Factors, Tensor]:
    """Factors of Hessians [matrices, in, in] with these diagonals, each with a `fraction` of the mean added, and which of
    them are, bool [matrices]: the others are the identity's."""
    order = visits(diagonal, act_order)
    added = _added_to(diagonal, fraction)
    backwards = order.flip(1)
    rows = torch.arange(len(hessian), device=hessian.device)[:, None, None]
    damped = hessian[rows, backwards[:, :, None], backwards[:, None, :]]
    damped.diagonal(dim1=-2, dim2=-1).add_(added.gather(1, backwards))
    lower, failed = torch.linalg.cholesky_ex(damped)
    _become_identity(lower, failed != 0)
    invert_lower(lower)
    definite = (failed == 0) & all_finite(lower)
    _become_identity(lower, ~definite)
    reverse(lower)
    return Factors(lower, order, added), definite


def _become_identity(matrices: Tensor, which: Tensor) -> None:
    clear(matrices, which)
    matrices.diagonal(dim1=-2, dim2=-1).masked_fill_(which[:, None], 1)


def _added_to(diagonal: Tensor, fraction: Tensor) -> Tensor:
    """See `dampening.added_to`, for each of the diagonals [matrices, in]."""
    alive = diagonal > 0
    count = alive.sum(1, keepdim=True)
    mean = torch.where(count > 0, diagonal.sum(1, keepdim=True) / count.clamp(min=1), 1.0)
    return torch.where(alive, fraction[:, None] * mean, mean - diagonal)


def times_inverse(rows: Tensor, factors: Factors) -> Tensor:
    """rows H^-1 of the damped Hessians, [matrices, rows, in] in the original column order."""
    permuted = columns_of(rows, factors.order)
    times_upper_transposed(permuted, factors.upper)
    times_upper(permuted, factors.upper)
    return columns_of(permuted, torch.argsort(factors.order))


def columns_of(matrices: Tensor, order: Tensor) -> Tensor:
    """Columns of [matrices, rows, in] in an order of each one's own, [matrices, columns]."""
    return matrices.gather(2, order[:, None, :].expand(-1, matrices.shape[1], -1))


@whole_factors()
def solve_problems(
    problems: Problems,
    weight: Tensor,
    scheme: Scheme,
    *,
    sweeps: int,
    over: Tensor | None = None,
    target: Tensor | None = None,
) -> Solutions:
    """Round weights [matrices, out, in], float32, for the problems' inputs; `scheme` names the dtype of scales, and `over`
    [matrices] are global scales where it has them. `target` is the problems' `asymmetric_target`, if it is known already."""
    nearest = round_to_nearest(weight, scheme, problems.importance, over)
    start = nearest
    if target is None:
        target = asymmetric_target(weight, problems)
    if problems.cross is not None:
        start = round_to_nearest(target, scheme, problems.importance, over)
    solved, loss = _solved(target, problems, start, scheme, sweeps)
    rtn_loss = quadratic_form(target - nearest.values(), problems.hessian)
    kept = (rtn_loss < loss) | ~(problems.finite & problems.definite)[:, None]
    return Solutions(
        chosen(kept[..., None], nearest, solved), torch.where(kept, rtn_loss, loss), rtn_loss, kept, all_finite(weight)
    )


@whole_factors()
def asymmetric_target(weight: Tensor, problems: Problems) -> Tensor:
    """W + W C H^-1 of weights [matrices, out, in], or W itself where there is no C."""
    if problems.cross is None:
        return weight
    shift = weight @ problems.cross
    if not problems.shifting:
        shift = times_inverse(shift, problems.factors)
    return shift.add_(weight)


def round_to_nearest(weight: Tensor, scheme: Scheme, importance: Tensor, over: Tensor | None = None) -> Rounded:
    """See `gptq.round_to_nearest`, of [matrices, out, in] with each one's `importance` [matrices, in]."""
    parts = [_rounded(part, scheme, importance, over) for part in torch.split(weight, ROWS_AT_ONCE, 1)]
    return Rounded(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def _rounded(weight: Tensor, scheme: Scheme, importance: Tensor, over: Tensor | None) -> tuple[Tensor, ...]:
    """The parts of a `Rounded`."""
    if scheme.super_blocked:
        return _super_blocks(weight, importance)
    over_rows = 1.0 if over is None else over.repeat_interleave(weight.shape[1])[:, None]
    whole = _whole_blocks(weight, scheme)
    spread = importance[:, None].expand_as(whole)
    qparams = torch_ops.group_qparams(whole.flatten(0, 1), scheme, spread.flatten(0, 1), over_rows)
    scale, zero_point = (
        spread_scales(part.view(len(weight), -1, part.shape[-1]), scheme, *weight.shape[1:])
        for part in (qparams.scale, qparams.zero_point)
    )
    ratio = weight.float().view(*scale.shape, -1) / scale.float()[..., None]
    unit = scheme.grid.unit
    levels = torch_ops.nearest(ratio, scheme.grid, zero_point[..., None]) / unit
    scale = scale if unit == 1 else scale * unit
    return levels.to(level_dtype(scheme.grid)).view(weight.shape), scale, zero_point


def _whole_blocks(weight: Tensor, scheme: Scheme) -> Tensor:
    """[matrices, out, in] with rows of zeros up to whole blocks."""
    return torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[1] % scheme.block_rows))


def _super_blocks(weight: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
    spread = importance[:, None].expand_as(weight)
    headers = torch_superblocks.search(weight.flatten(0, 1), spread.flatten(0, 1)).view(*weight.shape[:2], -1)
    levels = torch_superblocks.levels_of(weight.contiguous(), *torch_superblocks.values_of(headers))
    made = of_super_blocks(levels, headers)
    return levels, made.scale, made.zero_point, headers


def _solved(target: Tensor, problems: Problems, start: Rounded, scheme: Scheme, sweeps: int) -> tuple[Rounded, Tensor]:
    """GPTQ and its sweeps; each row's undamped loss, float64 [matrices, out]."""
    factors = problems.factors
    solved, errors = solve_columns(target, factors, start, scheme.grid)
    loss = (errors * errors).sum(-1, dtype=torch.float64)
    if sweeps:
        divide_by_upper_transposed(errors, factors.upper)
        pull = columns_of(errors, torch.argsort(factors.order))
        del errors
        solved, gain = descend(pull, problems.hessian, factors.added, solved, scheme.grid, sweeps)
        del pull
        loss -= gain
    residual = (target - solved.values()).square_()
    loss -= residual.mul_(factors.added[:, None]).sum(-1, dtype=torch.float64)
    return solved, loss.clamp_(min=0)


def solve_columns(target: Tensor, factors: Factors, start: Rounded, grid: Grid) -> tuple[Rounded, Tensor]:
    """See `gptq.solve_columns`: GPTQ's blocked loop, and the errors [matrices, out, in] in the order of visits."""
    order, upper = factors.order, factors.upper
    remaining = columns_of(start.raised(target), order).to(upper.dtype)
    levels = torch.empty(target.shape, dtype=level_dtype(grid), device=target.device)
    scale, zero_point = (part.to(upper.dtype) for part in (start.scale, start.zero_point))
    group = order // (target.shape[-1] // scale.shape[-1])
    for first in range(0, target.shape[-1], BLOCK):
        block = slice(first, min(first + BLOCK, target.shape[-1]))
        scales, zeros = (columns_of(part, group[:, block]) for part in (scale, zero_point))
        found, errors = gptq_columns.solve_block(remaining[..., block], upper[:, block, block], scales, zeros, grid)
        levels[..., block], remaining[..., block] = found, errors
        remaining[..., block.stop :].baddbmm_(errors, upper[:, block, block.stop :], alpha=-1)
    return replace(start, levels=rearranged(levels, lambda kept: columns_of(kept, torch.argsort(order)))), remaining


def descend(
    pull: Tensor, hessian: Tensor, added: Tensor, start: Rounded, grid: Grid, sweeps: int
) -> tuple[Rounded, Tensor]:
    """See `gptq.descend`: sweeps of coordinate descent; `pull` [matrices, out, in] is used up."""
    width = pull.shape[-1]
    levels = start.levels.clone()
    scale, zero_point = (part.to(pull.dtype) for part in (start.scale, start.zero_point))
    group = (torch.arange(width, device=pull.device) // (width // scale.shape[-1])).expand(len(pull), -1)
    gain = torch.zeros(pull.shape[:2], dtype=torch.float64, device=pull.device)
    for _ in range(sweeps):
        for first in range(0, width, BLOCK):
            block = slice(first, min(first + BLOCK, width))
            part = hessian[:, block, block].clone()
            part.diagonal(dim1=-2, dim2=-1).add_(added[:, block])
            own = levels[..., block].to(pull.dtype)
            scales, zeros = (columns_of(one, group[:, block]) for one in (scale, zero_point))
            found, change, fell = gptq_columns.descend_block(own, pull[..., block], part, scales, zeros, grid)
            gain += fell
            levels[..., block] = found
            pull[..., block].addcmul_(change, added[:, None, block], value=-1)
            pull.baddbmm_(change, hessian[:, block], alpha=-1)
    return replace(start, levels=levels), gain
