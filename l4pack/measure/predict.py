"""Predicting the KL of a change from others of the same unit.

For small changes of one matrix the expected loss rises in proportion to the squared relative error of its weights
(Malinovskii et al. 2025, "HIGGS", the linearity theorem, https://arxiv.org/abs/2411.17525). Here the error e is that of
the unit's output, ||y' - y||^2 / ||y||^2, which sees what the inputs are. A mixture of experts adds a part that the
theorem's smoothness leaves out: a token near a tie of some router further on goes to another expert. How many do is in
proportion to the size of the disturbance, not to its square, and what one of them costs does not depend on it. So

    KL = a e + b sqrt(e),    a, b >= 0 of every unit,

fitted to what was measured of the unit. Where no router follows, b comes out as 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.measure.changes import Single, anchors
from l4pack.measure.options import MeasureOptions, family
from l4pack.measure.record import Linearity, PredictionFit
from l4pack.measure.state import State

TOLERANCE = 0.2
"""Median |ln(predicted / measured)| up to which a family of options is predicted instead of measured."""

TINY = 1e-30


@dataclass(frozen=True)
class Clusters:
    """Which tokens belong together (`evaluate.statistics.clusters`), so that sums over each are all that is kept."""

    cluster: Tensor

    def sums(self, kl: Tensor) -> list[float]:
        """KL summed over every cluster."""
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.cluster, kl.double()).tolist()

    @property
    def count(self) -> int:
        """Clusters."""
        return int(self.cluster.max()) + 1

    def mean_and_error(self, sums: Sequence[float]) -> tuple[float, float]:
        """Mean a token and its standard error, of one change's sums or of several changes' added up."""
        sizes = torch.bincount(self.cluster, minlength=self.count).double()
        total = torch.tensor(sums, dtype=torch.float64)
        mean = float(total.sum() / sizes.sum())
        squares = float((total - mean * sizes).square().sum())
        return mean, math.sqrt(self.count / (self.count - 1) * squares) / len(self.cluster)


@dataclass(frozen=True)
class Estimate:
    """What a change costs: KL summed over clusters, the part of its mean that rerouted tokens make, and what the
    prediction itself may be off by, as a standard deviation of its logarithm (0: measured)."""

    sums: list[float]
    rerouting: float
    spread: float
    measured: bool


@dataclass(frozen=True)
class Law:
    """KL = smooth * e + rerouting * sqrt(e)."""

    smooth: float
    rerouting: float

    @classmethod
    def of(cls, points: Sequence[MeasuredPoint]) -> Law:
        """Least squares of points weighted by their standard errors, no coefficient below 0."""
        from scipy.optimize import nnls

        weights = [1 / max(point.standard_error, 1e-3 * abs(point.kl), 1e-30) for point in points]
        rows = [
            [weight * point.error, weight * math.sqrt(point.error)]
            for weight, point in zip(weights, points, strict=True)
        ]
        scale = [max(row[column] for row in rows) for column in (0, 1)]  # of one size, so that nnls is exact
        matrix = [[row[0] / scale[0], row[1] / scale[1]] for row in rows]
        found, _ = nnls(matrix, [weight * point.kl for weight, point in zip(weights, points, strict=True)])
        return cls(float(found[0] / scale[0]), float(found[1] / scale[1]))

    def __call__(self, error: float) -> float:
        """KL of a change with this error."""
        return self.smooth * error + self.rerouting * math.sqrt(error)


@dataclass(frozen=True)
class MeasuredPoint:
    """One measured change of a unit."""

    error: float
    kl: float
    standard_error: float
    option: str


@dataclass(frozen=True)
class _Check:
    """ln(predicted / measured) of one change, by the law and in proportion alone, and the noise of the measured value."""

    family: str
    law: float
    proportional: float
    noise: float


class Predictor:
    """Measured changes, and predictions of the others."""

    def __init__(self, singles: Sequence[Single], options: MeasureOptions, state: State, clusters: Clusters) -> None:
        self._state, self._options, self._clusters = state, options, clusters
        self._singles = list(singles)
        self._by_unit: dict[object, list[Single]] = {}
        for single in singles:
            if single.key in state.kl:
                self._by_unit.setdefault(single.unit, []).append(single)
        self._laws = {unit: self._law(measured) for unit, measured in self._by_unit.items()}
        self._checks = list(self._checked())

    def estimate(self, single: Single) -> Estimate:
        """A change's KL; some change of its unit must be measured."""
        law, known = self._laws[single.unit], self._by_unit[single.unit]
        error = self._state.errors[single.key]
        rerouting = law.rerouting * math.sqrt(error)
        if single.key in self._state.kl:
            return Estimate(self._state.kl[single.key], rerouting, 0.0, True)
        nearest = self._state.kl[self._nearest(error, known).key]
        mean = self._clusters.mean_and_error(nearest)[0]
        scale = law(error) / mean if mean > 0 else 0.0
        return Estimate([value * scale for value in nearest], rerouting, self._spread(family(single.option)), False)

    def linearity(self) -> Linearity:
        """How predictions from the anchors alone compare with what was measured."""
        names = sorted({check.family for check in self._checks})
        return Linearity(
            **_fit([check.law for check in self._checks]).model_dump(),
            families={name: _fit([check.law for check in self._of(name)]) for name in names},
            proportional=_fit([check.proportional for check in self._checks]),
        )

    def off(self) -> set[str]:
        """Families whose predictions are off by more than the tolerance and the noise, or were never put to the test."""
        excess = {
            name: sorted(abs(check.law) - check.noise for check in self._of(name))
            for name in {family(single.option) for single in self._singles}
        }
        return {name for name, values in excess.items() if not values or _rank(values, 0.5) > TOLERANCE}

    def _of(self, name: str) -> list[_Check]:
        return [check for check in self._checks if check.family == name]

    def _point(self, single: Single) -> MeasuredPoint:
        mean, error = self._clusters.mean_and_error(self._state.kl[single.key])
        return MeasuredPoint(self._state.errors[single.key], mean, error, single.option)

    def _law(self, measured: Sequence[Single]) -> Law:
        points = [point for point in map(self._point, measured) if point.error > 0]
        return Law.of(points) if points else Law(0.0, 0.0)

    def _nearest(self, error: float, known: Sequence[Single]) -> Single:
        def distance(one: Single) -> float:
            return abs(math.log(max(self._state.errors[one.key], TINY) / max(error, TINY)))

        return min(known, key=distance)

    def _checked(self) -> Iterable[_Check]:
        """Every measured change that the anchors predict."""
        for unit in self._by_unit.values():
            known = [one for one in unit if one.option in anchors(self._options, one.role)]
            law = self._law(known)
            for single in unit:
                point = self._point(single)
                if single in known or point.kl <= 0 or law(point.error) <= 0:
                    continue
                near = self._point(self._nearest(point.error, known))
                plain = near.kl * point.error / near.error if near.kl > 0 and near.error > 0 else point.kl
                yield _Check(
                    family(single.option),
                    math.log(law(point.error) / point.kl),
                    math.log(plain / point.kl),
                    point.standard_error / point.kl,
                )

    def _spread(self, name: str) -> float:
        """Standard deviation of ln(predicted / measured) in a family; of all where it has none; 1 where none has."""
        ratios = [check.law for check in self._of(name)] or [check.law for check in self._checks]
        return math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios)) if ratios else 1.0


def _fit(ratios: Sequence[float]) -> PredictionFit:
    ordered = sorted(map(abs, ratios))
    if not ordered:
        return PredictionFit(count=0, median=0, p90=0)
    return PredictionFit(count=len(ordered), median=_rank(ordered, 0.5), p90=_rank(ordered, 0.9))


def _rank(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def added(estimates: Iterable[Estimate]) -> list[float]:
    """KL of several changes, cluster by cluster."""
    return [sum(values) for values in zip(*(estimate.sums for estimate in estimates), strict=True)]
