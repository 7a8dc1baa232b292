"""What an earlier run finished, held against its journal: shards may have been changed between a kill and now."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.writer import Extent, ShardWriter
from l4pack.plan.extents import task_extents
from l4pack.plan.plan import Plan
from l4pack.work.signals import check_stop


def forget_damaged(plan: Plan, journal: Journal, writer: ShardWriter, stop: threading.Event) -> None:
    """Take back from the journal what is not in the shards as it was written, so that it is made again.

    Reads all that is finished. Raises StoppedError when asked to stop.
    """
    extents: dict[str, Sequence[Extent]] = {task.key: task_extents(task, plan.recipe) for task in plan.tasks}
    if plan.needs is not None:
        from l4pack.calibration.written import calibrated_extents

        extents |= calibrated_extents(plan)
    damaged = _damaged(extents, journal, writer, plan.workers, stop)
    journal.forget(damaged, {extent.tensor for key in damaged for extent in extents[key]})


def _damaged(
    extents: Mapping[str, Sequence[Extent]], journal: Journal, writer: ShardWriter, workers: int, stop: threading.Event
) -> list[str]:
    """Finished work whose bytes are not those that the journal says."""

    def differs(key: str) -> bool:
        return not stop.is_set() and writer.digest(extents[key]) != journal.finished[key]

    keys = [key for key in journal.finished if key in extents]
    with ThreadPoolExecutor(workers, "l4pack-check") as pool:
        found = [key for key, bad in zip(keys, pool.map(differs, keys), strict=True) if bad]
    check_stop(stop)
    return found
