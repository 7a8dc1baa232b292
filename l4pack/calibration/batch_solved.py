"""Matrices of several MLPs with the same inputs once they are solved, by their inputs alone or by both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l4pack.calibration.batch_ends import Ends
from l4pack.quant import gptq_batch, two_sided_batch
from l4pack.quant.gptq import NOT_DEFINITE, NOT_FINITE
from l4pack.quant.gptq_batch import Problems, Solutions
from l4pack.quant.scheme import Scheme
from l4pack.quant.solution import Kept, Rounded, Solution, SolvedBy, TwoSided
from l4pack.quant.two_sided_batch import CHOICES, BySides, Outputs
from l4pack.quant.two_sided_gptq import NEAREST_IS_BETTER, NOT_SOLVED
from l4pack.recipe import GptqOptions

SIDES = len(CHOICES) + 3  # figures of a matrix by both sides: losses, which it ended with, and two of its outputs


@dataclass(frozen=True)
class Solved:
    """Matrices stacked on each other, still on the device: what they were `rounded` to [units, out, in], losses, those of
    rounding and rows that are rounded, float64 [matrices, units], and whether weights are finite, bool [units]. By both sides,
    `sides` float64 [matrices, SIDES, units] are what `two_sided` reads."""

    rounded: Rounded
    error: Tensor
    rtn_error: Tensor
    kept: Tensor
    sound: Tensor
    sides: Tensor | None = None


@dataclass(frozen=True)
class Solving:
    """How matrices are solved; `over` [units] are their global scales, where they have them."""

    scheme: Scheme
    options: GptqOptions
    over: Tensor

    def by_inputs(self, problems: Problems, weight: Tensor, matrices: int) -> Solved:
        """Weights [units, out, in] of so many matrices."""
        found = self._found(problems, weight, None)
        error, rtn_error, kept = (
            one.double().view(len(one), matrices, -1).sum(-1).T for one in (found.loss, found.rtn_loss, found.kept)
        )
        return Solved(found.rounded, error, rtn_error, kept, found.sound)

    def by_sides(self, problems: Problems, weight: Tensor, ends: Ends, fractions: Mapping[str, Tensor]) -> Solved:
        """Weights of the matrices that `fractions` [units] of dampening are given for, by name, one after the other."""
        target = gptq_batch.asymmetric_target(weight, problems)
        found = self._found(problems, weight, target)
        inner = ends.before_down() if len(fractions) > 1 else None
        rows = weight.shape[1] // len(fractions)
        solved, known = [], []
        for number, (name, fraction) in enumerate(fractions.items()):
            part = slice(number * rows, (number + 1) * rows)
            moments = ends.moments(name, inner)
            outputs = two_sided_batch.prepare_outputs(
                moments, fraction[: len(moments)], act_order=self.options.act_order
            )
            del moments
            outputs = outputs.shared_by(len(weight))
            solved.append(self._by_sides(problems, weight[:, part], target[:, part], outputs, _part_of(found, part)))
            known.append(_figures(solved[-1], outputs))
            del outputs
        return _joined(solved, known, found.sound)

    def _found(self, problems: Problems, weight: Tensor, target: Tensor | None) -> Solutions:
        return gptq_batch.solve_problems(
            problems, weight, self.scheme, sweeps=self.options.sweeps, over=self.over, target=target
        )

    def _by_sides(
        self, problems: Problems, weight: Tensor, target: Tensor, outputs: Outputs, found: Solutions
    ) -> BySides:
        return two_sided_batch.solve_by_sides(
            problems, outputs, weight, self.scheme, found, target=target, sweeps=self.options.sweeps, over=self.over
        )


def _part_of(found: Solutions, rows: slice) -> Solutions:
    rounded, (loss, rtn_loss, kept) = found.rounded, (one[:, rows] for one in (found.loss, found.rtn_loss, found.kept))
    return replace(found, rounded=rounded.mapped(lambda one: one[:, rows]), loss=loss, rtn_loss=rtn_loss, kept=kept)


def _figures(solved: BySides, outputs: Outputs) -> Tensor:
    known = (solved.ended, outputs.finite, outputs.definite)
    return torch.cat((solved.losses, torch.stack([one.double() for one in known])))


def _joined(solved: Sequence[BySides], known: Sequence[Tensor], sound: Tensor) -> Solved:
    rounded = [one.rounded for one in solved]
    headers = [one.headers for one in rounded if one.headers is not None]
    together = Rounded(
        torch.cat([one.levels for one in rounded], 1),
        torch.cat([one.scale for one in rounded], 1),
        torch.cat([one.zero_point for one in rounded], 1),
        torch.cat(headers, 1) if headers else None,
    )
    error, rtn_error, kept = (
        torch.stack(list(each)) for each in zip(*((one.loss, one.rtn_loss, one.kept) for one in solved), strict=True)
    )
    return Solved(together, error, rtn_error, kept, sound, torch.stack(list(known)))


def two_sided(solution: Solution, figures: NDArray[np.float64], dampening: float) -> Solution:
    """A matrix' solution with what its `figures` [SIDES] by both sides say; `dampening` is that of its outputs."""
    *losses, ended, finite, definite = figures.tolist()
    unsolved = solution.reason if solution.reason in (NOT_FINITE, NOT_DEFINITE) else ""
    if unsolved or not (finite and definite):
        kept = Kept.RTN if solution.method is SolvedBy.RTN else Kept.GPTQ
        return replace(solution, two_sided=TwoSided(kept, nan, nan, nan, 0.0, unsolved or NOT_SOLVED))
    kept = CHOICES[int(ended)]
    found = TwoSided(kept, losses[int(ended)], losses[1], losses[2], dampening)
    if kept is Kept.RTN:
        solution = replace(solution, method=SolvedBy.RTN, reason=NEAREST_IS_BETTER)
    return replace(solution, two_sided=found)
