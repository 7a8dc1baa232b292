"""Rounding one matrix by more than its inputs: the methods that `end_aware.py` compares, on top of l4pack's solver.

The loss of a matrix is tr(H_O R H_I R^T), R [out, in] what rounding leaves of the target, H_I the second moments of its
inputs, as GPTQ has them, and H_O those of the end loss' gradients with respect to its outputs (YAQA,
https://arxiv.org/abs/2505.22988). H_O = 1 is GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from l4pack.quant import gptq
from l4pack.quant.factor import Factor, times_inverse
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Rounded
from l4pack.quant.triangular import quadratic_form
from l4pack.quant.two_sided import descend, prepare_outputs, pull_of_errors, solve_nested
from l4pack.recipe import GptqOptions

BLOCK, SWEEP_BLOCK = 128, 256


@dataclass(frozen=True)
class Inputs:
    """Moments [in, in] of a matrix' inputs: the Hessian, and C of the original model's inputs less these."""

    hessian: Tensor
    cross: Tensor

    def scaled(self, by: Tensor) -> Inputs:
        """Those of inputs multiplied with `by` [in]."""
        both = by[:, None] * by
        return Inputs(self.hessian * both, self.cross * both)

    @staticmethod
    def of(rows: Tensor, original: Tensor, weight: Tensor) -> Inputs:
        """Means over tokens [tokens, in], each counting `weight` [tokens]."""
        weighted = rows * (weight / weight.sum().clamp(min=1e-30))[:, None]
        return Inputs(weighted.T @ rows, (original - rows).T @ weighted)


@dataclass(frozen=True)
class Task:
    """A matrix [out, in] with its inputs, and how today's recipe rounds it."""

    weight: Tensor
    inputs: Inputs
    scheme: Scheme
    options: GptqOptions


@dataclass(frozen=True)
class Solved:
    """What a matrix was rounded to, what it was to be [out, in], and the factor of its Hessian."""

    rounded: Rounded
    target: Tensor
    factor: Factor

    def losses(self, inputs: Inputs) -> Tensor:
        """Each row's undamped loss, float64 [out]."""
        return quadratic_form(self.target - self.rounded.values(), inputs.hessian)


def today(task: Task) -> Solved:
    """The shipped solver: activation order, the original model's inputs, mse scales, sweeps."""
    options, inputs = task.options, task.inputs
    problem = gptq.prepare_problem(
        inputs.hessian, cross=inputs.cross, act_order=options.act_order, dampening=options.dampening
    )
    assert isinstance(problem.factor, Factor)
    solution = gptq.solve_problem(problem, task.weight, task.scheme, sweeps=options.sweeps)
    shift = task.weight @ inputs.cross
    times_inverse(shift, problem.factor)
    return Solved(solution.rounded(), task.weight + shift, problem.factor)


def best_rows(task: Task, candidates: Sequence[Solved]) -> Solved:
    """Of several solutions, every row's best by undamped loss."""
    losses = torch.stack([one.losses(task.inputs) for one in candidates])
    best = losses.argmin(0)[:, None]
    levels, scales = (torch.stack([getattr(one.rounded, name) for one in candidates]) for name in ("levels", "scale"))
    rounded = Rounded(*(_chosen(part, best) for part in (levels, scales)), candidates[0].rounded.zero_point)
    return replace(candidates[0], rounded=rounded)


def _chosen(parts: Tensor, best: Tensor) -> Tensor:
    return parts.gather(0, best.expand(parts.shape[1:])[None])[0]


def in_order(task: Task, base: Solved, order: Tensor, scale: Tensor) -> Solved:
    """GPTQ with its sweeps for the target of `base`, visiting columns in `order`, with `scale` [out, groups]."""
    hessian, added = task.inputs.hessian, base.factor.added
    damped = (hessian + torch.diag(added)).double()[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).to(hessian.dtype)
    factor = replace(base.factor, upper=upper.contiguous(), order=order)
    start = replace(base.rounded, scale=scale)
    solved, _ = gptq.solve_columns(base.target, factor, start, task.scheme, BLOCK)
    sweeps = task.options.sweeps
    solved, _ = gptq.descend(base.target, hessian, added, solved, task.scheme, SWEEP_BLOCK, sweeps=sweeps)
    return replace(base, rounded=solved)


def best_of_orders(task: Task, count: int) -> Solved:
    """Every row's best of `count` orders of columns, the shipped one among them; the others are drawn."""
    base = today(task)
    draw = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(base.factor.order), generator=draw) for _ in range(count - 1)]
    return best_rows(task, [base, *(in_order(task, base, order, base.rounded.scale) for order in orders)])


def best_of_scales(task: Task, factors: Sequence[float]) -> Solved:
    """Every row's best of the shipped scales multiplied with each of `factors`."""
    base = today(task)
    scales = [(base.rounded.scale * factor).to(base.rounded.scale.dtype) for factor in factors]
    return best_rows(task, [base, *(in_order(task, base, base.factor.order, scale) for scale in scales)])


def best_of_folds(task: Task, exponents: Sequence[float], solve: Callable[[Task], Solved]) -> Tensor:
    """Values of `weight` solved with its columns multiplied with powers of how large their inputs are, and divided again:
    those of the exponent with the least loss. What comes before the matrix has to divide."""
    diagonal = task.inputs.hessian.diagonal()
    size = diagonal.clamp(min=1e-6 * float(diagonal.mean())).sqrt()
    found = []
    for exponent in exponents:
        by = size**exponent
        folded = Task(task.weight * by, task.inputs.scaled(1 / by), task.scheme, task.options)
        solved = solve(folded)
        found.append((float(solved.losses(folded.inputs).sum()), solved.rounded.values() / by))
    return min(found, key=lambda one: one[0])[1]


def two_sided(task: Task, outputs: Tensor, *, dampening: float, nested: bool, base: Solved) -> Solved:
    """`base` carried on with H_O = `outputs` [out, out]: by sweeps from where it is, or from a `nested` solve."""
    hessian, factor, grid = task.inputs.hessian, base.factor, task.scheme.grid
    sides = prepare_outputs(outputs.clone(), dampening=dampening)
    assert sides is not None
    rounded = base.rounded
    if nested:
        rounded, errors = solve_nested(base.target, factor, sides, rounded, grid)
        pull = pull_of_errors(errors, factor, sides.factor)
    else:
        pull = sides.damped @ (base.target - rounded.values()) @ (hessian + torch.diag(factor.added))
    swept = descend(pull, hessian, factor.added, sides.damped, rounded, grid, sweeps=task.options.sweeps)
    return replace(base, rounded=swept)
