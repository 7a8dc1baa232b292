"""A job under way: tasks on a few threads, journalled once their bytes are safely on disk."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait

from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Store
from l4pack.checkpoint.writer import ShardWriter, Written
from l4pack.plan.assign import Task
from l4pack.plan.plan import Plan
from l4pack.quant.suffixes import Suffix
from l4pack.quantize.execute import Executor
from l4pack.work.signals import check_stop

SYNC_SECONDS = 1.0


class Job:
    """Runs what is left of a plan. A failed or stopped job keeps what is finished."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        journal: Journal,
        reader: Reader,
        writer: ShardWriter,
        executor: Executor,
        advance: Callable[[int], None] | None,
        stop: threading.Event,
        held: Collection[str] = (),
    ) -> None:
        """Source files `held` are let go of by somebody else."""
        self._plan, self._store, self._journal = plan, store, journal
        self._reader, self._writer, self._executor = reader, writer, executor
        self._advance, self._stop = advance or (lambda _: None), stop
        self._lock = threading.Lock()
        self._finished: list[tuple[Task, Written]] = []
        self._error: Exception | None = None
        self._begun = False
        self._todo = [task for task in plan.tasks if task.key not in journal.finished]
        # Source bytes that an earlier run of this job was done with.
        self.resumed_bytes = sum(task.read_bytes for task in plan.tasks) - sum(task.read_bytes for task in self._todo)
        self._left_in_source = Counter(self._source_file(task) for task in self._todo)
        self._left_in_shard = Counter(file for task in self._todo for file in self._shard_files(task))
        # What calibration has yet to read and to write is neither let go of nor hashed here.
        self._left_in_source.update(plan.checkpoint.entries[target.linear.tensor].file for target in plan.calibrated)
        self._left_in_source.update(held)
        self._left_in_shard.update(plan.places[target.tensor(Suffix.INPUT_SCALE).name].file for target in plan.observed)
        self._left_in_shard.update(plan.places[tensor.name].file for t in plan.calibrated for tensor in t.tensors)
        self._left_in_shard.update(plan.places[tensor.name].file for tensor in plan.kv_scales)
        self._hashing: list[Future[dict[str, str]]] = []

    def run(self, files: Collection[str] | None = None) -> None:
        """Do every task left, or every one left of some source files. Raises a task's first error, or StoppedError."""
        workers, side = self._plan.workers, ThreadPoolExecutor(2, "l4pack-side")
        if not self._begun:
            self._advance(self.resumed_bytes)
            self._drop_left_behind()
            self._begun = True
        chosen = [task for task in self._todo if files is None or self._source_file(task) in files]
        self._todo = [task for task in self._todo if files is not None and self._source_file(task) not in files]
        with side, ThreadPoolExecutor(workers, "l4pack") as pool:
            self._hash_complete_shards(side)
            pending: set[Future[None]] = {pool.submit(self._do, task) for task in chosen}
            try:
                while pending:
                    _, pending = wait(pending, timeout=SYNC_SECONDS)
                    self._settle(side)
            except BaseException:
                self._stop.set()  # leaving the block waits for the workers: let them find nothing to do
                raise
        self._collect_digests()
        if self._error is not None:
            raise self._error
        check_stop(self._stop)

    def _drop_left_behind(self) -> None:
        """Let go of files that an earlier run used up and was killed before it let go of them."""
        for file in self._plan.checkpoint.shards:
            if not self._left_in_source[file]:
                self._store.release(file)

    def _do(self, task: Task) -> None:
        if self._stop.is_set() or self._error is not None:
            return
        try:
            with self._writer.watched() as written:
                self._executor.run(task)
        except Exception as error:
            with self._lock:
                self._error = self._error or error
            return
        file = self._source_file(task)
        with self._lock:
            self._finished.append((task, written))
            self._left_in_source[file] -= 1
            used_up = not self._left_in_source[file]
        if used_up:  # at once, not when it is journalled: fetched shards must not pile up
            self._reader.forget(file)
            self._store.release(file)

    def _settle(self, side: ThreadPoolExecutor) -> None:
        """Journal what the workers finished, and hash complete shards."""
        with self._lock:
            finished, self._finished = self._finished, []
        if not finished:
            return
        self._writer.sync()
        self._journal.record(
            finished={task.key: written.digest for task, written in finished},
            digests={
                name: sha256 for _, written in finished for name, sha256 in written.tensors(self._plan.places).items()
            },
        )
        for task, _ in finished:
            self._advance(task.read_bytes)
            self._left_in_shard.subtract(self._shard_files(task))
        self._hash_complete_shards(side)

    def _hash_complete_shards(self, side: ThreadPoolExecutor) -> None:
        known = frozenset(self._journal.digests)
        for shard in self._plan.shards:
            if self._left_in_shard[shard.file] == 0:
                self._left_in_shard[shard.file] = -1  # once
                self._hashing.append(side.submit(self._writer.digests, shard, known))

    def _collect_digests(self) -> None:
        while self._hashing:
            self._journal.record(digests=self._hashing.pop(0).result())

    def _source_file(self, task: Task) -> str:
        return self._plan.checkpoint.entries[task.tensor].file

    def _shard_files(self, task: Task) -> set[str]:
        tensors = [task.copied] if task.copied else [tensor for target in task.targets for tensor in target.tensors]
        return {self._plan.places[tensor.name].file for tensor in tensors}
