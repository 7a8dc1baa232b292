"""Solving one MLP: gate and up for its inputs, then down for what the solved pair makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from l4pack.calibration.carried import Ends
from l4pack.calibration.problems import given_for, moments_of, problem_of
from l4pack.calibration.rows import Block
from l4pack.model.parts import DOWN, GATE, UP
from l4pack.quant import gptq, torch_ops
from l4pack.quant.dtypes import FloatName
from l4pack.quant.grid import E4M3
from l4pack.quant.levels import stored_scales
from l4pack.quant.packing import pack_levels, pack_zero_points
from l4pack.quant.quantized import Quantized
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Solution, TwoSided
from l4pack.quant.torch_ops import QuantizedTensors, pack_e2m1
from l4pack.quant.torch_scales import coded
from l4pack.quant.two_sided_gptq import OutputMoments, solve_two_sided
from l4pack.recipe import RecipeScheme
from l4pack.stream.rows import rows_at_once

Inputs = Callable[[], Iterable[Block]]
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Matrices:
    """The three matrices of an MLP [out, in], its activation function, and the dtype that runtimes round weights to."""

    weights: Mapping[str, Tensor]
    activation: Activation
    model_dtype: torch.dtype

    def inner(self, inputs: Tensor) -> Tensor:
        """What goes into the down projection: float32 [tokens, inner] for `inputs` [tokens, hidden]."""
        return self.activation(inputs @ self.weights[GATE].T) * (inputs @ self.weights[UP].T)


def solve_mlp(
    matrices: Matrices,
    inputs: Inputs,
    scheme: RecipeScheme,
    dtypes: Mapping[str, FloatName],
    outputs: Tensor | None = None,
) -> dict[str, Solution]:
    """Solutions by projection. `inputs` gives the unit's inputs anew each time; `dtypes` are those of the source.

    With `outputs` they are solved by both sides: second moments [hidden, hidden] of the end loss' gradients with respect to
    what the unit adds to hidden states, float32 of any scale. Raises NonFiniteError for a weight that is not finite.
    """
    options = scheme.gptq
    assert options is not None
    inner, hidden = matrices.weights[GATE].shape
    thin = outputs is None
    moments = moments_of(inputs(), hidden, options, thin=thin)
    tokens = moments.tokens
    first = problem_of(moments, options, outputs=2 * inner)
    del moments
    ends = None if outputs is None else Ends(outputs, matrices.weights, matrices.activation, inputs)
    solve = partial(_solve, matrices=matrices, scheme=scheme, dtypes=dtypes, ends=ends)
    back = None if ends is None else ends.before_down()
    solutions = {name: solve(first, name, together=(GATE, UP), back=back) for name in (GATE, UP)}
    del first, back
    solved = {name: solved_weights(solution, matrices.model_dtype) for name, solution in solutions.items()}
    after = Matrices(solved, matrices.activation, matrices.model_dtype)
    through = (_inner(block, matrices, after) for block in inputs())
    moments = moments_of(through, inner, options, tokens, thin=thin)
    del solved, after
    second = problem_of(moments, options, outputs=hidden)
    del moments
    return solutions | {DOWN: solve(second, DOWN, together=(DOWN,))}


def _inner(block: Block, before: Matrices, after: Matrices) -> Block:
    inputs = after.inner(block.inputs)
    original = None if block.original is None else before.inner(block.original)
    if original is not None and block.kept is not None:
        original = torch.where(block.kept, original, inputs)
    return Block(inputs, original, block.weights, block.kept)


def _solve(
    problem: gptq.Problem,
    name: str,
    *,
    together: Sequence[str],
    matrices: Matrices,
    scheme: RecipeScheme,
    dtypes: Mapping[str, FloatName],
    ends: Ends | None,
    back: Tensor | None = None,
) -> Solution:
    assert scheme.gptq is not None
    weights, options = matrices.weights, scheme.gptq
    given = given_for(weights[name], scheme, dtypes[name], fused=[weights[one] for one in together])
    if ends is None:
        return gptq.solve_problem(problem, weights[name], scheme, **given)
    outputs = OutputMoments(ends.moments(name, back), options.output_dampening, options.act_order)
    return solve_two_sided(problem, outputs, weights[name], scheme, **given)


def solved_weights(solution: Solution, dtype: torch.dtype = torch.float32) -> Tensor:
    """float32 [out, in] of a solution, rounded to `dtype`."""
    values = torch.empty(solution.levels.shape, device=solution.levels.device)
    step = rows_at_once(values.device.type, values.shape[1])
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        values[rows] = solution.rounded(rows).values().to(dtype)
    return values


def stored(solution: Solution, scheme: Scheme) -> Quantized:
    """A solution's arrays as an artifact stores them; packed on the device, if it is there, for less to come over."""
    if scheme.coded_scales:
        unit = scheme.grid.unit
        codes = coded(solution.scale / unit, scheme.scale_dtype, solution.global_scale or 1.0)
        return QuantizedTensors(pack_e2m1(solution.levels * unit), codes, None, solution.global_scale).to_numpy()
    if scheme.grid is E4M3:
        scale = stored_scales(solution.scale, scheme, solution.levels.shape[1])
        return QuantizedTensors(solution.levels.view(torch.uint8), scale, None).to_numpy()
    zero_point, num_bits = solution.zero_point, scheme.num_bits
    if solution.levels.device.type == "cpu":
        words = pack_levels(solution.levels.numpy(), num_bits)
    else:
        words = torch_ops.pack_levels(solution.levels, num_bits).cpu().numpy()
    if solution.headers is not None:
        return Quantized(words, solution.headers.cpu().numpy(), None)
    packed = None if zero_point is None else pack_zero_points(zero_point.cpu().numpy(), num_bits)
    return Quantized(words, torch_ops.to_array(solution.scale), packed)


def result_of(solution: Solution, own: int, borrowed: int) -> dict[str, Any]:
    """What is recorded of a solution; errors are sums over outputs of the mean squared error a token, those of `two_sided`
    weighed by outputs."""
    by_both = solution.two_sided
    more = {} if by_both is None else {"two_sided": _by_both(by_both)}
    return {
        "method": solution.method.value,
        "error": _number(solution.error),
        "rtn_error": _number(solution.rtn_error),
        "dampening": solution.dampening,
        "tokens": own,
        "borrowed_tokens": borrowed,
        "rtn_rows": solution.rtn_rows,
        "dead_columns": solution.dead_columns,
        "reason": solution.reason,
        **more,
    }


def _by_both(found: TwoSided) -> dict[str, Any]:
    return {
        "kept": found.kept.value,
        "error": _number(found.error),
        "gptq_error": _number(found.gptq_error),
        "rtn_error": _number(found.rtn_error),
        "dampening": found.dampening,
        "reason": found.reason,
    }


def _number(value: float) -> float | None:
    """Six digits, None for what is no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
