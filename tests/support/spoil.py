"""Ways in which a file that a killed job left can be damaged before the job goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def _swap(path: Path) -> None:
    """With a neighbour of the same size, or with nothing."""
    same = [one for one in path.parent.iterdir() if one != path and one.stat().st_size == path.stat().st_size]
    other, between = (same or [path])[0], path.with_name("between")
    path.rename(between)
    if same:
        other.rename(path)
    between.rename(other)


SPOILS: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": _flip,
    "swapped": _swap,
    "emptied": lambda path: path.write_bytes(b""),
    "extended": lambda path: os.truncate(path, path.stat().st_size + 4096),
}
