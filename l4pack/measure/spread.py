"""Measuring on the workers of a cluster: each takes a wave of altered streams, with the original beside them, to the end.

A wave reads all weights, so there are as many as workers, or as the disk makes them; which stream is in which changes no
number. Finished waves are in the state of the measurement, and one under way goes on from its last layer, wherever that is.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from l4pack.checkpoint.everywhere import everywhere
from l4pack.cluster.cluster import Cluster, Piece, Work
from l4pack.cluster.options import Share, worker_device
from l4pack.measure.changes import Change, Single
from l4pack.measure.desk import DONE_NAME, STOP_NAME, MeasuringDesk, MeasuringJob, WaveTask
from l4pack.measure.prepare import PreparedMeasurement
from l4pack.measure.wave import WaveFound
from l4pack.stream.spread import check_seen
from l4pack.stream.visitor import Progress
from l4pack.work.folder import remove_all

WAVES_NAME = "waves"
_LOOK_SECONDS = 1.0

Tell = Callable[[WaveFound], None]


@dataclass(frozen=True)
class SpreadWaves:
    """The waves of one measurement on a cluster."""

    cluster: Cluster
    share: Share
    job: MeasuringJob
    progress: Progress

    def run(self, waves: Sequence[Sequence[Change]], errors_only: Sequence[Single], found: Tell) -> None:
        """Have waves walk, and `errors_only` found on the way; `found` is told what came of each at once."""
        tasks = [WaveTask(_named(changes), tuple(changes), ()) for changes in waves]
        shares = _parts(errors_only, len(tasks))
        tasks = [replace(task, errors_only=tuple(part)) for task, part in zip(tasks, shares, strict=True)]
        layers = self.job.prepared.checkpoint.config.text.num_hidden_layers
        pieces = [Piece(task.name, task, sum(layers - one.layer for one in task.changes)) for task in tasks]

        def done(piece: Piece, result: WaveFound) -> None:
            found(result)
            shutil.rmtree(self.job.folder / piece.name, ignore_errors=True)

        for path in self.job.folder.iterdir():
            if path.name not in {task.name for task in tasks}:  # of an earlier run, with other waves
                remove_all([path])
        key = f"measuring {self.job.folder} {secrets.token_hex(4)}"
        work = Work(key, MeasuringDesk, self.job, MeasuringDesk.run, "{:,.2f} layers of streams".format, "waves")
        with self._watched(tasks):
            self.cluster.run(work, pieces, self.share, done, self.progress.stop)

    @contextmanager
    def _watched(self, tasks: Sequence[WaveTask]) -> Iterator[None]:
        """Tell how far all waves are, and tell them when to stop, while the block lasts."""
        stop, ended = self.job.folder / STOP_NAME, threading.Event()
        stop.unlink(missing_ok=True)
        watching = threading.Thread(target=self._watch, args=(tasks, stop, ended), daemon=True)
        watching.start()
        try:
            yield
        finally:
            ended.set()
            watching.join()

    def _watch(self, tasks: Sequence[WaveTask], stop: Path, ended: threading.Event) -> None:
        told = dict.fromkeys((task.name for task in tasks), 0)
        while not ended.wait(_LOOK_SECONDS):
            if self.progress.stop.is_set():
                stop.touch()
            for name, before in told.items():
                told[name] = max(before, _number(self.job.folder / name / DONE_NAME))
                self.progress.advance(told[name] - before)


def spread_waves(prepared: PreparedMeasurement, cluster: Cluster, progress: Progress) -> SpreadWaves:
    """The measurement on a cluster, once every node has been seen to see it. Raises UsageError, BudgetError."""
    import torch

    work = prepared.settings.work.absolute()
    (work / WAVES_NAME).mkdir(exist_ok=True)
    device = torch.device(worker_device(str(prepared.compute.device)))
    there = replace(
        prepared,
        checkpoint=everywhere(prepared.checkpoint),
        compute=replace(prepared.compute, device=device),
        settings=replace(prepared.settings, out=prepared.settings.out.absolute()),
    )
    share = Share(cluster.threads, cluster.options.gpus, prepared.costs.peak_ram_bytes)
    check_seen(cluster, share, work, [there.checkpoint], there.compute)
    return SpreadWaves(cluster, share, MeasuringJob(there, work / WAVES_NAME), progress)


def _parts(changes: Sequence[Single], count: int) -> list[Sequence[Single]]:
    edges = [number * len(changes) // max(1, count) for number in range(count + 1)]
    return [changes[first:last] for first, last in itertools.pairwise(edges)]


def _named(changes: Sequence[Change]) -> str:
    """The same for the same streams, so that a wave is gone on with."""
    digest = hashlib.sha256("\n".join(change.key for change in changes).encode()).hexdigest()[:12]
    return f"wave {len(changes)} from layer {min(change.layer for change in changes)} {digest}"


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
