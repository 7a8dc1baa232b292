"""Tasks on a few threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from l4pack.checkpoint.shards import Shard
from l4pack.checkpoint.writer import ShardWriter
from l4pack.plan.assign import Task
from l4pack.quantize.execute import Executor, Made
from l4pack.work.threads import in_threads


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
        in_threads(tasks, lambda task: made(task, self._executor.make(task)), self._workers, settle, stop)
