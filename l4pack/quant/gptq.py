"""GPTQ: round a matrix column by column, each column's error absorbed by those still to come.

Frantar et al. 2022 (https://arxiv.org/abs/2210.17323), in its notation: H the Hessian of the layer's inputs, W the
weights, Q their quantized values. Here groups are static: scales come from the original weights before the first
column is rounded, so that columns may be visited in order of importance (`act_order`) and still be stored in their own
order with no index (compressed-tensors' activation ordering `static`).

The upper factor U of H^-1 = U^T U needs no inverse of H: with J the reversal of indices and L the lower factor of
J H J, it is U = J L^-1 J. It also gives the loss for nothing: the errors E that the solver records satisfy
W - Q = E U, hence (W - Q) H (W - Q)^T = E E^T, and (W - Q) H = E U^-T, from which coordinate descent starts.

With asymmetric calibration the goal is not W x but W x', x' the input before anything was quantized. The weights that
would meet it best, W + W C H^-1 with C the covariance of x' - x with x, become the target, and the rest stays as it is
(GPTAQ, Li et al. 2025, https://arxiv.org/abs/2504.02692; QEP, Arai and Ichikawa 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l4pack.quant import gptq_blocks, torch_ops, torch_superblocks
from l4pack.quant.dtypes import FLOATS, FloatName
from l4pack.quant.factor import Factor, factorize, pull_of, times_inverse
from l4pack.quant.gptq_thin import (
    ThinFactor,
    factorize_thin,
    solve_thin_columns,
    thin_loss,
    thin_pull,
    thin_target,
)
from l4pack.quant.grid import E4M3, ScaleDtype
from l4pack.quant.layout import Layout
from l4pack.quant.levels import level_dtype, rearranged, spread_scales
from l4pack.quant.precision import whole_factors
from l4pack.quant.quantize import NonFiniteError, quantize_block
from l4pack.quant.scheme import Scheme, Strategy
from l4pack.quant.solution import Rounded, Solution, SolvedBy
from l4pack.quant.superblocks import ZERO_POINT
from l4pack.quant.torch_scales import values_of
from l4pack.quant.triangular import (
    all_finite,
    quadratic_form,
    row_parts,
)

NOT_FINITE = "the Hessian is not finite"
NOT_DEFINITE = "no dampening up to 1.0 made the Hessian positive definite"
SWEEP_BLOCK = 256  # columns that take their turn in a sweep before the others learn of it
ROWS_AT_ONCE = 2048  # output rows solved together: bounds the memory beside the factor


@dataclass(frozen=True)
class Problem:
    """What all matrices with the same inputs share: moments, and the factor of the Hessian (None: none was found).

    `cross` is C, or C H^-1 if it is `shifting`; with a ThinFactor the original inputs less the inputs, [n, in].
    """

    hessian: Tensor
    cross: Tensor | None
    diagonal: Tensor
    factor: Factor | ThinFactor | None
    reason: str
    shifting: bool = False

    @property
    def finite(self) -> bool:
        """Whether the moments are numbers."""
        return self.reason != NOT_FINITE


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    act_order: bool = True,
    dampening: float = 0.01,
    block_size: int = 128,
    cross: Tensor | None = None,
    sweeps: int = 0,
    source_dtype: FloatName = "BF16",
    global_scale: float | None = None,
) -> Solution:
    """Quantize `weight` (float32 [out, in]) for inputs with second moments `hessian` (float32 [in, in], any factor).

    `cross` [in, in] is the sum over tokens of (x' - x) x^T, with the factor of `hessian`: x' is the original model's
    input, x the quantized one's. `source_dtype` is that of the checkpoint's weights, for scale_dtype `source`. With
    observer `mse`, scales minimise the squared error weighted with the diagonal of the Hessian. No output row ends with
    a higher loss than rounding to nearest gives it. `global_scale` is as for `quantize_block`. Raises ValueError for
    one scale a matrix or shapes that don't match, NonFiniteError for a weight that is not finite.
    """
    problem = prepare_problem(hessian, cross=cross, act_order=act_order, dampening=dampening)
    return solve_problem(
        problem,
        weight,
        scheme,
        block_size=block_size,
        sweeps=sweeps,
        source_dtype=source_dtype,
        global_scale=global_scale,
    )


@whole_factors()
def prepare_problem(
    hessian: Tensor,
    *,
    cross: Tensor | None = None,
    inputs: Tensor | None = None,
    difference: Tensor | None = None,
    act_order: bool = True,
    dampening: float = 0.01,
    outputs: int = 0,
) -> Problem:
    """Factor a Hessian [in, in] once, for `solve_problem` of every matrix that sees these inputs; `cross` is [in, in]
    too.

    `outputs` is how many rows they have together: for more than there are inputs, it is less work to find C H^-1 first,
    which takes the place of `cross`. Few inputs are given themselves, `inputs` X [n, in] whose product X^T X `hessian`
    is, and instead of `cross` by how much the original's are larger, `difference` [n, in]; their columns are reordered in
    place.
    """
    diagonal = hessian.diagonal().clamp(min=0)
    aim = cross if inputs is None else difference
    if not all(all_finite(matrix) for matrix in (hessian, aim) if matrix is not None):
        return Problem(hessian, aim, diagonal, None, NOT_FINITE)
    factor: Factor | ThinFactor | None
    if inputs is None:
        factor = factorize(hessian, act_order=act_order, dampening=dampening)
    else:
        invert = aim is not None
        factor = factorize_thin(inputs, diagonal, act_order=act_order, dampening=dampening, invert=invert)
    if factor is None:
        return Problem(hessian, aim, diagonal, None, NOT_DEFINITE)
    shifting = cross is not None and isinstance(factor, Factor) and outputs > len(hessian)
    if cross is not None and isinstance(factor, Factor) and shifting:
        for rows in row_parts(cross):
            times_inverse(rows, factor)
    return Problem(hessian, aim, diagonal, factor, "", shifting)


@whole_factors()
def solve_problem(
    problem: Problem,
    weight: Tensor,
    scheme: Scheme,
    *,
    block_size: int = 128,
    sweeps: int = 0,
    source_dtype: FloatName = "BF16",
    rows_at_once: int = ROWS_AT_ONCE,
    global_scale: float | None = None,
    target: Tensor | None = None,
) -> Solution:
    """`solve` for one matrix [out, in] of a problem, some output rows at a time: rows don't depend on each other.

    `target` is the problem's `asymmetric_target`, if it is known already. `rows_at_once` are whole blocks. Raises
    ValueError for one scale a matrix, NonFiniteError for a weight that is not finite.
    """
    if scheme.strategy is Strategy.TENSOR:
        raise ValueError("GPTQ solves no scheme with one scale a matrix")
    if problem.hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"a Hessian of shape {tuple(problem.hessian.shape)} does not fit weights {tuple(weight.shape)}"
        )
    settings = _Settings(with_scales(scheme, source_dtype), block_size, sweeps, global_scale)
    pieces = []
    for first in range(0, len(weight), rows_at_once):
        rows = slice(first, first + rows_at_once)
        aim = None if target is None else target[rows].contiguous()
        pieces.append(_solve_piece(problem, weight[rows].contiguous(), aim, settings, first))
    return _joined(pieces)


def with_scales(scheme: Scheme, source_dtype: FloatName) -> Scheme:
    """The scheme with scales in a dtype by name, where it leaves that to the source."""
    if scheme.scale_dtype is not ScaleDtype.SOURCE:
        return scheme
    return scheme.model_copy(update={"scale_dtype": ScaleDtype(FLOATS[source_dtype].word)})


@dataclass(frozen=True)
class _Settings:
    scheme: Scheme
    block_size: int
    sweeps: int
    over: float | None


def _solve_piece(problem: Problem, weight: Tensor, target: Tensor | None, settings: _Settings, first: int) -> Solution:
    scheme = settings.scheme
    try:
        nearest = round_to_nearest(weight, scheme, problem.diagonal if problem.finite else None, settings.over)
    except NonFiniteError as error:
        raise NonFiniteError(first + error.row, error.column) from error
    dead = int((problem.diagonal == 0).sum())
    if not problem.finite:
        return _rtn(nearest, settings, float("nan"), problem.reason, 0)
    factor = problem.factor
    if factor is None:
        rtn_error = float(quadratic_form(weight - nearest.values(), problem.hessian).sum())
        return _rtn(nearest, settings, rtn_error, problem.reason, dead)
    target, start = asymmetric_target(weight, problem) if target is None else target, nearest
    if problem.cross is not None:
        start = round_to_nearest(target, scheme, problem.diagonal, settings.over)
    solved, loss = _solved(target, problem.hessian, factor, start, settings)
    return _better_rows(target, problem.hessian, factor, solved, loss, nearest, settings, dead)


def _solved(
    target: Tensor, hessian: Tensor, factor: Factor | ThinFactor, start: Rounded, settings: _Settings
) -> tuple[Rounded, Tensor]:
    """GPTQ and its sweeps; also each row's undamped loss, float64 [out]."""
    scheme, sweeps = settings.scheme, settings.sweeps
    solved, loss, pull = _columns(target, factor, start, settings)
    if pull is not None:
        solved, gain = descend(target, hessian, factor.added, solved, scheme, SWEEP_BLOCK, sweeps=sweeps, pull=pull)
        loss -= gain
    residual = (target - solved.values()).square_()
    loss -= residual.mul_(factor.added).sum(1, dtype=torch.float64)
    return solved, loss.clamp_(min=0)


def _columns(
    target: Tensor, factor: Factor | ThinFactor, start: Rounded, settings: _Settings
) -> tuple[Rounded, Tensor, Tensor | None]:
    """GPTQ; each row's damped loss, float64 [out]; and if sweeps follow, where they start from."""
    scheme = settings.scheme
    if isinstance(factor, ThinFactor):
        levels, left, loss = solve_thin_columns(
            start.raised(target), factor, start.scale, start.zero_point, scheme.grid
        )
        solved = replace(start, levels=levels)
        return solved, loss, thin_pull(left, target - solved.values(), factor) if settings.sweeps else None
    solved, errors = solve_columns(target, factor, start, scheme, settings.block_size)
    loss = (errors * errors).sum(1, dtype=torch.float64)
    return solved, loss, pull_of(errors, factor) if settings.sweeps else None


def _joined(pieces: list[Solution]) -> Solution:
    """The solution of all rows from those of some rows each."""
    if len(pieces) == 1:
        return pieces[0]
    zero_points = [piece.zero_point for piece in pieces if piece.zero_point is not None]
    headers = [piece.headers for piece in pieces if piece.headers is not None]
    rounded = all(piece.method is SolvedBy.RTN for piece in pieces)
    return replace(
        pieces[0],
        levels=torch.cat([piece.levels for piece in pieces]),
        scale=torch.cat([piece.scale for piece in pieces]),
        zero_point=torch.cat(zero_points) if zero_points else None,
        headers=torch.cat(headers) if headers else None,
        error=sum(piece.error for piece in pieces),
        rtn_error=sum(piece.rtn_error for piece in pieces),
        method=SolvedBy.RTN if rounded else SolvedBy.GPTQ,
        reason=pieces[0].reason if rounded else "",
        rtn_rows=sum(piece.rtn_rows for piece in pieces),
    )


@whole_factors()
def asymmetric_target(weight: Tensor, problem: Problem) -> Tensor:
    """W + W C H^-1, or W itself where there is no C."""
    if problem.cross is None:
        return weight
    assert problem.factor is not None
    if isinstance(problem.factor, ThinFactor):
        return thin_target(weight, problem.cross, problem.factor)
    shift = weight @ problem.cross
    if not problem.shifting:
        times_inverse(shift, problem.factor)
    return shift.add_(weight)


def round_to_nearest(
    weight: Tensor, scheme: Scheme, importance: Tensor | None, global_scale: float | None = None
) -> Rounded:
    """Scales by the scheme's observer and the nearest levels of a float32 weight [out, in]; `importance` is [in]."""
    if weight.device.type == "cpu":
        column_weight = None if importance is None else importance.float().numpy()
        quantized = quantize_block(
            weight.float().numpy(),
            Layout.OUT_IN,
            "F32",
            scheme,
            column_weight=column_weight,
            global_scale=global_scale,
        )
        zero_words = None if quantized.zero_point is None else torch.from_numpy(quantized.zero_point)
        values, scale = torch.from_numpy(quantized.values), torch_ops.from_array(quantized.scale)
        tensors = torch_ops.QuantizedTensors(values, scale, zero_words, global_scale)
    else:
        tensors = torch_ops.quantize(weight.float(), scheme, column_weight=importance, global_scale=global_scale)
    if scheme.super_blocked:
        levels = torch_ops.unpack_levels(tensors.values, scheme.num_bits, weight.shape[1]).to(torch.int8)
        return of_super_blocks(levels, tensors.scale)
    if scheme.coded_scales:
        unit = scheme.grid.unit
        levels = torch_ops.unpack_e2m1(tensors.values).div_(unit).to(torch.int8)
        scale = values_of(tensors.scale, scheme.scale_dtype, global_scale or 1.0) * unit
        return Rounded(levels, scale, torch.zeros_like(scale))
    if scheme.grid is E4M3:
        scale = spread_scales(tensors.scale, scheme, *weight.shape)
        zero_point = torch.zeros(scale.shape, device=weight.device)
        return Rounded(tensors.values.view(level_dtype(scheme.grid)), scale, zero_point)
    levels = torch_ops.unpack_levels(tensors.values, scheme.num_bits, weight.shape[1]).to(torch.int8)
    zero_point = torch.zeros(tensors.scale.shape, device=weight.device)
    if tensors.zero_point is not None:
        zero_point = torch_ops.unpack_levels(tensors.zero_point.T, scheme.num_bits, len(weight)).T.contiguous()
    return Rounded(levels, tensors.scale, zero_point)


def of_super_blocks(levels: Tensor, headers: Tensor) -> Rounded:
    """Levels [..., in] with scales of super-blocks, uint8 [..., in / 16]."""
    scale = torch_superblocks.values_of(headers)[0]
    return Rounded(levels, scale, torch.full_like(scale, ZERO_POINT), headers)


def solve_columns(
    target: Tensor, factor: Factor, start: Rounded, scheme: Scheme, block_size: int
) -> tuple[Rounded, Tensor]:
    """GPTQ's blocked loop; also its errors E [out, in], columns in the order of their visits.

    With R the target less what was rounded, R = E U, and the sum of a row's squares is its loss under the damped Hessian.
    """
    order, upper = factor.order, factor.upper
    remaining = start.raised(target).index_select(1, order).to(upper.dtype)
    levels = torch.empty(target.shape, dtype=level_dtype(scheme.grid), device=target.device)
    group = order // (target.shape[1] // start.scale.shape[1])
    for first in range(0, target.shape[1], block_size):
        last = min(first + block_size, target.shape[1])
        block = remaining[:, first:last].contiguous()
        part = upper[first:last, first:last].contiguous()
        solved = gptq_blocks.solve_block(block, part, start.scale, start.zero_point, group[first:last], scheme.grid)
        levels[:, first:last] = solved.levels
        remaining[:, first:last] = solved.errors
        remaining[:, last:].addmm_(solved.errors, upper[first:last, last:], alpha=-1)
    return replace(start, levels=rearranged(levels, lambda kept: kept.index_select(1, torch.argsort(order)))), remaining


def descend(
    target: Tensor,
    hessian: Tensor,
    added: Tensor,
    start: Rounded,
    scheme: Scheme,
    block_size: int,
    *,
    sweeps: int = 1,
    pull: Tensor | None = None,
) -> tuple[Rounded, Tensor]:
    """Sweeps of coordinate descent from `start`: each column takes its best level given all the others.

    GPTQ decides a column before it knows how those after it will be rounded; a sweep lets it decide again. No step
    raises the damped loss; the second result is by how much it fell, float64 [out]. Scales and zero points stay. `pull`
    is that of `start`, if it is known already, and is used up.
    """
    levels = start.levels.clone()
    if pull is None:
        residual = (target - start.values()).to(hessian.dtype)
        pull = torch.addcmul(residual @ hessian, residual, added)
    scale, zero_point = (part.to(hessian.dtype).contiguous() for part in (start.scale, start.zero_point))
    gain = gptq_blocks.descend(
        levels, pull, hessian, added, scale, zero_point, scheme.grid, block_size=block_size, sweeps=sweeps
    )
    return replace(start, levels=levels), gain


def _better_rows(
    target: Tensor,
    hessian: Tensor,
    factor: Factor | ThinFactor,
    solved: Rounded,
    loss: Tensor,
    nearest: Rounded,
    settings: _Settings,
    dead: int,
) -> Solution:
    """Keep, row by row, whichever of the solved levels, of known loss, and the nearest has the lower undamped loss."""
    rounding = (target - nearest.values()).to(hessian.dtype)
    rtn_loss = thin_loss(rounding, factor) if isinstance(factor, ThinFactor) else quadratic_form(rounding, hessian)
    keep = rtn_loss < loss
    kept = int(keep.sum())
    rtn_error = float(rtn_loss.sum())
    if kept == len(target):
        reason = "rounding to nearest has the lower loss in every output row"
        return _rtn(nearest, settings, rtn_error, reason, dead, factor.dampening)
    mixed = chosen(keep[:, None], nearest, solved)
    error = float(torch.where(keep, rtn_loss, loss).sum())
    return Solution(
        mixed.levels,
        mixed.scale,
        _stored_zero_point(mixed, settings.scheme),
        error,
        rtn_error,
        factor.dampening,
        SolvedBy.GPTQ,
        "",
        kept,
        dead,
        settings.over,
        mixed.headers,
    )


def chosen(kept: Tensor, nearest: Rounded, solved: Rounded) -> Rounded:
    """The nearest levels in the rows that are `kept`, bool [..., out, 1], the solved ones in the others."""
    levels, *parts = (torch.where(kept, a, b) for a, b in zip(_parts(nearest), _parts(solved), strict=True))
    return Rounded(levels.view(solved.levels.dtype), *parts)


def _parts(rounded: Rounded) -> list[Tensor]:
    parts = (rounded.levels.view(torch.int8), rounded.scale, rounded.zero_point, rounded.headers)
    return [part for part in parts if part is not None]


def _stored_zero_point(rounded: Rounded, scheme: Scheme) -> Tensor | None:
    return None if scheme.symmetric else rounded.zero_point.to(torch.int8)


def _rtn(
    nearest: Rounded, settings: _Settings, error: float, reason: str, dead: int, dampening: float = 0.0
) -> Solution:
    zero_point, rows = _stored_zero_point(nearest, settings.scheme), len(nearest.levels)
    found = (error, error, dampening, SolvedBy.RTN, reason, rows, dead, settings.over, nearest.headers)
    return Solution(nearest.levels, nearest.scale, zero_point, *found)
