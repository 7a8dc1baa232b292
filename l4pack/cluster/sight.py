"""What a node of a cluster must see as the machine does that the job is started on."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


@contextmanager
def nonce(folder: Path) -> Iterator[Path]:
    """A file in a folder that nobody can hold who does not see this very folder."""
    path = folder / NONCE_NAME
    write_atomic(path, secrets.token_bytes())
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
