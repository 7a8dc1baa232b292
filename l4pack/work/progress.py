"""How a job tells how far it is: bytes done, what is done now, and each step of some dozens when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Shown:
    """Told by a job; nobody looks at what is left out."""

    advance: Callable[[int], None] = lambda _: None  # bytes more
    label: Callable[[str], None] = lambda _: None
    step: Callable[[str], None] = lambda _: None
