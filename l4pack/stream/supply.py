"""How a walk gets the files it reads, when they are not all there."""

from __future__ import annotations

from typing import Protocol


class Supply(Protocol):
    """Told of every step of a walk; steps are those of `itinerary`."""

    def arrive(self, step: int) -> None:
        """Return once a step's files are there, and everything is made that is made of them alone."""
        ...

    def leave(self, step: int) -> None:
        """Let go of what no later step reads; the walk has closed its files."""
        ...
