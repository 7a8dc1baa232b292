"""What bytes buy: the frontier of bytes against KL, uniform recipes beside it, and the worth of a little more or less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from l4pack.fit.solve import CostLimit, Picks, hull, select, total
from l4pack.fit.units import UnitChoices
from l4pack.recipe import KEEP
from l4pack.units import GIB

POINTS = 24
STEPS = (-1, 1, 2, 4)  # GiB of weights; percent of them where that says more
LARGE = 16 * GIB


@dataclass(frozen=True)
class FrontierPoint:
    """One artifact: bytes of all its tensors, predicted KL in nats, and what it is called."""

    name: str
    nbytes: int
    kl: float


@dataclass(frozen=True)
class Ground:
    """The losses and bytes that every question about a model's units is answered from; `fixed` is what no choice changes."""

    units: Sequence[UnitChoices]
    losses: Sequence[Sequence[float]]
    nbytes: Sequence[Sequence[int]]
    fixed: int

    def point(self, name: str, picks: Picks) -> FrontierPoint:
        """Where a solution lies."""
        return FrontierPoint(name, self.fixed + total(self.nbytes, picks), float(total(self.losses, picks)))


def uniform_points(ground: Ground) -> list[FrontierPoint]:
    """One option wherever it may be given, for every option of the role that holds most weights."""
    weights: Counter[str] = Counter()
    for unit in ground.units:
        weights[unit.role.value] += unit.numel
    most = weights.most_common(1)[0][0]
    names = sorted({choice.option for unit in ground.units if unit.role.value == most for choice in unit.choices})
    return [ground.point(name, _uniform(ground.units, name)) for name in names]


def frontier(ground: Ground, others: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The best artifacts within about POINTS sizes from the smallest to the original, and within those of `others`."""
    on_hull = [ground.point("", picks) for picks in hull(ground.losses, ground.nbytes)]
    best: list[FrontierPoint] = []
    for point in sorted({*on_hull, *others}, key=lambda point: (point.nbytes, point.kl, point.name)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    first, last = best[0].nbytes, best[-1].nbytes
    budgets = [first + (last - first) * step // (POINTS - 1) for step in range(POINTS)]
    budgets += [point.nbytes for point in others]
    shown = {max(index for index, point in enumerate(best) if point.nbytes <= budget) for budget in budgets}
    return [point for index, point in enumerate(best) if index in shown]


def steps_around(ground: Ground, picks: Picks) -> list[FrontierPoint]:
    """The best artifacts of a little fewer and more bytes of weights than a solution's; sizes nothing meets are left out."""
    here = total(ground.nbytes, picks)
    large = ground.fixed + here >= LARGE
    found = []
    for step in STEPS:
        change = step * GIB if large else step * (ground.fixed + here) // 100
        solution = select(ground.losses, ground.nbytes, [CostLimit(ground.nbytes, here + change)])
        if solution is not None:
            name = f"{step:+d} {'GiB' if large else '%'}"
            found.append(ground.point(name, solution.picks))
    return found


def _uniform(units: Sequence[UnitChoices], option: str) -> Picks:
    names = [[choice.option for choice in unit.choices] for unit in units]
    return tuple(row.index(option if option in row else KEEP) for row in names)
