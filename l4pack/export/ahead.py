"""Whether an artifact to come can be exported: known from its plan, before the hours that solving it takes."""

from __future__ import annotations

from collections.abc import Sequence

from l4pack.errors import UsageError
from l4pack.export.known import target_named
from l4pack.export.plan import EXACT_RECIPE
from l4pack.plan.assign import Target as Planned
from l4pack.plan.plan import Plan
from l4pack.quant.suffixes import Suffix


def check_ahead(plan: Plan, containers: Sequence[str]) -> None:
    """Raise UsageError for a container that would not hold the artifact to come exactly, as far as its plan tells.

    Its scales are not known yet: one that a container does not have is found when the export begins.
    """
    made = [target for task in plan.tasks for target in task.targets if target.scheme in plan.recipe.schemes]
    alike = {(target.scheme, target.linear.in_features): target for target in made}
    for name in containers:
        container = target_named(name)
        container.check_model(plan.checkpoint.config)
        for target in alike.values():
            carrier = container.carrier(
                plan.recipe.schemes[target.scheme], target.linear.in_features, _scale_dtype(target)
            )
            if isinstance(carrier, str):
                raise UsageError(
                    f"{name} can't carry {target.module} exactly: {carrier}",
                    hint=f"--recipe {EXACT_RECIPE} can be carried; or leave {name} out of --export",
                )


def _scale_dtype(target: Planned) -> str:
    """What its scales are stored as; a format's first tensor where it has none of that name."""
    named = {target.suffix(tensor): tensor.dtype for tensor in target.tensors}
    return named.get(Suffix.SCALE, target.tensors[0].dtype)
