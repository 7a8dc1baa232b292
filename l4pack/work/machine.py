"""What a job may take of the machine: the least of free memory, the limits of every container around it, and what was asked.

Containers are cgroups, version 1, 2 or both; each level up to the root has limits of its own. A level that can't be read, or
says `max` or more than any machine has, limits nothing.
"""

from __future__ import annotations

import math
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
MACHINE, CONTAINER, ASKED = "the machine's free memory", "the container's memory limit", "--max-ram"
DEVICE, ASKED_OF_DEVICE = "the device's free memory", "--max-vram"
_REMEDIES = {
    MACHINE: "free memory, or take a larger machine",
    CONTAINER: "give the container more memory",
    ASKED: "raise --max-ram",
    DEVICE: "free the device's memory, or take a larger one",
    ASKED_OF_DEVICE: "raise --max-vram",
}
_NO_LIMIT = 2**60  # version 1 writes the largest number of whole pages


@dataclass(frozen=True)
class Room:
    """Bytes that a job may have resident, and what sets that limit."""

    nbytes: int
    limit: str

    @property
    def remedy(self) -> str:
        """What to do where it is too little."""
        return _REMEDIES[self.limit]


@dataclass(frozen=True)
class _Group:
    """One level of one hierarchy; `version` 1 or 2."""

    folder: Path
    version: int

    def memory_left(self) -> int | None:
        """Bytes until the limit, what the kernel can take back of the files it keeps counted as free."""
        names = ("memory.max", "memory.high") if self.version == 2 else ("memory.limit_in_bytes",)
        limits = [limit for name in names if (limit := _number(self.folder / name)) is not None and limit < _NO_LIMIT]
        used = _number(self.folder / ("memory.current" if self.version == 2 else "memory.usage_in_bytes"))
        if not limits:
            return None
        return max(0, min(limits) - max(0, (used or 0) - self._reclaimable()))

    def _reclaimable(self) -> int:
        prefix = "" if self.version == 2 else "total_"
        wanted = {f"{prefix}inactive_file", f"{prefix}active_file"}
        pairs = (line.split() for line in _text(self.folder / "memory.stat").splitlines())
        return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in wanted and pair[1].isdecimal())

    def cores(self) -> float | None:
        """Processors whose time the level may take."""
        if self.version == 2:
            quota, _, period = _text(self.folder / "cpu.max").strip().partition(" ")
        else:
            quota, period = (_text(self.folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if not quota.isdecimal() or not period.isdecimal() or not int(period) or not int(quota):
            return None
        return int(quota) / int(period)


def memory(asked: int | None = None, root: Path = ROOT) -> Room:
    """What this process may have resident at most, with what it has already; `asked` is what the user allows it.

    `root` is where `proc` and the mounts of cgroups are looked for.
    """
    own = _own_bytes()
    rooms = [Room(psutil.virtual_memory().available + own, MACHINE)]
    rooms += [Room(left + own, CONTAINER) for group in _groups(root) if (left := group.memory_left()) is not None]
    if asked is not None:
        rooms.append(Room(asked, ASKED))
    return min(rooms, key=lambda room: room.nbytes)


def cores(root: Path = ROOT) -> int:
    """Processors that this process may use, by its affinity and its containers' shares of time; at least 1."""
    quotas = [quota for group in _groups(root) if (quota := group.cores()) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *(math.ceil(quota) for quota in quotas)]))


def peak_rss(root: Path = ROOT) -> int:
    """The most bytes that this process had resident so far.

    `getrusage` counts what the process that started this one held then (Linux: `setmax_mm_hiwater_rss` in exec), so it is
    asked only where the kernel doesn't say.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _text(root / "proc/self/status"), re.MULTILINE)
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _own_bytes() -> int:
    """Memory of this process that is counted as used: not the files it has mapped."""
    info = psutil.Process().memory_info()
    return max(0, int(info.rss) - int(info.shared))


def _groups(root: Path) -> Iterator[_Group]:
    """Every level that this process is in, in every hierarchy."""
    mounts = list(_mounts(root))
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 1 if controllers else 2
        for mount in mounts:
            if mount.version == version and (version == 2 or mount.controllers & set(controllers.split(","))):
                for folder in mount.levels(path):
                    yield _Group(folder, version)


@dataclass(frozen=True)
class _Mount:
    """Where a hierarchy is seen; `top` is the group that is seen at `folder`."""

    folder: Path
    top: str
    version: int
    controllers: frozenset[str]

    def levels(self, path: str) -> list[Path]:
        """Folders of a group and of those around it, as far as they are seen from here."""
        inside = path.removeprefix(self.top) if self.top != "/" and _within(path, self.top) else path
        if ".." in inside.split("/"):  # seen from a namespace that the group lies outside of
            inside = "/"
        folder = self.folder / inside.strip("/")
        if not folder.is_dir():
            folder = self.folder
        found = [folder]
        while folder != self.folder:
            folder = folder.parent
            found.append(folder)
        return found


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def _mounts(root: Path) -> Iterator[_Mount]:
    """Mounted hierarchies of cgroups, from lines of `proc/self/mountinfo` (proc_pid_mountinfo(5))."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mount, kind = before.split(), after.split()
        if len(mount) < 5 or len(kind) < 2 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        top, folder = (value.replace("\\040", " ") for value in mount[3:5])
        version = 2 if kind[0] == "cgroup2" else 1
        yield _Mount(root / folder.lstrip("/"), top, version, frozenset(kind[-1].split(",")))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None
