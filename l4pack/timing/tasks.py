"""Seconds of each kind of task that a job is cut into, for whoever gives tasks to several workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from l4pack.model.tensors import Role
from l4pack.plan.plan import Plan
from l4pack.timing.counts import attending, running_mlp
from l4pack.timing.jobs import calibration_length, mlps_of, rounding_tasks, solving, tokens_of
from l4pack.timing.speeds import Speeds
from l4pack.timing.work import Kind, Work


@dataclass(frozen=True)
class TaskSeconds:
    """What one device takes, the disk aside: `rounding` all that needs no text, `attention` of one layer on all sequences,
    and each of the `mlps` of a role, solved where the plan solves any of them and run; in every stream.

    `attention_solving` is what solving it takes first, by one worker, whatever their number.
    """

    rounding: float
    attention: float
    mlps: Mapping[Role, float]
    attention_solving: float = 0.0


def task_seconds(plan: Plan, speeds: Speeds) -> TaskSeconds:
    """Of a plan's job where those are the speeds; without calibration there is nothing but rounding."""
    rounding = speeds.seconds(rounding_tasks(plan))
    if plan.needs is None:
        return TaskSeconds(rounding, 0.0, {})
    text, tokens, streams = plan.checkpoint.config.text, plan.needs.tokens, plan.needs.streams
    attention = attending(text, tokens, calibration_length(plan), Kind.TENSOR, speeds.device)
    schemes = {target.linear.role: target.scheme for target in plan.calibrated}
    mlps = {}
    for role, units in mlps_of(text).items():
        work, through = Work(), tokens_of(text, role, tokens)
        work.include(running_mlp(text, units.inner, through, Kind.TENSOR, "running", speeds.device), streams)
        if role in schemes:
            scheme = plan.recipe.schemes[schemes[role]]
            work.include(solving(plan, role, scheme, speeds.device, tokens))
        mlps[role] = speeds.seconds(work)
    solved = 0.0
    if Role.ATTENTION in schemes:
        scheme = plan.recipe.schemes[schemes[Role.ATTENTION]]
        solved = speeds.seconds(solving(plan, Role.ATTENTION, scheme, speeds.device, tokens))
    return TaskSeconds(rounding, streams * speeds.seconds(attention), mlps, solved)
