"""Calls into libraries that a hostile file can keep busy for ever: they get so long, and no longer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises. Raises TimeoutError when it has not ended in time.

    The call then goes on in a daemon thread, which ends with the process: nothing stops a thread from outside. The call
    must let go of the interpreter's lock, as Rust's and C's libraries do and Python itself does.
    """
    ended: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            ended.append((True, call()))
        except BaseException as error:  # a panic in Rust is no Exception
            ended.append((False, error))

    thread = threading.Thread(target=run, name="l4pack-patient", daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError(f"no end after {seconds:g} s")
    done, value = ended[0]
    if not done:
        raise value
    result: T = value
    return result


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Leave out what a library writes to file descriptor 2 by itself, such as a panic's backtrace."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
