"""What decides a job's bytes or figures, part by part, so that a refused resume can say which part changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from l4pack.errors import UsageError

_SHOWN = 40  # characters of a value in a message
_NAMED = 3  # changes in a message
_COMMAND = 2000  # characters of a command in a message
_DIGEST = re.compile("[0-9a-f]{40,}")
_TOKEN = re.compile(r"\bhf_\w+")
Parts = Mapping[str, Any]


@dataclass(frozen=True)
class Identity:
    """Plain JSON values by the name a user knows them by: `--samples`, `recipe: schemes.int4.group_size`, a file."""

    parts: Parts
    earlier_names: Mapping[str, str] = field(default_factory=dict)
    """Names of parts by what they were called before: a job begun then is still the same."""

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the parts, whatever their order."""
        text = json.dumps(self.parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def changes(self, earlier: Parts) -> list[str]:
        """A phrase for each part that is not as it was: `--seed was 0 and is 1`."""
        earlier = {self.earlier_names.get(name, name): value for name, value in earlier.items()}
        names = [name for name in {**self.parts, **earlier} if earlier.get(name) != self.parts.get(name)]
        return [_change(name, earlier.get(name), self.parts.get(name)) for name in names]


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested mappings as one level of parts, keys joined by dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{name}.{key}")
    return found


def another_job(folder: Path, changes: Sequence[str], command: str | None = None) -> UsageError:
    """What to raise for a folder begun as a job that differs by `changes` (see Identity) from the one asked for.

    `command` is the earlier one, as it was typed, if that is known.
    """
    more = f"; and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    earlier = f"repeat the earlier command, {command}" if command else "repeat the earlier command"
    return UsageError(
        f"{folder} was begun as another job: {'; '.join(changes[:_NAMED])}{more}",
        hint=f"{earlier}; or add --restart to begin again",
    )


def command_shown(command: Any) -> str | None:
    """A command as a state or journal keeps it, fit to be shown: one printable line without tokens, or None."""
    if not isinstance(command, str) or len(command) > _COMMAND or not command.isprintable():
        return None
    return _TOKEN.sub("hf_…", command)


def _change(name: str, was: Any, now: Any) -> str:
    shown = [_short(was), _short(now)]
    if shown[0] == shown[1] or all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in (was, now)):
        return f"{_short(name)} has changed"  # digests say nothing, and long texts differ where it can't be seen
    return f"{_short(name)} was {shown[0]} and is {shown[1]}"


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
