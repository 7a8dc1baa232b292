"""Predicting the KL of a change from another of the same unit.

For small changes of one matrix the expected loss rises in proportion to the squared relative error of its weights
(Malinovskii et al. 2025, "HIGGS", the linearity theorem, https://arxiv.org/abs/2411.17525). Here the error is that of
the unit's output, ||y' - y||^2 / ||y||^2, which sees what the inputs are, and the factor is each unit's own: it is
taken from the measured change of that unit whose error is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.sensitivity.changes import Single, anchors
from l4pack.sensitivity.options import Options, family
from l4pack.sensitivity.record import Fit, Linearity
from l4pack.sensitivity.state import State

TOLERANCE = 0.2
"""Median |ln(predicted / measured)| up to which a family of options is predicted instead of measured."""


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
    """What a change costs: KL summed over clusters, and what the prediction itself may be off by (0: measured)."""

    sums: list[float]
    spread: float
    measured: bool


class Predictor:
    """Measured changes, and predictions of the others."""

    def __init__(self, singles: Sequence[Single], options: Options, state: State) -> None:
        self._state, self._options = state, options
        self._singles = list(singles)
        self._by_unit: dict[object, list[Single]] = {}
        for single in singles:
            if single.key in state.kl:
                self._by_unit.setdefault(single.unit, []).append(single)
        self._checks = list(self._checked())

    def estimate(self, single: Single) -> Estimate | None:
        """A change's KL; None where nothing of its unit was measured."""
        if single.key in self._state.kl:
            return Estimate(self._state.kl[single.key], 0.0, True)
        sums = self._predicted(single, self._by_unit.get(single.unit, ()))
        return None if sums is None else Estimate(sums, self._spread(family(single.option)), False)

    def linearity(self) -> Linearity:
        """How predictions from the anchors alone compare with what was measured."""
        fits = {name: _fit(self._ratios([name])) for name in sorted({name for name, _ in self._checks})}
        return Linearity(**_fit(self._ratios(fits)).model_dump(), families=fits)

    def off(self) -> set[str]:
        """Families whose predictions are off by more than the tolerance, or were never put to the test."""
        fits = self.linearity().families
        every = {family(single.option) for single in self._singles}
        return {name for name in every if name not in fits or fits[name].median > TOLERANCE}

    def _checked(self) -> Iterable[tuple[str, float]]:
        """Families and ln(predicted / measured) of every measured change that the anchors predict."""
        for unit in self._by_unit.values():
            from_ = [one for one in unit if one.option in anchors(self._options, one.role)]
            for single in unit:
                sums = self._predicted(single, [one for one in from_ if one != single])
                measured = sum(self._state.kl[single.key])
                if sums is not None and sum(sums) > 0 and measured > 0:
                    yield family(single.option), math.log(sum(sums) / measured)

    def _predicted(self, single: Single, known: Sequence[Single]) -> list[float] | None:
        error = self._state.errors[single.key]
        usable = [one for one in known if self._state.errors[one.key] > 0]
        if not usable:
            return None
        if error == 0:
            return [0.0] * len(self._state.kl[usable[0].key])
        nearest = min(usable, key=lambda one: abs(math.log(self._state.errors[one.key] / error)))
        scale = error / self._state.errors[nearest.key]
        return [value * scale for value in self._state.kl[nearest.key]]

    def _ratios(self, families: Iterable[str]) -> list[float]:
        wanted = set(families)
        return [ratio for name, ratio in self._checks if name in wanted]

    def _spread(self, name: str) -> float:
        """Standard deviation of ln(predicted / measured) in a family, of all where it has none."""
        ratios = self._ratios([name]) or [ratio for _, ratio in self._checks]
        return math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios)) if ratios else 1.0


def _fit(ratios: Sequence[float]) -> Fit:
    ordered = sorted(map(abs, ratios))
    if not ordered:
        return Fit(count=0, median=0, p90=0)
    return Fit(count=len(ordered), median=_rank(ordered, 0.5), p90=_rank(ordered, 0.9))


def _rank(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def added(estimates: Iterable[Estimate]) -> list[float]:
    """KL of several changes, cluster by cluster."""
    return [sum(values) for values in zip(*(estimate.sums for estimate in estimates), strict=True)]
