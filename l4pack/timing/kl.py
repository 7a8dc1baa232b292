"""What calibrating on fewer tokens costs in KL, as stand-ins showed it.

An expert solves a matrix with as many unknowns as it has inputs, so what counts is how many tokens an expert gets for
each of them: the stand-ins' curves are read at the same tokens an expert and input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from l4pack.datafile import read_yaml, validate
from l4pack.model.config import TextConfig

DATA = Path(__file__).parent / "kl.yaml"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StandIn(BaseModel):
    """A trained model that was measured: KL by tokens calibrated on, 0 being rounding alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: Annotated[int, Field(gt=0)]
    hidden: Annotated[int, Field(gt=0)]
    kl: Annotated[dict[int, Positive], Field(min_length=3)]

    def at(self, share: float) -> float:
        """KL at so many tokens an expert and input: interpolated over their logarithm, level beyond what was measured
        most, and towards rounding's in proportion below what was measured least."""
        points = [(tokens / self.experts / self.hidden, kl) for tokens, kl in sorted(self.kl.items())]
        (_, rounded), *points = points
        if share <= points[0][0]:
            return rounded + (points[0][1] - rounded) * share / points[0][0]
        for (low, before), (high, after) in pairwise(points):
            if share <= high:
                return before + (after - before) * math.log(share / low) / math.log(high / low)
        return points[-1][1]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stand_ins: Annotated[dict[str, StandIn], Field(min_length=1)]


@dataclass(frozen=True)
class Cost:
    """KL as a factor over that of the full calibration, on the stand-in that loses least and on the one that loses most."""

    least: float
    most: float


@cache
def stand_ins() -> dict[str, StandIn]:
    """Those that ship."""
    return validate(_File, read_yaml(DATA), str(DATA)).stand_ins


def cost_of(text: TextConfig, tokens: float, full: float) -> Cost:
    """What `tokens` cost a model that might have had `full`."""
    experts = text.num_local_experts / text.num_experts_per_tok if text.moe_layers else 1
    shares = [count / experts / text.hidden_size for count in (tokens, full)]
    factors = [one.at(shares[0]) / one.at(shares[1]) for one in stand_ins().values()]
    return Cost(min(factors), max(factors))
