"""A source that is fetched while a calibrated walk goes through it: each file once, and no longer than it is used.

Whatever is made of a file alone (kept tensors, rounded matrices) is made when the file arrives, files that the walk does
not read before it begins. The next step's files are fetched while a step computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.source import Checkpoint, Store
from l4pack.plan.itinerary import Itinerary
from l4pack.quantize.job import Job


class Fetching:
    """The `Supply` of a source that is fetched; a context manager."""

    def __init__(self, checkpoint: Checkpoint, store: Store, job: Job, reader: Reader) -> None:
        self._shards = frozenset(checkpoint.shards)
        self._itinerary = Itinerary.of(checkpoint)
        self._store, self._job, self._reader = store, job, reader
        self._start: int | None = None
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="fetch")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ahead.shutdown(wait=True, cancel_futures=True)

    def arrive(self, step: int) -> None:
        """Make what is made of a step's new files, and begin to fetch the next one's."""
        if self._start is None:
            self._begin(step)
        start = self._start or 0
        self._job.run(self._itinerary.arriving(step, start))
        for file in sorted(self._itinerary.arriving(step + 1, start)):
            # What goes wrong here goes wrong again, and is told, where the file is needed.
            self._ahead.submit(self._store.path, file)

    def leave(self, step: int) -> None:
        """Delete what no later step reads."""
        self._let_go(self._itinerary.leaving(step))

    def _begin(self, start: int) -> None:
        """Do what is left of files that the walk does not read (any more), and drop what an earlier run left behind."""
        self._start = start
        others = self._shards - self._itinerary.walked(start)
        passed = self._itinerary.walked() & others
        self._let_go(passed)
        self._job.run(others)
        self._let_go(passed)

    def _let_go(self, files: Iterable[str]) -> None:
        for file in files:
            self._reader.forget(file)
            self._store.release(file)
