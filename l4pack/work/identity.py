"""What decides a job's bytes or figures, part by part, so that a refused resume can say which part changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_SHOWN = 40  # characters of a value in a message
Parts = Mapping[str, Any]


@dataclass(frozen=True)
class Identity:
    """Plain JSON values by the name a user knows them by: `--samples`, `recipe: schemes.int4.group_size`, a file."""

    parts: Parts

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the parts, whatever their order."""
        text = json.dumps(self.parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def changes(self, earlier: Parts) -> list[str]:
        """A phrase for each part that is not as it was: `--seed was 0 and is 1`."""
        names = [name for name in {**earlier, **self.parts} if earlier.get(name) != self.parts.get(name)]
        return [_change(name, earlier.get(name), self.parts.get(name)) for name in names]


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested mappings as one level of parts, keys joined by dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{name}.{key}")
    return found


def _change(name: str, was: Any, now: Any) -> str:
    shown = [_short(was), _short(now)]
    if shown[0] == shown[1]:  # digests and long texts differ where it can't be seen
        return f"{name} has changed"
    return f"{name} was {shown[0]} and is {shown[1]}"


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
