"""Tasks for a test cluster: workers import what they do."""

from __future__ import annotations

import os
import signal
import time

from l4pack.errors import L4packError


class Nothing:
    """A job of which nothing need be open."""

    def __init__(self, job: object) -> None:
        self.job = job

    def close(self) -> None:
        """Nothing to close."""


def fail(desk: Nothing, number: int) -> int:
    """The number, but for the second; later ones take a while, so that it fails before all have begun."""
    if number == 2:
        raise L4packError("the second", hint="none")
    if number > 2:
        time.sleep(0.2)
    return number


def die(desk: Nothing, number: int) -> None:
    """The end of whoever does this."""
    os.kill(os.getpid(), signal.SIGKILL)


def colour_of_this_node() -> str:
    """Something that is not the same everywhere."""
    return os.environ.get("L4PACK_TEST_NODE", "none")


def late_colour() -> str:
    """Something that is the same everywhere but on the node that joins late."""
    return "late" if os.environ.get("L4PACK_TEST_NODE") == "late" else "none"


def where(desk: Nothing, number: int) -> str:
    """The node this is done on, after a while."""
    time.sleep(0.2)
    return os.environ.get("L4PACK_TEST_NODE", "none")
