"""The file that `measure` writes and `fit` reads: what changing one unit alone does to the model's answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from l4pack.datafile import read_json, validate
from l4pack.model.tensors import Role
from l4pack.recipe import RecipeScheme
from l4pack.work.files import write_atomic

SCHEMA_VERSION = 1
MAX_BYTES = 64 * 1024 * 1024
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelId(_Data):
    """The model that was measured: its name, the digest of its headers and configuration, and its decoder layers.

    `weights` is the hex SHA-256 of its norms and routers, which every training changes and a copy does not.
    """

    name: str
    fingerprint: str
    weights: str = ""
    layers: Annotated[int, Field(gt=0)]


class ChangeRecord(_Data):
    """One unit, all matrices of a role in a layer, given one option while the rest stays as it is.

    `error` is ||y' - y||^2 / ||y||^2 of the unit's own output on the original inputs, summed over the measured tokens.
    `kl` is the mean over tokens of KL(original || changed) in nats, with its standard error over sequences; of a change
    that was not `measured` but predicted, from `error` or gradients, the standard error is the prediction's. `rerouting` is the part
    of it that comes of tokens which routers further on send elsewhere (see `combined`).
    """

    layer: Annotated[int, Field(ge=0)]
    role: Role
    option: str
    error: NonNegative
    kl: Annotated[float, Field(allow_inf_nan=False)]
    kl_standard_error: NonNegative
    measured: bool
    rerouting: NonNegative = 0


class Joint(_Data):
    """Many units changed at once: what the sum of their single changes predicts, and what was measured.

    `difference_standard_error` is that of measured - predicted, both on the same tokens. `combined` predicts it with
    `combined` below.
    """

    title: str
    choice: dict[str, str]  # role -> option, or "layer.role" -> option
    predicted: float
    measured: float
    standard_error: NonNegative
    difference_standard_error: NonNegative = 0
    combined: float | None = None


class PredictionFit(_Data):
    """Of `count` changes that were both predicted and measured, the median and the 90th percentile of
    |ln(predicted / measured)|."""

    count: Annotated[int, Field(ge=0)]
    median: NonNegative
    p90: NonNegative


class Linearity(PredictionFit):
    """How well errors predict KL within a unit, from its coarsest and its finest integer option; also by `families` of
    options (int4, int8, fp8), and for predictions in proportion to the error alone."""

    families: dict[str, PredictionFit] = {}
    proportional: PredictionFit | None = None


class SlopeFit(_Data):
    """How changes were predicted from gradients (see `measure.slopes`): what a rerouted token costs in nats a unit of
    margin, fitted to `count` measured changes, with the standard deviation of ln(predicted / measured) and its largest
    amount among them."""

    count: Annotated[int, Field(ge=0)]
    rerouting: NonNegative
    spread: NonNegative
    worst: NonNegative


class Total(_Data):
    """Single changes of one role to one option, added up over the layers; the standard error knows that all were
    measured on the same tokens."""

    role: Role
    option: str
    units: Annotated[int, Field(gt=0)]
    kl: Annotated[float, Field(allow_inf_nan=False)]
    kl_standard_error: NonNegative


class Sensitivity(_Data):
    """Everything one measurement found. A unit without a change for an option was not given it."""

    schema_version: Literal[1] = 1
    l4pack: str
    model: ModelId
    text: dict[str, Any]
    calibration: dict[str, Any]
    options: dict[str, RecipeScheme]
    changes: Annotated[list[ChangeRecord], Field(min_length=1)]
    totals: list[Total] = []
    joint: list[Joint] = []
    linearity: Linearity | None = None
    gradients: SlopeFit | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Sensitivity:
        seen = set()
        for change in self.changes:
            if change.option not in self.options:
                raise ValueError(f"changes: option '{change.option}' is not one of options")
            if change.layer >= self.model.layers:
                raise ValueError(f"changes: layer {change.layer} of a model of {self.model.layers}")
            seen.add((change.layer, change.role, change.option))
        if len(seen) != len(self.changes):
            raise ValueError("changes: one is there twice")
        return self

    def write(self, path: Path) -> None:
        """Put the record at `path`, all at once."""
        write_atomic(path, (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode())


def combined(changes: Iterable[ChangeRecord]) -> float:
    """KL of single changes made at once: what grows with the error adds up; what comes of rerouted tokens adds up as
    its squares do, because disturbances of a router's logits by different units are as good as independent."""
    found = list(changes)
    smooth = sum(change.kl - change.rerouting for change in found)
    return smooth + math.sqrt(sum(change.rerouting**2 for change in found))


def read_sensitivity(path: Path) -> Sensitivity:
    """A measurement from its file. Raises UsageError (not there, not JSON) or RecipeError (a wrong key)."""
    hint = "make one with: l4pack measure SOURCE --out sensitivity.json"
    return validate(Sensitivity, read_json(path, MAX_BYTES, hint), path.name)
