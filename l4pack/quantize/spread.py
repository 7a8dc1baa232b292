"""Tasks on the workers of a cluster: each opens source and shards at the paths it is told and writes its slices there.

What travels is the plan, once to every worker, the names of tasks, and digests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from l4pack.checkpoint.everywhere import everywhere
from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.parts import seen_digest
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.shards import Shard
from l4pack.checkpoint.writer import ShardWriter
from l4pack.cluster.cluster import Cluster, Piece, Work
from l4pack.cluster.options import Share, worker_device
from l4pack.cluster.sight import LIBRARIES, Look, nonce
from l4pack.errors import L4packError
from l4pack.plan.assign import Task
from l4pack.plan.memory import rounding
from l4pack.plan.plan import Plan
from l4pack.quantize.accelerator import quantizer
from l4pack.quantize.execute import Executor, Made
from l4pack.units import MIB
from l4pack.work.device import CPU

PIECE_BYTES = 256 * MIB  # of the source: seconds of work, thousands of times what starting a task takes
_PIECE_TASKS = 64


@dataclass(frozen=True)
class SpreadJob:
    """What a worker opens: a plan whose source has an absolute path, the job's shards, and its journal's identity."""

    plan: Plan
    shards: Path
    journal: Path
    identity: str
    device: str


class SlicesDesk:
    """A job as a worker has it open."""

    def __init__(self, job: SpreadJob) -> None:
        """Raises L4packError when another job has begun in the folder."""
        if not Journal.is_of(job.journal, job.identity):
            raise L4packError(f"{job.journal.parent} is another job's by now", hint="run the same command again")
        plan, store = job.plan, job.plan.checkpoint.store
        assert store is not None
        self.writer = ShardWriter(job.shards, plan.shards, plan.places, begun=True)
        self._reader = Reader(plan.checkpoint.entries, store.path)
        self.executor = Executor(plan.recipe, plan.checkpoint, self._reader, self.writer, quantizer(job.device))
        self._tasks = {task.key: task for task in plan.tasks}
        self.shards = {shard.file: shard for shard in plan.shards}

    def make(self, keys: Sequence[str]) -> list[Made]:
        """Do tasks; their bytes are on disk then."""
        made = [self.executor.make(self._tasks[key]) for key in keys]
        self.writer.sync()
        return made

    def close(self) -> None:
        """Close all files."""
        self._reader.close()
        self.writer.close()


def _make(desk: SlicesDesk, keys: Sequence[str]) -> list[Made]:
    return desk.make(keys)


def _hash(desk: SlicesDesk, asked: tuple[str, Collection[str]]) -> dict[str, str]:
    file, known = asked
    return desk.writer.digests(desk.shards[file], known)


class Spread:
    """A crew on a cluster."""

    def __init__(self, cluster: Cluster, job: SpreadJob) -> None:
        self._cluster = cluster
        key = f"slices of {job.shards}"
        self._making, self._hashing = (Work(key, SlicesDesk, job, work) for work in (_make, _hash))
        self._share = _share(job, cluster)

    @contextmanager
    def hashing(self) -> Iterator[Callable[[Shard, Collection[str]], Future[dict[str, str]]]]:
        """See `Crew`."""

        def submit(shard: Shard, known: Collection[str]) -> Future[dict[str, str]]:
            own = frozenset(known) & set(shard.tensors)
            piece = Piece(f"hash {shard.file}", (shard.file, own))
            return self._cluster.submit(self._hashing, piece, replace(self._share, gpus=0))

        yield submit

    def carry_out(
        self,
        tasks: Sequence[Task],
        made: Callable[[Task, Made], None],
        settle: Callable[[], None],
        stop: threading.Event,
    ) -> None:
        """See `Crew`; a job that is asked to stop has what its running tasks made."""
        by_key = {task.key: task for task in tasks}

        def done(piece: Piece, found: Sequence[Made]) -> None:
            for key, one in zip(piece.argument, found, strict=True):
                made(by_key[key], one)
            settle()

        self._cluster.run(self._making, map(_piece, _together(tasks)), self._share, done, stop)


def check_nodes(cluster: Cluster, job: SpreadJob) -> None:
    """Refuse nodes that do not see what a job reads and writes, or have other versions. See `Cluster.check_nodes`."""
    sights = {f"the source, {job.plan.checkpoint.name},": partial(seen_digest, job.plan.checkpoint)}
    computing = () if job.plan.needs is None else (partial(_computing, job.device),)
    look = Look(LIBRARIES, (nonce(job.journal.parent),), sights, computing)
    cluster.check_nodes(look, _share(job, cluster))


def _computing(device: str) -> Mapping[str, Any]:
    from l4pack.calibration.spread import parts_of  # imports torch

    return parts_of(device)


def _share(job: SpreadJob, cluster: Cluster) -> Share:
    accelerated = job.device != CPU
    ram = rounding(job.plan.tasks, 1, accelerated=accelerated).ram
    return Share(1, cluster.options.gpus if accelerated else 0, ram)


def spread_job(plan: Plan, shards: Path, journal: Journal, device: str) -> SpreadJob:
    """A job with paths that mean the same everywhere. Raises UsageError for a source that is fetched as it is read."""
    return SpreadJob(
        replace(plan, checkpoint=everywhere(plan.checkpoint)),
        shards.absolute(),
        journal.path.absolute(),
        journal.identity.digest,
        worker_device(device),
    )


def _together(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Neighbours, which lie side by side in the source, as long as they are small."""
    waiting: list[Task] = []
    for task in tasks:
        if waiting and (sum(one.read_bytes for one in (*waiting, task)) > PIECE_BYTES or len(waiting) == _PIECE_TASKS):
            yield waiting
            waiting = []
        waiting.append(task)
    if waiting:
        yield waiting


def _piece(tasks: Sequence[Task]) -> Piece:
    more = f" and {len(tasks) - 1} more" if len(tasks) > 1 else ""
    return Piece(f"{tasks[0].key}{more}", [task.key for task in tasks], sum(task.read_bytes for task in tasks))
