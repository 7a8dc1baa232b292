"""What a machine or a device does a second, and the time that work takes on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from l4pack.timing.work import DISK, Kind, Work

WAITING = "waiting for the disk"


@dataclass(frozen=True)
class Speeds:
    """Amounts of each kind of work a second, of one of `devices` alike; `basis` says how they are known.

    Kinds that are not among the `rates` take no time there.
    """

    name: str
    rates: Mapping[Kind, float]
    basis: str
    devices: int = 1
    device: str = "cpu"  # its kind: which way the work is done
    vram: int | None = None  # bytes of a device's memory, where it is named

    def seconds(self, work: Work, kinds: Iterable[Kind] | None = None) -> float:
        """Time of work on one of the devices, of all kinds but the disk's unless some are named."""
        wanted = set(Kind) - set(DISK) if kinds is None else set(kinds)
        return sum(amount / self.rates[kind] for _, kind, amount in work.items() if kind in wanted & self.rates.keys())


@dataclass(frozen=True)
class Prediction:
    """Seconds of a job by phase, and what they are known from."""

    phases: Mapping[str, float]
    speeds: Speeds
    price_per_hour: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of the whole job."""
        return math.fsum(self.phases.values())

    @property
    def dollars(self) -> float | None:
        """What the job costs, if an hour's price is known."""
        return None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "seconds": self.seconds,
            "phases": dict(self.phases),
            "on": self.speeds.name,
            "basis": self.speeds.basis,
            "dollars": self.dollars,
        }


def predict(stages: Iterable[Work], speeds: Speeds, price_per_hour: float | None = None) -> Prediction:
    """The time of stages that follow one another; in each, the disk works while everything else does.

    Devices share what they compute evenly; the disk is one for all.
    """
    phases: dict[str, float] = {}
    waiting = 0.0
    for work in stages:
        computing = 0.0
        for phase, amounts in work.phases.items():
            one = Work()
            one.phases[phase] = amounts
            seconds = speeds.seconds(one) / (1 if phase == "starting" else speeds.devices)
            phases[phase] = phases.get(phase, 0.0) + seconds
            computing += seconds
        waiting += max(0.0, speeds.seconds(work, DISK) - computing)
    return Prediction(
        {**{name: time for name, time in phases.items() if time}, WAITING: waiting}, speeds, price_per_hour
    )


def joined(predictions: Sequence[Prediction]) -> Prediction:
    """Jobs that follow one another on the same machine as one."""
    phases: dict[str, float] = {}
    for one in predictions:
        for name, seconds in one.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds
    return replace(predictions[0], phases=phases)
