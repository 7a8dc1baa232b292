"""Predicting the KL of changes from gradients, a handful of measured ones telling what gradients can't.

For a change d of what a unit gives at token t

    KL = mean (g . d)^2 / 2  +  b * mean |r . d|

The first term is the second-order one: g is the gradient of cross-entropy on the model's own answers, whose outer products
average to the Fisher matrix, which is the curvature of KL. It is exact where no router comes after. Where one does, tokens
near a tie go to another expert, which no derivative of the answers sees. How many do is in proportion to how far d moves
them towards it, |r . d|, with r the gradient of the routers' margins (`gradient.keep`); what one of them costs, `b`, is one
number of the model, fitted to the measured changes by least squares in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from l4pack.measure.changes import Single
from l4pack.measure.predict import Clusters, Estimate
from l4pack.measure.record import SlopeFit
from l4pack.measure.state import State

TINY = 1e-30


@dataclass(frozen=True)
class Point:
    """Means over tokens of one measured change: both terms, and KL."""

    smooth: float
    rerouting: float
    kl: float

    def log_ratio(self, each: float) -> float:
        """ln(predicted / measured), where rerouted tokens cost that much each."""
        return math.log(max(self.smooth + each * self.rerouting, TINY) / self.kl)


class SlopePredictor:
    """Measured changes, and predictions of the others."""

    def __init__(self, singles: Sequence[Single], state: State, clusters: Clusters) -> None:
        self._state, self._clusters = state, clusters
        points = [self._point(single) for single in singles if single.key in state.kl]
        self._points = [point for point in points if point.kl > 0]
        self.each = cost_of_rerouting(self._points)

    def estimate(self, single: Single) -> Estimate:
        """A change's KL."""
        terms = self._state.terms[single.key]
        rerouting = self.each * self._clusters.mean_and_error(terms.rerouting)[0]
        if single.key in self._state.kl:
            return Estimate(self._state.kl[single.key], rerouting, 0.0, True)
        sums = [one + self.each * other for one, other in zip(terms.smooth, terms.rerouting, strict=True)]
        return Estimate(sums, rerouting, self._spread, False)

    def fit(self) -> SlopeFit:
        """What was fitted, and how well."""
        ratios = [point.log_ratio(self.each) for point in self._points]
        worst = max(map(abs, ratios), default=0.0)
        return SlopeFit(count=len(ratios), rerouting=self.each, spread=self._spread, worst=worst)

    @property
    def _spread(self) -> float:
        """Standard deviation of ln(predicted / measured), one number being fitted; 1 where nothing was."""
        squares = [point.log_ratio(self.each) ** 2 for point in self._points]
        return math.sqrt(sum(squares) / (len(squares) - 1)) if len(squares) > 1 else 1.0

    def _point(self, single: Single) -> Point:
        terms = self._state.terms[single.key]
        found = (terms.smooth, terms.rerouting, self._state.kl[single.key])
        return Point(*(self._clusters.mean_and_error(sums)[0] for sums in found))


def cost_of_rerouting(points: Sequence[Point]) -> float:
    """The `b` of least squares in logarithms; 0 where no change moves any margin."""
    from scipy.optimize import minimize_scalar

    moving = [point for point in points if point.rerouting > 0]
    if not moving:
        return 0.0
    # At least the best lies where one of them is right, or beyond it is none that has too little without.
    ends = [math.log(max(point.kl - point.smooth, 1e-3 * point.kl) / point.rerouting) for point in moving]

    def squares(log: float) -> float:
        return sum(point.log_ratio(math.exp(log)) ** 2 for point in moving)

    if min(ends) == max(ends):
        return math.exp(min(ends))
    found = minimize_scalar(squares, bounds=(min(ends), max(ends)), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))
