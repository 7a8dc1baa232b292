"""What a killed job goes on from: a small file of what it has found and of the data it vouches for.

A state is written whole once the data is on disk, names the job it belongs to, seals every span of data that a later
run reads (see `seal`), and carries a digest of its own. What doesn't match, state or data, is made again: data that
no state vouches for is never read. So a state is removed before its data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from l4pack.errors import UsageError
from l4pack.work.command import this_command
from l4pack.work.files import read_own, sync_folder, write_atomic
from l4pack.work.identity import Identity, another_job, command_shown
from l4pack.work.seal import Seal, Span, unbroken

MAX_BYTES = 256 * 1024 * 1024
SCHEMA_VERSION = 2


class Found(BaseModel):
    """What a job has found so far; a job's own fields go into a subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


FoundT = TypeVar("FoundT", bound=Found)


class _Kept(BaseModel):
    """A state as it lies in its file, but for its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[2]
    job: dict[str, Any]
    command: str
    found: dict[str, Any]
    seals: list[Seal]


class StateFile(Generic[FoundT]):
    """The state of one job in its work folder."""

    def __init__(self, path: Path, job: Identity, kind: type[FoundT]) -> None:
        self.path, self._job, self._kind = path, job, kind
        self.seals: tuple[Seal, ...] = ()  # of the data that the state vouches for

    def read(self) -> FoundT | None:
        """What an earlier run of this job found; None when there is nothing, or nothing that can be believed.

        Raises UsageError naming what changed when the state is another job's.
        """
        kept = _read(self.path)
        if kept is None:
            return None
        if changes := self._job.changes(kept.job):
            raise another_job(self.path.parent, changes, command_shown(kept.command))
        try:
            found = self._kind.model_validate_json(json.dumps(kept.found))
        except (ValidationError, ValueError):
            return None
        self.seals = tuple(kept.seals)
        return found

    def unbroken(self, spans: Sequence[Span]) -> bool:
        """Whether the state vouches for all of these, and they are as they were."""
        return unbroken(self.path.parent, spans, self.seals)

    def write(self, found: FoundT, seals: Sequence[Seal]) -> None:
        """Replace the state; the data that `seals` are of must be on disk."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "job": dict(self._job.parts),
            "command": this_command(),
            "found": found.model_dump(mode="json"),
            "seals": [one.model_dump() for one in seals],
        }
        write_atomic(self.path, json.dumps({"sha256": _digest(value), "state": value}).encode())
        self.seals = tuple(seals)

    def remove(self) -> None:
        """Stop vouching for anything; call before the data is touched."""
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)
        self.seals = ()


def _read(path: Path) -> _Kept | None:
    try:
        whole = json.loads(read_own(path, MAX_BYTES))
        if not isinstance(whole, dict) or whole.get("sha256") != _digest(whole.get("state")):
            return None
        return _Kept.model_validate(whole["state"])
    except (OSError, UsageError, ValueError, RecursionError):  # pydantic's errors are ValueErrors
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
