"""The walk back of a plan whose matrices are rounded by what their outputs do to the model's end, before any is solved."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from l4pack.checkpoint.journal import Journal
from l4pack.plan.plan import Plan
from l4pack.work.progress import Shown

if TYPE_CHECKING:
    from l4pack.gradient.moments import GradientMoments

RESULT = "walk back"


def walk_back(
    plan: Plan, journal: Journal, folder: Path, stop: threading.Event, shown: Shown, device: str
) -> GradientMoments | None:
    """The moments of each layer's gradients, in `folder`; None where the plan needs none.

    Goes on where an earlier run of the job was. Raises StoppedError, SourceError, and BudgetError when the disk has no room.
    """
    if plan.needs is None or plan.needs.gradient is None:
        return None
    import torch

    from l4pack.gradient.moments import GradientMoments, MomentsKeeper
    from l4pack.gradient.walk import BackwardWalk
    from l4pack.stream.hidden import Packed
    from l4pack.stream.lanes import Model
    from l4pack.stream.modules import Skeleton
    from l4pack.stream.visitor import Progress
    from l4pack.stream.weights import Weights

    assert plan.text is not None
    assert plan.recipe.calibration is not None
    started, back, seed = time.monotonic(), plan.needs.gradient, plan.recipe.calibration.seed
    place, checkpoint = torch.device(device), plan.checkpoint
    packed = Packed(plan.text.sequences[: back.samples])
    with Weights(checkpoint, place, torch.float32) as weights:
        model = Model("source", weights, Skeleton(checkpoint.config, place, torch.float32))
        progress = Progress.of(shown, stop)
        moments = GradientMoments(folder, checkpoint.config.text.hidden_size)
        keeper = MomentsKeeper(moments, seed)
        BackwardWalk(model, packed, folder, journal.identity, seed, keeper, progress=progress, ahead=back.ahead).walk()
    if RESULT not in journal.results:
        found = {"samples": back.samples, "tokens_seen": packed.rows, "seed": seed}
        journal.record(results={RESULT: {**found, "seconds": round(time.monotonic() - started, 1)}})
    return moments
