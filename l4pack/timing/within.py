"""The largest calibration that ends in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from l4pack.errors import BudgetError, UsageError
from l4pack.plan.plan import Plan
from l4pack.timing.jobs import quantizing
from l4pack.timing.kl import Cost, cost_of
from l4pack.timing.speeds import Speeds, predict
from l4pack.units import human_seconds


@dataclass(frozen=True)
class Chosen:
    """Samples to calibrate on, of those the recipe would take, and what taking fewer is expected to cost."""

    samples: int
    full: int
    cost: Cost

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "calibration_samples": self.samples,
            "full_samples": self.full,
            "expected_kl_factor": [self.cost.least, self.cost.most],
        }

    def describe(self) -> str:
        """In a line."""
        if self.samples == self.full:
            return f"all {self.full:,} calibration samples end in time"
        return (
            f"{self.samples:,} of {self.full:,} calibration samples end in time; KL is expected {self.cost.least:.2f} to "
            f"{self.cost.most:.2f} times that of all (as two small stand-ins showed it)"
        )


def largest_calibration(plan: Plan, seconds: float, speeds: Speeds) -> Chosen:
    """The most samples, of those the plan's recipe takes, whose job is predicted to end in `seconds`.

    Raises UsageError for a plan that calibrates nothing, BudgetError when even one sample takes longer.
    """
    if plan.needs is None or plan.recipe.calibration is None:
        raise UsageError(
            f"recipe {plan.recipe.name} needs no calibration, --within means nothing to it", hint="leave the option out"
        )
    full = plan.recipe.calibration.samples
    each = plan.needs.tokens / full

    def time(samples: int) -> float:
        return predict(quantizing(plan, speeds.device, round(samples * each)), speeds).seconds

    if (least := time(1)) > seconds:
        raise BudgetError(
            f"even one calibration sample takes {human_seconds(least)} on {speeds.name}, {human_seconds(seconds)} are given",
            hint="give more time or a faster machine, or take a recipe without calibration, such as int4-rtn",
        )
    fits, late = 1, full + 1
    while late - fits > 1:
        middle = (fits + late) // 2
        fits, late = (middle, late) if time(middle) <= seconds else (fits, middle)
    return Chosen(fits, full, cost_of(plan.checkpoint.config.text, fits * each, full * each))
