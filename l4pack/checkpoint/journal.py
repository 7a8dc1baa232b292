"""The journal of a job: what is finished and safely on disk, bound to the plan it belongs to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l4pack.errors import L4packError, UsageError
from l4pack.work.files import write_atomic

_ENTRY: dict[str, type[Any]] = {"finished": list, "digests": dict, "results": dict}


class Journal:
    """An append-only file of JSON lines; a line torn by a crash is dropped."""

    def __init__(self, path: Path, plan_digest: str) -> None:
        """Open the journal of a job, or begin one. Raises UsageError when it belongs to another plan."""
        self.path = path
        lines = list(_whole_lines(path)) if path.exists() else []
        if not all(map(_is_entry, lines[1:])):
            raise UsageError(f"{path} was changed since the job stopped", hint="add --restart to begin again")
        if lines and lines[0] != {"plan": plan_digest}:
            raise UsageError(
                f"{path.parent} was begun with another source, recipe, option or version",
                hint="repeat the earlier command, or add --restart to begin again",
            )
        self.finished = {str(key) for line in lines[1:] for key in line.get("finished", ())}
        self.digests: dict[str, str] = {}
        self.results: dict[str, Any] = {}
        for line in lines[1:]:
            self.digests.update(line.get("digests", {}))
            self.results.update(line.get("results", {}))
        # Rewritten whole: what a crash tore off must not be followed by new lines.
        text = "".join(_line(line) for line in (lines or [{"plan": plan_digest}]))
        write_atomic(path, text.encode())
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def record(
        self,
        finished: Iterable[str] = (),
        digests: dict[str, str] | None = None,
        results: dict[str, Any] | None = None,
    ) -> None:
        """Note tasks and tensor digests as done, and what came of them; call once their bytes are safely on disk."""
        entry: dict[str, Any] = {}
        if keys := list(finished):
            entry["finished"] = keys
            self.finished.update(keys)
        if digests:
            entry["digests"] = digests
            self.digests.update(digests)
        if results:
            entry["results"] = results
            self.results.update(results)
        if entry:
            raw = _line(entry).encode()
            if os.write(self._descriptor, raw) < len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _is_entry(line: dict[str, Any]) -> bool:
    """Whether a line could be one that `record` wrote."""
    if not all(isinstance(line.get(key, kind()), kind) for key, kind in _ENTRY.items()):
        return False
    return all(isinstance(text, str) for text in (*line.get("finished", ()), *line.get("digests", {}).values()))


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            value = json.loads(text)
        except ValueError:
            return
        if not isinstance(value, dict):
            return
        yield value


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a job's folder for this process. Raises L4packError when another process holds it."""
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise L4packError(
                f"another run is working in {folder}", hint="wait for it, or choose another --out"
            ) from None
        yield
