"""Files that are there whole or not at all, even after a power cut, and that are never somebody else's by a link."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from l4pack.errors import BudgetError, UsageError
from l4pack.units import human_bytes


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file so that a reader sees the old one or the whole new one, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be a link
    with temporary.open("xb") as stream:
        stream.writelines((data,) if isinstance(data, bytes) else data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_disk(nbytes: int, written: Iterable[Path], folder: Path) -> None:
    """Raise BudgetError when a folder's disk has no room for what is left of a job of `nbytes`, some files `written`."""
    needed = nbytes - sum(path.stat().st_blocks * 512 for path in written)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BudgetError(
            f"{folder.parent} needs {human_bytes(needed)} more disk, {human_bytes(free)} are free",
            hint="free some space, or choose another --out",
        )


def open_own(path: Path, flags: int, mode: int = 0o644) -> int:
    """`os.open` for a job's own file. Raises UsageError when it is a link, has a second name, or is no plain file."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_own(path) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise _not_own(path)
    return descriptor


def _not_own(path: Path) -> UsageError:
    return UsageError(
        f"{path} is a link, and what it leads to is not the job's", hint="remove the link, or choose another folder"
    )


def read_own(path: Path, most: int) -> bytes:
    """The bytes of a job's own file. Raises OSError, UsageError (see `open_own`), ValueError for more than `most`."""
    with open(open_own(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:  # a pipe must not be waited for
        raw = stream.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{path} has more than {most:,} bytes")
    return raw


def path_beside(folder: Path, ending: str) -> Path:
    """A path next to a folder, named after it; of `.` and links too."""
    place = folder if folder.name not in ("", "..") else folder.resolve()
    return place.with_name(place.name + ending)
