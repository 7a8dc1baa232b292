"""A job under way: what is left of a plan, who carries it out, and a journal of what is safely on disk."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Protocol

from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.shards import Shard
from l4pack.checkpoint.source import Store
from l4pack.checkpoint.writer import ShardWriter
from l4pack.plan.assign import Task
from l4pack.plan.plan import Plan
from l4pack.quantize.execute import Made
from l4pack.work.signals import check_stop


class Crew(Protocol):
    """Who carries out tasks: threads of this process, or workers on other machines."""

    def hashing(self) -> AbstractContextManager[Callable[[Shard, Collection[str]], Future[dict[str, str]]]]:
        """What hashes the tensors of a complete shard that are not known, beside other work, while the block lasts."""
        ...

    def carry_out(
        self,
        tasks: Sequence[Task],
        made: Callable[[Task, Made], None],
        settle: Callable[[], None],
        stop: threading.Event,
    ) -> None:
        """Do tasks. `made` is told of each one whose bytes are written, from any thread; `settle` is called from this one
        every now and then. Raises a task's first error, once others that run have ended."""
        ...


class Job:
    """Runs what is left of a plan. A failed or stopped job keeps what is finished."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        journal: Journal,
        reader: Reader,
        writer: ShardWriter,
        crew: Crew,
        advance: Callable[[int], None] | None,
        stop: threading.Event,
        held: Collection[str] = (),
    ) -> None:
        """Source files `held` are let go of by somebody else."""
        self._plan, self._store, self._journal = plan, store, journal
        self._reader, self._writer, self._crew = reader, writer, crew
        self._advance, self._stop = advance or (lambda _: None), stop
        self._lock = threading.Lock()
        self._finished: list[tuple[Task, Made]] = []
        self._begun = False
        self._todo = [task for task in plan.tasks if task.key not in journal.finished]
        # Source bytes that an earlier run of this job was done with.
        self.resumed_bytes = sum(task.read_bytes for task in plan.tasks) - sum(task.read_bytes for task in self._todo)
        self._here: set[str] = set()  # source files whose tasks were asked for
        self._left_in_source = Counter(file for task in self._todo for file in self._source_files(task))
        self._left_in_shard = Counter(file for task in self._todo for file in self._shard_files(task))
        # What calibration has yet to read and to write is neither let go of nor hashed here.
        entries = plan.checkpoint.entries
        self._left_in_source.update(file for t in plan.calibrated for file in entries[t.linear.tensor].stored)
        self._left_in_source.update(held)
        self._left_in_shard.update(plan.places[target.input_scale.name].file for target in plan.observed)
        self._left_in_shard.update(plan.places[tensor.name].file for t in plan.calibrated for tensor in t.tensors)
        self._left_in_shard.update(plan.places[tensor.name].file for tensor in plan.kv_scales)
        self._hashing: list[Future[dict[str, str]]] = []

    def run(self, files: Collection[str] | None = None) -> None:
        """Do every task left, or every one left of some source files and those asked for before. Raises a task's first
        error, or StoppedError."""
        if not self._begun:
            self._advance(self.resumed_bytes)
            self._drop_left_behind()
            self._begun = True
        self._here.update(self._plan.checkpoint.shards if files is None else files)
        chosen = [task for task in self._todo if self._here.issuperset(self._source_files(task))]
        self._todo = [task for task in self._todo if not self._here.issuperset(self._source_files(task))]
        with self._crew.hashing() as hashing:

            def settle() -> None:
                self._settle()
                self._hash_complete_shards(hashing)

            self._hash_complete_shards(hashing)
            self._crew.carry_out(chosen, self._note, settle, self._stop)
            self._collect_digests()
        check_stop(self._stop)

    def _drop_left_behind(self) -> None:
        """Let go of files that an earlier run used up and was killed before it let go of them."""
        for file in self._plan.checkpoint.shards:
            if not self._left_in_source[file]:
                self._store.release(file)

    def _note(self, task: Task, made: Made) -> None:
        files = self._source_files(task)
        with self._lock:
            self._finished.append((task, made))
            self._left_in_source.subtract(files)
            used_up = [file for file in files if not self._left_in_source[file]]
        for file in used_up:  # at once, not when it is journalled: fetched shards must not pile up
            self._reader.forget(file)
            self._store.release(file)

    def _settle(self) -> None:
        """Journal what is finished."""
        with self._lock:
            finished, self._finished = self._finished, []
        if not finished:
            return
        self._writer.sync()
        self._journal.record(
            finished={task.key: made.digest for task, made in finished},
            digests={name: sha256 for _, made in finished for name, sha256 in made.tensors.items()},
        )
        for task, _ in finished:
            self._advance(task.read_bytes)
            self._left_in_shard.subtract(self._shard_files(task))

    def _hash_complete_shards(self, hashing: Callable[[Shard, Collection[str]], Future[dict[str, str]]]) -> None:
        known = frozenset(self._journal.digests)
        for shard in self._plan.shards:
            if self._left_in_shard[shard.file] == 0:
                self._left_in_shard[shard.file] = -1  # once
                self._hashing.append(hashing(shard, known))

    def _collect_digests(self) -> None:
        while self._hashing:
            self._journal.record(digests=self._hashing.pop(0).result())

    def _source_files(self, task: Task) -> tuple[str, ...]:
        return tuple(self._plan.checkpoint.entries[task.tensor].stored)

    def _shard_files(self, task: Task) -> set[str]:
        tensors = [task.copied] if task.copied else [tensor for target in task.targets for tensor in target.tensors]
        return {self._plan.places[tensor.name].file for tensor in tensors}
