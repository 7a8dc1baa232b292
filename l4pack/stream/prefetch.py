"""Getting the next units ready in a thread while this one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class Prefetch(Generic[KeyT, ValueT]):
    """Loads what is planned, in order; one loaded thing waits beside the one in use, or with `ahead` false none."""

    def __init__(self, load: Callable[[KeyT], ValueT], *, ahead: bool = True) -> None:
        self._load, self._ahead = load, ahead
        self._planned: deque[KeyT] = deque()
        self._started: tuple[KeyT, Future[ValueT]] | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._planned.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def plan(self, keys: Iterable[KeyT]) -> None:
        """Say what will be taken next, after what was planned before."""
        self._planned.extend(keys)
        if self._ahead:
            self._start()

    def take(self, key: KeyT) -> ValueT:
        """The next planned thing, which must be `key`; raises what loading it raised."""
        self._start()
        if self._started is None:
            raise RuntimeError(f"{key} was asked for, but nothing is planned")
        expected, future = self._started
        if expected != key:
            raise RuntimeError(f"{key} was asked for, but {expected} is next")
        value = future.result()
        self._started = None
        if self._ahead:
            self._start()
        return value

    def _start(self) -> None:
        if self._started is None and self._planned:
            key = self._planned.popleft()
            self._started = (key, self._threads.submit(self._load, key))
