"""One choice for every unit: an integer program for one budget, and the hull of all budgets.

The program is a multiple-choice knapsack: minimise the sum of losses, one choice of every unit, and for every limit the
sum of its costs at most its bound. `scipy.optimize.milp` (HiGHS) solves it and proves how far from the optimum it may be.
Costs are whole numbers that a floating-point solver need not add up exactly, so every answer is added up again.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l4pack.errors import L4packError

Picks = tuple[int, ...]  # the index of every unit's choice
# What all bytes between the smallest and the largest choice are worth together, as a share of the largest loss: of choices
# that predict the same KL to a millionth of that, the smaller one is taken.
BYTES_WORTH = 1e-6
LARGEST_LOSS = 1e4  # the program is scaled to these, which HiGHS's absolute tolerances suit
LARGEST_COST = 1e3
ABSOLUTE_GAP = 1e-6  # where HiGHS stops, in the scale of LARGEST_LOSS
MAX_ROUNDS = 20
TIME_LIMIT = 60.0
OPTIMAL_GAP = 1e-6
_TIMED_OUT = 1  # scipy's status


@dataclass(frozen=True)
class CostLimit:
    """Costs of every choice of every unit, and the most that a solution's may add up to."""

    costs: Sequence[Sequence[int]]
    bound: int


@dataclass(frozen=True)
class Selection:
    """A choice for every unit; `gap` bounds its distance from the optimum as a share of its loss."""

    picks: Picks
    loss: float
    gap: float

    @property
    def optimal(self) -> bool:
        """Whether it is proven that nothing better fits."""
        return self.gap <= OPTIMAL_GAP


def total(values: Sequence[Sequence[Any]], picks: Picks) -> Any:
    """The sum over units of the picked choices' values."""
    return sum(row[pick] for row, pick in zip(values, picks, strict=True))


def smallest(costs: Sequence[Sequence[Any]]) -> Picks:
    """The choice of least cost of every unit; of equals, the first."""
    return tuple(min(range(len(row)), key=row.__getitem__) for row in costs)


def select(
    losses: Sequence[Sequence[float]], nbytes: Sequence[Sequence[int]], limits: Sequence[CostLimit]
) -> Selection | None:
    """The choices that lose least within all limits, fewer bytes where losses are the same; None when nothing fits."""
    if any(sum(map(min, limit.costs)) > limit.bound for limit in limits):
        return None
    program = _Program(losses, nbytes, limits)
    for _ in range(MAX_ROUNDS):
        found = program.run()
        if found is None:
            return None
        picks, proven = found
        if all(total(limit.costs, picks) <= limit.bound for limit in limits):
            value = program.value(picks)
            gap = 0.0 if value - proven <= ABSOLUTE_GAP else (value - proven) / value
            return Selection(picks, float(total(losses, picks)), gap)
        program.exclude(picks)
    raise L4packError(
        "the solver's answers keep exceeding the budget by a rounding error", hint="ask for a little less"
    )


class _Program:
    """The program in numbers that suit the solver: every unit's least cost taken off, and no choice that alone is beyond
    a limit."""

    def __init__(
        self, losses: Sequence[Sequence[float]], nbytes: Sequence[Sequence[int]], limits: Sequence[CostLimit]
    ) -> None:
        sizes = [len(row) for row in losses]
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._units = np.repeat(np.arange(len(sizes)), sizes)
        span = sum(max(row) - min(row) for row in nbytes) or 1
        largest = sum(max(row) for row in losses) or 1.0
        priced = _flat(losses) + BYTES_WORTH * largest / span * _flat([[n - min(row) for n in row] for row in nbytes])
        self._objective = priced * (LARGEST_LOSS / (priced.max() or 1.0))
        self._allowed = np.ones(len(priced))
        self._rows = [self._row(limit) for limit in limits]
        self._excluded: list[NDArray[np.float64]] = []

    def _row(self, limit: CostLimit) -> tuple[NDArray[np.float64], float]:
        room = limit.bound - sum(map(min, limit.costs))
        above = _flat([[cost - min(row) for cost in row] for row in limit.costs])
        self._allowed[above > room] = 0
        scale = LARGEST_COST / (above[above <= room].max() or 1.0)
        return np.minimum(above, room) * scale, room * scale

    def value(self, picks: Picks) -> float:
        """The objective of a solution, in the program's own scale."""
        return float(self._objective[self._starts + np.asarray(picks)].sum())

    def exclude(self, picks: Picks) -> None:
        """Never answer `picks` again, which only rounding let in."""
        row = np.zeros(len(self._objective))
        row[self._starts + np.asarray(picks)] = 1
        self._excluded.append(row)

    def run(self) -> tuple[Picks, float] | None:
        """The best choices the solver finds, and the objective that none can beat; None when there are none."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # takes a while to load
        from scipy.sparse import csr_array

        count = len(self._objective)
        one_each = csr_array((np.ones(count), (self._units, np.arange(count))))
        constraints = [LinearConstraint(one_each, 1, 1)]
        constraints += [LinearConstraint(row[None, :], -np.inf, bound) for row, bound in self._rows]
        constraints += [LinearConstraint(row[None, :], -np.inf, len(self._starts) - 1) for row in self._excluded]
        with _quiet():
            result = milp(
                self._objective,
                constraints=constraints,
                integrality=np.ones(count),
                bounds=Bounds(0, self._allowed),
                options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT},
            )
        if result.x is None:
            if result.status == _TIMED_OUT:
                raise L4packError(f"the solver found nothing in {TIME_LIMIT:.0f} s", hint="measure fewer options")
            return None
        ends = [*self._starts[1:], count]
        picks = tuple(int(result.x[a:b].argmax()) for a, b in zip(self._starts, ends, strict=True))
        return picks, float(result.mip_dual_bound)


def _flat(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.asarray([value for row in rows for value in row], dtype=np.float64)


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS now and then writes a line of its own to the process's standard output, where results go."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def hull(losses: Sequence[Sequence[float]], nbytes: Sequence[Sequence[int]]) -> list[Picks]:
    """Solutions from the fewest bytes to the least loss, each optimal for exactly its bytes.

    Along every unit's lower convex hull of (bytes, loss), steps are taken in order of what a byte buys; after each step
    the solution minimises loss + price x bytes for the step's price, so nothing as small loses less (Everett 1963).
    """
    paths = [_unit_hull(row, sizes) for row, sizes in zip(losses, nbytes, strict=True)]
    steps = []
    for unit, path in enumerate(paths):
        for place, (old, new) in enumerate(pairwise(path)):
            gain = (losses[unit][old] - losses[unit][new]) / (nbytes[unit][new] - nbytes[unit][old])
            steps.append((-gain, unit, place, new))
    picks = [path[0] for path in paths]
    found = [tuple(picks)]
    for _, unit, _, new in sorted(steps):
        picks[unit] = new
        found.append(tuple(picks))
    return found


def _unit_hull(losses: Sequence[float], nbytes: Sequence[int]) -> list[int]:
    """The choices on a unit's lower convex hull, by ascending bytes and falling loss."""
    path: list[int] = []
    for choice in sorted(range(len(losses)), key=lambda index: (nbytes[index], losses[index])):
        if path and losses[choice] >= losses[path[-1]]:
            continue
        while len(path) > 1 and _above(path[-2], path[-1], choice, losses, nbytes):
            path.pop()
        path.append(choice)
    return path


def _above(first: int, middle: int, last: int, losses: Sequence[float], nbytes: Sequence[int]) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    rise = (losses[first] - losses[middle]) * (nbytes[last] - nbytes[first])
    return rise <= (losses[first] - losses[last]) * (nbytes[middle] - nbytes[first])
