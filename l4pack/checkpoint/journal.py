"""The journal of a job: what is finished and safely on disk, bound to the job it belongs to.

A line is a JSON object that carries a digest of itself and of all lines before it. Where a line is torn or was changed,
the reading ends, and what it and later ones said is done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from l4pack.units import MIB
from l4pack.work.files import open_own, write_atomic
from l4pack.work.identity import Identity, another_job, command_shown

MAX_LINE_BYTES = 64 * MIB  # a line may hold the digests of all tensors
MAX_BYTES = 512 * MIB
_KEYS_A_LINE = 1000
_TAIL_BYTES = len(b',"chain":""}\n') + 64
_ENTRY: dict[str, type[Any]] = {"finished": str, "digests": str, "results": dict}
JournalLine = dict[str, Any]


class Journal:
    """An append-only file of JSON lines.

    `finished` has the hex SHA-256 of the bytes that each finished piece of work wrote, `digests` those of whole tensors.
    """

    def __init__(self, path: Path, identity: Identity, command: str | None = None) -> None:
        """Open the journal of a job, or begin one. Raises UsageError when it belongs to another job.

        `command` is what the user typed, to be shown when the job is taken for another one later.
        """
        self.path, self.identity = path, identity
        self.finished: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.results: dict[str, Any] = {}
        head, *entries = list(_sound_lines(path)) if path.exists() else [{}]
        if "job" in head and (changes := identity.changes(head["job"])):
            raise another_job(path.parent, changes, command_shown(head.get("command")))
        for entry in entries:
            self._take(entry)
        self._head: JournalLine = (
            head if "job" in head else {"job": dict(identity.parts), "command": command_shown(command)}
        )
        self._rewrite()  # what a crash tore off must not be followed by new lines

    def record(
        self,
        finished: Mapping[str, str] | None = None,
        digests: Mapping[str, str] | None = None,
        results: Mapping[str, Any] | None = None,
    ) -> None:
        """Note pieces of work and tensor digests as done, and what came of them; call once their bytes are safely on disk."""
        entry: JournalLine = {"finished": finished, "digests": digests, "results": results}
        entry = {key: dict(value) for key, value in entry.items() if value}
        if not entry:
            return
        self._take(entry)
        raw = self._line(entry)
        if os.write(self._descriptor, raw) < len(raw):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fdatasync(self._descriptor)

    def forget(self, finished: Collection[str], digests: Collection[str] = ()) -> None:
        """Take back what turned out not to be there any more."""
        if not self.finished.keys().isdisjoint(finished) or not self.digests.keys().isdisjoint(digests):
            self.finished = {key: digest for key, digest in self.finished.items() if key not in finished}
            self.digests = {name: digest for name, digest in self.digests.items() if name not in digests}
            self.close()
            self._rewrite()

    @staticmethod
    def is_of(path: Path, job: str) -> bool:
        """Whether a journal is there, and is that of the job whose identity has this `digest`."""
        try:
            head = next(_sound_lines(path))
        except OSError:
            return False
        return "job" in head and Identity(head["job"]).digest == job

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _take(self, entry: JournalLine) -> None:
        self.finished.update(entry.get("finished", {}))
        self.digests.update(entry.get("digests", {}))
        self.results.update(entry.get("results", {}))

    def _rewrite(self) -> None:
        # What came of a piece of work stands before the word that it is finished: the reading may end between them.
        whole: JournalLine = {"results": self.results, "digests": self.digests, "finished": self.finished}
        entries = [{key: part} for key, value in whole.items() for part in _parts(value)]
        self._chain = b""
        write_atomic(self.path, b"".join(map(self._line, [self._head, *entries])))
        self._descriptor = open_own(self.path, os.O_WRONLY | os.O_APPEND)

    def _line(self, entry: JournalLine) -> bytes:
        body = json.dumps(entry, separators=(",", ":")).encode()[:-1]
        self._chain = _chained(self._chain, body)
        return body + _tail(self._chain)


def _parts(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    keys = list(value)
    for start in range(0, len(keys), _KEYS_A_LINE):
        yield {key: value[key] for key in keys[start : start + _KEYS_A_LINE]}


def _sound_lines(path: Path) -> Iterator[JournalLine]:
    """The head, which is empty if it is not sound, and the entries up to the first that is not."""
    chain, first, left = b"", True, MAX_BYTES
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as stream:
        while line := stream.readline(min(MAX_LINE_BYTES, left)):
            left -= len(line)
            body = line[:-_TAIL_BYTES]
            chain = _chained(chain, body)
            entry = _parsed(body + b"}") if line == body + _tail(chain) else None
            if entry is None or not (_is_head(entry) if first else _is_entry(entry)):
                break
            yield entry
            first = False
    if first:
        yield {}


def _parsed(line: bytes) -> JournalLine | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_head(entry: JournalLine) -> bool:
    return isinstance(entry.get("job"), dict)


def _is_entry(entry: JournalLine) -> bool:
    """Whether a line could be one that `record` wrote."""
    return entry.keys() <= _ENTRY.keys() and all(
        isinstance(value, dict) and all(isinstance(one, _ENTRY[key]) for one in value.values())
        for key, value in entry.items()
    )


def _chained(chain: bytes, body: bytes) -> bytes:
    return hashlib.sha256(chain + body).hexdigest().encode()


def _tail(chain: bytes) -> bytes:
    return b',"chain":"' + chain + b'"}\n'
