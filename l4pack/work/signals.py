"""Stopping at a safe place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from l4pack.errors import StoppedError

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request to stop at a safe place; a second one acts as usual.

    A signal that is ignored, as `nohup` has it for SIGHUP, stays ignored.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: handler for number in _ASKING if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_stop(stop: threading.Event) -> None:
    """Raise StoppedError when asked to stop."""
    if stop.is_set():
        raise StoppedError("stopped; what is finished is kept", hint="run the same command again to go on")
