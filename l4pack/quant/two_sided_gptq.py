"""A whole matrix by both sides: the solve by its inputs, the nested one from its scales, and the better of the two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import nan

import torch
from torch import Tensor

from l4pack.quant import two_sided_batch
from l4pack.quant.dtypes import FloatName
from l4pack.quant.factor import Factor
from l4pack.quant.gptq import ROWS_AT_ONCE, Problem, asymmetric_target, round_to_nearest, solve_problem, with_scales
from l4pack.quant.gptq_batch import Factors
from l4pack.quant.precision import whole_factors
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Kept, Rounded, Solution, SolvedBy, TwoSided
from l4pack.quant.triangular import quadratic_form
from l4pack.quant.two_sided import Outputs, descend, loss_of, prepare_outputs, product_sum, pull_of_errors, solve_nested

NOT_SOLVED = "no dampening up to 1.0 made the moments of gradients positive definite"
NO_FACTOR = "the inputs' moments have no factor"
NEAREST_IS_BETTER = "rounding to nearest has the lower loss by both sides"


@dataclass(frozen=True)
class OutputMoments:
    """Second moments [out, out] of the end loss' gradients with respect to a matrix' outputs, float32 of any scale, which
    solving uses up; and how they are factored: `dampening` is a fraction of their mean diagonal."""

    moments: Tensor
    dampening: float
    act_order: bool = True


@whole_factors()
def solve_two_sided(
    problem: Problem,
    outputs: OutputMoments,
    weight: Tensor,
    scheme: Scheme,
    *,
    sweeps: int = 0,
    source_dtype: FloatName = "BF16",
    rows_at_once: int = ROWS_AT_ONCE,
    global_scale: float | None = None,
) -> Solution:
    """`gptq.solve_problem` carried on with what the matrix' outputs do to the end loss.

    Scales are those of the solve by inputs alone. Rows depend on each other here, so that of the whole matrix the nested
    solve, that by inputs alone or rounding to nearest is kept, whichever has the least loss. Raises what `solve_problem`
    raises.
    """
    scheme = with_scales(scheme, source_dtype)
    matrix = _Matrix(problem, weight, scheme, _target(problem, weight, rows_at_once), rows_at_once, global_scale)
    solution = solve_problem(
        problem, weight, scheme,
        sweeps=sweeps, rows_at_once=rows_at_once, global_scale=global_scale, target=matrix.target,
    )  # fmt: skip
    if not isinstance(problem.factor, Factor):
        return _unsolved(solution, problem.reason or NO_FACTOR)
    sides = prepare_outputs(outputs.moments, dampening=outputs.dampening, act_order=outputs.act_order)
    if sides is None:
        return _unsolved(solution, NOT_SOLVED)
    return _best(matrix, problem.factor, sides, solution, sweeps)


def _unsolved(solution: Solution, reason: str) -> Solution:
    kept = Kept.RTN if solution.method is SolvedBy.RTN else Kept.GPTQ
    return replace(solution, two_sided=TwoSided(kept, nan, nan, nan, 0.0, reason))


@dataclass(frozen=True)
class _Matrix:
    """What all of a matrix' solves start from; `target` [out, in] is what they aim at."""

    problem: Problem
    weight: Tensor
    scheme: Scheme
    target: Tensor
    rows_at_once: int
    over: float | None

    def residual(self, rounded: Rounded) -> Tensor:
        """R [out, in]."""
        return self.target - rounded.values()

    def nearest(self) -> Rounded:
        """The weights rounded to nearest, as `solve_problem` does it."""
        parts = [
            round_to_nearest(rows.contiguous(), self.scheme, self.problem.diagonal, self.over)
            for rows in torch.split(self.weight, self.rows_at_once)
        ]
        headers = [part.headers for part in parts if part.headers is not None]
        return Rounded(
            torch.cat([part.levels for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.zero_point for part in parts]),
            torch.cat(headers) if headers else None,
        )


def _target(problem: Problem, weight: Tensor, rows_at_once: int) -> Tensor:
    """What the matrix aims at [out, in]: the weights themselves where nothing shifts them, or nothing could."""
    if problem.cross is None or problem.factor is None:
        return weight
    return torch.cat([asymmetric_target(rows, problem) for rows in torch.split(weight, rows_at_once)])


def _best(matrix: _Matrix, inputs: Factor, outputs: Outputs, solution: Solution, sweeps: int) -> Solution:
    """The nested solution, that by inputs alone or the nearest levels, with the losses of all three."""
    by_inputs = loss_of(matrix.residual(solution.rounded()), inputs, outputs.factor)
    rtn = loss_of(matrix.residual(matrix.nearest()), inputs, outputs.factor)
    nested, own = _nested(matrix, inputs, outputs, solution.rounded(), sweeps)
    losses = {Kept.NESTED: own, Kept.GPTQ: by_inputs, Kept.RTN: rtn}
    kept = min(losses, key=lambda one: losses[one])
    found = TwoSided(kept, losses[kept], by_inputs, rtn, outputs.factor.dampening)
    match kept:
        case Kept.GPTQ:
            return replace(solution, two_sided=found)
        case Kept.RTN:
            return _rounded(matrix, solution, found)
    error = float(quadratic_form(matrix.residual(nested), matrix.problem.hessian).sum())
    return replace(
        solution, levels=nested.levels, error=error, method=SolvedBy.GPTQ, reason="", rtn_rows=0, two_sided=found
    )


def _nested(matrix: _Matrix, inputs: Factor, outputs: Outputs, start: Rounded, sweeps: int) -> tuple[Rounded, float]:
    """Nested GPTQ and its sweeps, with the scales of `start`; and their loss."""
    grid, hessian = matrix.scheme.grid, matrix.problem.hessian
    if hessian.device.type != "cpu":
        return _nested_on_device(matrix, inputs, outputs, start, sweeps)
    solved, errors = solve_nested(matrix.target, inputs, outputs, start, grid)
    if not sweeps:
        return solved, float(product_sum(errors, errors))
    pull = pull_of_errors(errors, inputs, outputs.factor)
    del errors
    solved = descend(pull, hessian, inputs.added, outputs.damped, solved, grid, sweeps=sweeps)
    return solved, float(product_sum(matrix.residual(solved), pull))


def _nested_on_device(
    matrix: _Matrix, inputs: Factor, outputs: Outputs, start: Rounded, sweeps: int
) -> tuple[Rounded, float]:
    """As a batch of one."""
    known = torch.ones(1, dtype=torch.bool, device=matrix.target.device)
    sides = two_sided_batch.Outputs(outputs.damped[None], _alone(outputs.factor), known, known)
    hessian, grid = matrix.problem.hessian[None], matrix.scheme.grid
    solved, losses = two_sided_batch.best_nested(
        matrix.target[None], hessian, _alone(inputs), sides, start.mapped(lambda part: part[None]), grid, sweeps=sweeps
    )
    return solved.mapped(lambda part: part[0]), float(losses[0])


def _alone(factor: Factor) -> Factors:
    return Factors(factor.upper[None], factor.order[None], factor.added[None])


def _rounded(matrix: _Matrix, solution: Solution, found: TwoSided) -> Solution:
    """The nearest levels in all rows."""
    nearest = matrix.nearest()
    zero_point = None if matrix.scheme.symmetric else nearest.zero_point.to(torch.int8)
    return replace(
        solution,
        levels=nearest.levels,
        scale=nearest.scale,
        zero_point=zero_point,
        headers=nearest.headers,
        error=solution.rtn_error,
        method=SolvedBy.RTN,
        reason=NEAREST_IS_BETTER,
        rtn_rows=len(nearest.levels),
        two_sided=found,
    )
