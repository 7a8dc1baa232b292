"""What runs in a worker's process: a job is opened once there, and its tasks are done one after another.

Nothing here imports Ray: the functions are what is sent to it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Opened(Protocol):
    """A job as a worker has it open."""

    def close(self) -> None:
        """Close its files."""
        ...


@dataclass(frozen=True)
class Done:
    """What came of a task, the worker that did it (host and process), and the seconds it took."""

    result: Any
    worker: str
    seconds: float


class _Desk:
    """The one job that a worker's process has open; the next one takes its place."""

    def __init__(self) -> None:
        self._job = ""
        self._opened: Opened | None = None

    def open(self, job: str, opening: Callable[[], Opened]) -> Opened:
        if self._opened is None or self._job != job:
            if self._opened is not None:
                self._opened.close()
            self._opened, self._job = None, job
            self._opened = opening()
        return self._opened


_DESK = _Desk()


def do(job: str, opening: Callable[[], Opened], work: Callable[[Any, Any], Any], argument: Any) -> Done:
    """Do one task of a job, which is opened by `opening` unless this process has it open already."""
    opened = _DESK.open(job, opening)
    started = time.monotonic()
    result = work(opened, argument)
    return Done(result, f"{socket.gethostname()}:{os.getpid()}", time.monotonic() - started)
