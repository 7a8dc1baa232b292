"""What a node of a cluster must see as the machine does that the job is started on."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from l4pack.errors import UsageError
from l4pack.work.files import write_atomic

NONCE_NAME = "nonce"
LIBRARIES = ("l4pack", "numpy", "numba", "ray")  # that decide a rounded byte, or whether nodes understand each other


@dataclass(frozen=True)
class Look:
    """Versions of libraries, the contents of files, and what else is to be called there: one value, by its name, or many."""

    libraries: Sequence[str]
    files: Sequence[Path]
    sights: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    more: Sequence[Callable[[], Mapping[str, Any]]] = ()

    def __call__(self) -> dict[str, Any]:
        """Everything that is seen here; None for what is not."""
        return {
            **{f"the version of {name}": version(name) for name in self.libraries},
            **{f"the folder {file.parent}": _content(file) for file in self.files},
            **{name: sight() for name, sight in self.sights.items()},
            **{name: value for several in self.more for name, value in several().items()},
        }


class NodeDiffersError(UsageError):
    """A node does not see what the machine does that the job is started on."""


def nonce(folder: Path) -> Path:
    """A file in a job's folder that nobody can hold who does not see this very folder; it goes with the folder."""
    path = folder.absolute() / NONCE_NAME
    write_atomic(path, secrets.token_bytes())
    return path


def compare(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise NodeDiffersError naming a node, and what it does not see (None) or sees otherwise than is seen here."""
    differing: defaultdict[bool, list[str]] = defaultdict(list)
    for key, value in here.items():
        if there.get(key) != value:
            differing[there.get(key) is None].append(key)
    if unseen := differing[True]:
        raise NodeDiffersError(
            f"node {name} does not see {unseen[0]} as this machine does",
            hint="source, --out and --work must lie on a file system that every node has mounted at the same path",
        )
    if others := differing[False]:
        key = others[0]
        raise NodeDiffersError(
            f"node {name} differs: {key} is {there[key]} there and {here[key]} here",
            hint="install the same versions on every node, and take nodes of one kind",
        )


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
