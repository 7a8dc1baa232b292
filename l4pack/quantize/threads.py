"""Tasks on a few threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from l4pack.checkpoint.shards import Shard
from l4pack.checkpoint.writer import ShardWriter
from l4pack.plan.assign import Task
from l4pack.quantize.execute import Executor, Made

SYNC_SECONDS = 1.0


class Threads:
    """A crew of so many threads."""

    def __init__(self, executor: Executor, writer: ShardWriter, workers: int) -> None:
        self._executor, self._writer, self._workers = executor, writer, workers

    @contextmanager
    def hashing(self) -> Iterator[Callable[[Shard, Collection[str]], Future[dict[str, str]]]]:
        """See `Crew`."""
        with ThreadPoolExecutor(2, "l4pack-side") as side:
            yield lambda shard, known: side.submit(self._writer.digests, shard, known)

    def carry_out(
        self,
        tasks: Sequence[Task],
        made: Callable[[Task, Made], None],
        settle: Callable[[], None],
        stop: threading.Event,
    ) -> None:
        """See `Crew`."""
        errors: list[Exception] = []

        def do(task: Task) -> None:
            if stop.is_set() or errors:
                return
            try:
                made(task, self._executor.make(task))
            except Exception as error:
                errors.append(error)

        with ThreadPoolExecutor(self._workers, "l4pack") as pool:
            pending: set[Future[None]] = {pool.submit(do, task) for task in tasks}
            try:
                while pending:
                    _, pending = wait(pending, timeout=SYNC_SECONDS)
                    settle()
            except BaseException:
                stop.set()  # leaving the block waits for the workers: let them find nothing to do
                raise
        if errors:
            raise errors[0]
