"""A plan's job on so many workers of a cluster: what each reads and writes, and what waiting for one another costs.

The stages of a layer follow one another (see `calibration.spread`): a stage takes what its busiest worker takes, with tasks
given out the longest first (Graham's LPT: at most a third above the best there is). Tokens are taken as shared out evenly
among experts; a text that prefers some makes their tasks longer.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from l4pack.model.config import TextConfig
from l4pack.model.parts import attention_shapes, mlp_shapes
from l4pack.model.tensors import Role
from l4pack.plan.plan import Plan
from l4pack.recipe import RecipeScheme
from l4pack.timing.counts import FLOAT, attending, running_mlp
from l4pack.timing.jobs import calibration_length, mlps_of, rounding_tasks, solving, tokens_of, walking_back
from l4pack.timing.speeds import Speeds
from l4pack.timing.work import Kind

TASKS_A_WORKER = 3  # as `stream.spread` makes them, of what is shared out by rows or sequences
HIDDEN_READ = 4  # times hidden states are read in a layer: by attention, the router, solving, and running
HIDDEN_WRITTEN = 3  # the middle, the shared expert's outputs, the layer's


@dataclass(frozen=True)
class Spread:
    """What one of so many workers reads and writes, in bytes, and how long the job takes, in seconds.

    `waiting_share` is the part of their time that workers wait at the ends of stages; `layer_barrier_seconds` is that of
    one layer with experts, where there are any.
    """

    workers: int
    seconds: float
    alone_seconds: float
    waiting_share: float
    layer_barrier_seconds: float
    read_bytes: float
    write_bytes: float

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "workers": self.workers,
            "seconds": self.seconds,
            "seconds_alone": self.alone_seconds,
            "waiting_share": self.waiting_share,
            "layer_barrier_seconds": self.layer_barrier_seconds,
            "read_bytes_per_worker": round(self.read_bytes),
            "written_bytes_per_worker": round(self.write_bytes),
        }


def makespan(seconds: Iterable[float], workers: int) -> float:
    """How long so many workers take for tasks, each taking the longest that is left."""
    busy = [0.0] * workers
    for task in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + task)
    return max(busy)


def spread(plan: Plan, workers: int, speeds: Speeds) -> Spread:
    """A plan's job on so many workers, each as fast as `speeds`."""
    stages = [_rounding(plan, speeds)]
    text, barrier = plan.checkpoint.config.text, 0.0
    if plan.needs is not None:
        if plan.needs.gradient is not None:  # by whoever gives out the tasks
            stages.append([speeds.seconds(walking_back(plan, speeds.device))])
        moe, dense = len(text.moe_layers), text.num_hidden_layers - len(text.moe_layers)
        for count, kind in ((moe, True), (dense, False)):
            layer = list(_layer(plan, workers, speeds, moe=kind)) if count else []
            stages += count * layer
            barrier += sum(waited(stage, workers) for stage in layer) if kind else 0.0
    alone = sum(map(sum, stages))
    whole = sum(makespan(stage, workers) for stage in stages)
    read, written = _bytes(plan, workers)
    return Spread(workers, whole, alone, max(0.0, 1 - alone / (workers * whole)), barrier, read, written)


def waited(stage: list[float], workers: int) -> float:
    """How long each worker waits on average until a stage ends."""
    return max(0.0, makespan(stage, workers) - sum(stage) / workers)


def _rounding(plan: Plan, speeds: Speeds) -> list[float]:
    """A task's time is its share of all by the bytes it reads."""
    whole = speeds.seconds(rounding_tasks(plan))
    total = max(1, sum(task.read_bytes for task in plan.tasks))
    return [whole * task.read_bytes / total for task in plan.tasks]


def _layer(plan: Plan, workers: int, speeds: Speeds, *, moe: bool) -> Iterator[list[float]]:
    """The tasks of each stage of a layer, with experts or without."""
    assert plan.needs is not None
    text, device, tokens, streams = plan.checkpoint.config.text, speeds.device, plan.needs.tokens, plan.needs.streams
    parts = TASKS_A_WORKER * workers
    if (scheme := _scheme(plan, Role.ATTENTION)) is not None:
        yield [speeds.seconds(solving(plan, Role.ATTENTION, scheme, device, tokens))]
    attention = attending(text, streams * tokens, calibration_length(plan), Kind.TENSOR, device)
    yield [speeds.seconds(attention) / parts] * parts
    everyones = Role.SHARED_EXPERT if moe else Role.DENSE_MLP
    roles = {everyones: 1} | ({Role.ROUTED_EXPERT: text.num_local_experts} if moe else {})
    yield [
        size * speeds.seconds(solving(plan, role, scheme, device, tokens))
        for role, count in roles.items()
        if (scheme := _scheme(plan, role)) is not None
        for size in _together(count, plan.needs.together)
    ]
    yield [_running(text, everyones, streams * tokens, speeds) / parts] * parts
    if moe:
        yield [_running(text, Role.ROUTED_EXPERT, streams * tokens, speeds)] * text.num_local_experts


def _together(count: int, most: int) -> list[int]:
    """How many units each task solves: on a device, as many at once as its memory takes."""
    step = max(1, most)
    return [min(step, count - first) for first in range(0, count, step)]


def _running(text: TextConfig, role: Role, tokens: float, speeds: Speeds) -> float:
    through, inner = tokens_of(text, role, tokens), mlps_of(text)[role].inner
    return speeds.seconds(running_mlp(text, inner, through, Kind.TENSOR, role.value, speeds.device))


def _scheme(plan: Plan, role: Role) -> RecipeScheme | None:
    """How a role's units are solved; None where they are not."""
    found = next((target.scheme for target in plan.calibrated if target.linear.role is role), None)
    return None if found is None else plan.recipe.schemes[found]


def _bytes(plan: Plan, workers: int) -> tuple[float, float]:
    """What a worker reads and writes: its share, and with calibration every layer's attention and shared expert."""
    read, written = plan.read_bytes / workers, plan.artifact_bytes / workers
    if plan.needs is None:
        return read, written
    text = plan.checkpoint.config.text
    width = max(text.intermediate_size, text.intermediate_size_mlp)
    everyones = sum(map(math.prod, (*attention_shapes(text).values(), *mlp_shapes(text.hidden_size, width).values())))
    hidden = plan.needs.streams * plan.needs.tokens * text.hidden_size * FLOAT * text.num_hidden_layers / workers
    experts = plan.source_weight_bytes / workers  # read once to be solved, and once to be run
    return (
        read + experts + 2 * everyones * text.num_hidden_layers + HIDDEN_READ * hidden,
        written + HIDDEN_WRITTEN * hidden,
    )
