"""Pieces of a job on a few threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

SYNC_SECONDS = 1.0
T = TypeVar("T")


def in_threads(
    items: Iterable[T],
    do: Callable[[T], None],
    workers: int,
    settle: Callable[[], None],
    stop: threading.Event,
) -> None:
    """Do all items; `settle` is called from this thread every now and then, and once all is done.

    Raises an item's first error once those that run have ended. What `stop` finds not begun is left.
    """
    errors: list[Exception] = []

    def one(item: T) -> None:
        if stop.is_set() or errors:
            return
        try:
            do(item)
        except Exception as error:
            errors.append(error)

    with ThreadPoolExecutor(workers, "l4pack") as pool:
        pending: set[Future[None]] = {pool.submit(one, item) for item in items}
        try:
            while pending:
                _, pending = wait(pending, timeout=SYNC_SECONDS)
                settle()
        except BaseException:
            stop.set()  # leaving the block waits for the workers: let them find nothing to do
            raise
    if errors:
        raise errors[0]
