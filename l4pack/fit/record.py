"""What `fit` decided, as data: the other half of its recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from l4pack.fit.fit import Fitted
from l4pack.fit.frontier import FrontierPoint
from l4pack.fit.losses import Losses
from l4pack.fit.units import Choice, UnitChoices
from l4pack.measure.record import Joint

MAX_BYTES = 16 * 1024 * 1024
Bytes = Annotated[int, Field(ge=0, le=2**60)]
PredictedKl = Annotated[float, Field(ge=0, le=1e6)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Chosen(_Data):
    """What one unit got."""

    layer: int
    role: str
    option: str
    bytes: Bytes
    kl: PredictedKl


class SizedArtifact(_Data):
    """One artifact: bytes of its tensors, its predicted KL, and a name where it has one."""

    name: str
    bytes: Bytes
    predicted_kl: PredictedKl


class Additivity(_Data):
    """What was measured over what a sum of single changes predicts: the extremes of `count` mixtures of the record."""

    count: int
    least: PredictedKl
    most: PredictedKl


class FitRecord(_Data):
    """Everything `fit --json` says. Bytes and nats are plain numbers."""

    model: str
    budget: str
    runtime: str
    stand_in: bool
    measured_on: str
    by: str = "layer"
    weight_bytes: Bytes
    artifact_bytes: Bytes
    bits_per_weight: float
    predicted_kl: PredictedKl
    predicted_kl_combined: PredictedKl | None = None
    gap: Annotated[float, Field(ge=0)]
    optimal: bool
    headroom_bytes: int | None = None
    recipe: str | None = None
    choice: list[Chosen]
    uniform: list[SizedArtifact]
    steps: list[SizedArtifact]
    frontier: list[SizedArtifact]
    left_out: list[dict[str, str]] = []
    additivity: Additivity | None = None
    key: str | None = None  # digest of what was asked, where a record is kept to be found again

    def to_json(self) -> bytes:
        """The record's file."""
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()


def fit_record(fitted: Fitted, recipe: Path | None = None) -> FitRecord:
    """The record of a fit whose recipe was written to `recipe`."""
    picked = [unit.choices[pick] for unit, pick in zip(fitted.units, fitted.solution.picks, strict=True)]
    return FitRecord(
        model=fitted.model,
        budget=fitted.budget,
        runtime=fitted.wish.runtime,
        stand_in=fitted.losses.stand_in,
        measured_on=fitted.losses.measured_on,
        by=fitted.by,
        weight_bytes=fitted.weight_bytes,
        artifact_bytes=fitted.artifact_bytes,
        bits_per_weight=fitted.bits,
        predicted_kl=fitted.solution.loss,
        predicted_kl_combined=fitted.combined,
        gap=fitted.solution.gap,
        optimal=fitted.solution.optimal,
        headroom_bytes=None if fitted.memory is None else fitted.memory.headroom_bytes,
        recipe=None if recipe is None else str(recipe),
        choice=[
            Chosen(layer=layer, role=unit.role.value, option=one.option, bytes=one.nbytes // len(unit.layers), kl=kl)
            for unit, one in zip(fitted.units, picked, strict=True)
            for layer, kl in _by_layer(fitted.losses, unit, one)
        ],
        uniform=[_size(point) for point in fitted.uniform],
        steps=[_size(point) for point in fitted.steps],
        frontier=[_size(point) for point in fitted.frontier],
        left_out=[
            {"option": option, "role": role.value, "why": "; ".join(reasons)}
            for (option, role), reasons in fitted.left_out.items()
        ],
        additivity=_additivity(fitted.losses.joint),
    )


def _by_layer(losses: Losses, unit: UnitChoices, choice: Choice) -> list[tuple[int, float]]:
    """What a choice is predicted to cost in each of its unit's layers."""
    found = [(layer, losses.kl.get((layer, unit.role), {})) for layer in unit.layers]
    return [(layer, kl.get(choice.option, 0.0)) for layer, kl in found]


def read_fit(path: Path) -> FitRecord | None:
    """A record from its file, or None where there is none that can be read."""
    try:
        return FitRecord.model_validate_json(path.read_bytes()) if path.stat().st_size <= MAX_BYTES else None
    except (OSError, ValidationError):
        return None


def _additivity(joint: Sequence[Joint]) -> Additivity | None:
    ratios = [max(0.0, one.measured / one.predicted) for one in joint if one.predicted > 0]
    return Additivity(count=len(ratios), least=min(ratios), most=max(ratios)) if ratios else None


def _size(point: FrontierPoint) -> SizedArtifact:
    return SizedArtifact(name=point.name, bytes=point.nbytes, predicted_kl=point.kl)
