"""How long jobs take, as every command asks and says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4pack.cli import console
from l4pack.errors import L4packError, UsageError
from l4pack.units import given_size, human_bytes, human_seconds, parse_duration, parse_size
from l4pack.work.device import CPU

if TYPE_CHECKING:
    from rich.console import RenderableType

    from l4pack.model.config import TextConfig
    from l4pack.plan.plan import Plan, RunLimits
    from l4pack.timing.jobs import LayerWeights
    from l4pack.timing.speeds import Prediction, Speeds
    from l4pack.timing.spread import Spread
    from l4pack.timing.within import Chosen
    from l4pack.timing.work import Work

WORTH_MEASURING = 10**9  # bytes that a job reads: less is done before the machine is measured
DEFAULT_SAMPLES = 32  # of `evaluate`
_SHOWN = 5  # phases, those that take most


@dataclass(frozen=True)
class Hours:
    """What the user wants to know of a job's time: where it would run (None: here, on `device`, with the disk of
    `folder`), at which price an hour; `planned` when the job itself is not to run now."""

    on: str | None
    devices: Path | None
    price: float | None
    device: str
    folder: Path
    planned: bool = True

    def __post_init__(self) -> None:
        """Raises UsageError for a price that is none, a name without `planned`, and a name that is not known."""
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise UsageError(f"--price {self.price:g} is no price", hint="give what an hour costs, for example 2.5")
        if self.on is not None and not self.planned:
            raise UsageError(
                "--on says where a job would run, and this one runs here", hint="add --dry-run, or leave it out"
            )
        if self.devices is not None and self.on is None:
            raise UsageError("--devices goes with --on", hint="add --on NAME, or leave it out")
        if self.on is not None:
            self._named()

    @property
    def kind(self) -> str:
        """The kind of device that the job would run on."""
        return self.device.partition(":")[0] if self.on is None else self._named().device

    def limits(self, max_ram: str | None, max_vram: str | None, shard_size: str | None) -> RunLimits:
        """What a run may take where it would run: of a named device, all its memory unless less is said.

        Raises UsageError for what is no size.
        """
        from l4pack.containers.safetensors_folder import DEFAULT_SHARD_BYTES
        from l4pack.plan.limits import limits_here
        from l4pack.plan.plan import RunLimits

        ram, vram = map(given_size, (max_ram, max_vram))
        shard = DEFAULT_SHARD_BYTES if shard_size is None else parse_size(shard_size)
        if self.on is None:
            return limits_here(self.device, max_ram=ram, max_vram=vram, shard_bytes=shard)
        rooms = [room for room in (vram, self._named().vram) if room is not None]
        return RunLimits(ram, min(rooms, default=None), accelerated=self.kind != CPU, shard_bytes=shard)

    def predict(self, stages: Sequence[Work], nbytes: int) -> Prediction | None:
        """The time of a job that reads so many bytes; None where nothing is known of this machine."""
        speeds = self.speeds(nbytes)
        if speeds is None:
            return None
        from l4pack.timing.speeds import predict

        return predict(stages, speeds, self.price)

    def quantizing(self, plan: Plan) -> Prediction | None:
        """The time of a plan's job."""
        from l4pack.timing.jobs import quantizing

        return self.predict(quantizing(plan, self.kind), plan.read_bytes)

    def spread(self, plan: Plan, workers: int | None) -> Spread | None:
        """A plan's job on so many workers, each as fast as what the hours are of; None where nothing is known of that."""
        speeds = None if workers is None else self.speeds(plan.read_bytes)
        if workers is None or speeds is None:
            return None
        from l4pack.timing.spread import spread

        return spread(plan, workers, speeds)

    def spread_evaluating(
        self, plan: Plan, workers: int | None, samples: int = DEFAULT_SAMPLES, length: int | None = None
    ) -> Spread | None:
        """What `evaluate` takes of the plan's artifact beside its original, by default or on `samples`, on so many
        workers."""
        from l4pack.timing.jobs import both_weights, tokens_at_most

        text = plan.checkpoint.config.text
        return self.spread_over(text, both_weights(plan), tokens_at_most(text, samples, length), workers)

    def spread_over(
        self, text: TextConfig, models: Sequence[LayerWeights], tokens: tuple[int, int], workers: int | None
    ) -> Spread | None:
        """Models evaluated on `tokens`, in sequences of the length beside them, on so many workers."""
        speeds = None if workers is None else self.speeds(sum(model.nbytes for model in models))
        if workers is None or speeds is None:
            return None
        from l4pack.timing.spread_evaluation import Evaluated, spread_evaluation

        itemsize = 4 if self.kind == CPU else 2
        return spread_evaluation(Evaluated(text, models, *tokens, itemsize), workers, speeds)

    def spread_measuring(self, waves: Sequence[Sequence[Work]], workers: int, read_bytes: int) -> Spread | None:
        """Waves of a measurement on so many workers, which read so many bytes of weights together."""
        speeds = self.speeds(read_bytes)
        if speeds is None:
            return None
        from l4pack.timing.spread_evaluation import spread_waves

        return spread_waves(waves, workers, speeds, read_bytes)

    def largest_calibration(self, plan: Plan, within: str) -> Chosen:
        """The most calibration samples that end `within` a time. Raises UsageError, BudgetError."""
        from l4pack.timing.within import largest_calibration

        seconds, speeds = parse_duration(within), self.speeds(WORTH_MEASURING)
        if speeds is None:
            raise UsageError(
                "this machine can't be measured without what quantizes",
                hint="install 'l4pack[quantize]', or add --on NAME",
            )
        return largest_calibration(plan, seconds, speeds)

    def speeds(self, nbytes: int) -> Speeds | None:
        """What is known of where it runs; this machine is measured for a plan, or for a job that takes long."""
        if self.on is not None:
            return self._named()
        from l4pack.timing.kept import here

        try:
            return here(self.folder, self.device, take=self.planned or nbytes >= WORTH_MEASURING, say=console.talk)
        except L4packError as error:
            console.warning(error.message)
            return None

    def _named(self) -> Speeds:
        from l4pack.timing.named import named_speeds

        assert self.on is not None
        return named_speeds(self.on, self.devices)


def within_time(
    plan: Plan, allowed: RunLimits, hours: Hours, within: str | None, samples: int | None
) -> tuple[Plan, Chosen | None]:
    """The plan with as many calibration samples as end in time, where that is asked for.

    Raises UsageError where `samples` are given too, and what `Hours.largest_calibration` does.
    """
    if within is None:
        return plan, None
    if samples is not None:
        raise UsageError("--within chooses --calibration-samples", hint="give one of the two")
    from l4pack.plan.plan import make_plan

    fitted = hours.largest_calibration(plan, within)
    return make_plan(plan.checkpoint, plan.recipe.calibrating(samples=fitted.samples), allowed), fitted


def within_record(fitted: Chosen | None) -> dict[str, Any]:
    """What `--within` chose, as JSON."""
    return {} if fitted is None else {"within": fitted.record()}


def within_view(fitted: Chosen | None) -> list[RenderableType]:
    """What `--within` chose, for people."""
    return [] if fitted is None else [f"within    {fitted.describe()}"]


def predicted_record(prediction: Prediction | None) -> dict[str, Any]:
    """A prediction as JSON, None where there is none."""
    return {"predicted": None if prediction is None else prediction.record()}


def predicted_seconds(prediction: Prediction | None) -> float | None:
    """What stands beside the seconds that a job took."""
    return None if prediction is None else prediction.seconds


def hours_view(prediction: Prediction | None) -> list[RenderableType]:
    """A prediction for people."""
    if prediction is None:
        return ["time      not known: this machine has not been measured; --on NAME says it for another"]
    speeds = prediction.speeds
    cost = "" if prediction.dollars is None else f", ${prediction.dollars:,.2f}"
    parts = sorted(prediction.phases.items(), key=lambda item: -item[1])
    shown = [f"{name} {human_seconds(time)}" for name, time in parts[:_SHOWN] if time]
    return [
        f"time      {human_seconds(prediction.seconds)}{cost} on {console.plain(speeds.name)} ({console.plain(speeds.basis)})",
        f"          {', '.join(shown)}",
    ]


def spread_record(shared: Spread | None, evaluated: Spread | None = None) -> dict[str, Any]:
    """A job on a cluster, as JSON, and what comes of evaluating after it."""
    if shared is None:
        return {}
    return {"cluster": shared.record() | ({} if evaluated is None else {"evaluate": evaluated.record()})}


def spread_view(shared: Spread | None, evaluated: Spread | None = None) -> list[RenderableType]:
    """A job on a cluster, for people, and how long evaluating takes after it."""
    if shared is None:
        return []
    lines = [
        f"cluster   {human_seconds(shared.seconds)} of computing on {shared.workers:,} such workers, "
        f"{human_seconds(shared.alone_seconds)} on one; {shared.waiting_share:.0%} of their time they wait for one another",
        f"          each reads {human_bytes(round(shared.read_bytes))} and writes {human_bytes(round(shared.write_bytes))}",
    ]
    if shared.layer_barrier_seconds:
        lines.append(f"          a layer's ends of stages cost {human_seconds(shared.layer_barrier_seconds)} of each")
    if evaluated is not None:
        lines.append(f"          `l4pack evaluate` of what comes of it takes {human_seconds(evaluated.seconds)} there")
    return [*lines]


def beside_view(prediction: Prediction | None, actual: float) -> list[RenderableType]:
    """What was predicted beside what it took."""
    if prediction is None:
        return []
    ratio = actual / max(prediction.seconds, 1e-9)
    return [
        f"took {human_seconds(actual)}, {ratio:.2f} times the {human_seconds(prediction.seconds)} that were predicted"
    ]
