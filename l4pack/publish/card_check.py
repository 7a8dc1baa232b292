"""Whether a card still says what the records beside it say: the parts that l4pack wrote are derived again and compared.

Everything else on a card is its owner's. A card made from a template of one's own can't be taken apart, so it carries
the digest of the values it was made of.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

GENERATED = ("Weight", "Accuracy", "Memory", "How it was made", "Safeguards")
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_MARK = re.compile(r"^<!-- l4pack card ([0-9a-f]{64}) -->$", re.MULTILINE)


def mark(values: Mapping[str, Any]) -> str:
    """The line that says which values a card was made of, but for the day, the repository it is for, and its family."""
    values = {key: value for key, value in values.items() if key not in ("packaged", "commands", "family")}
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return f"<!-- l4pack card {hashlib.sha256(text.encode()).hexdigest()} -->"


def carries_mark(card: str) -> bool:
    """Whether a card was made from a template of its owner's."""
    return _MARK.search(card) is not None


def same_mark(card: str, values: Mapping[str, Any]) -> bool:
    """Whether a marked card was made of these values."""
    return [found[0] for found in _MARK.finditer(card)] == [mark(values)]


def first_difference(card: str, fresh: str) -> str | None:
    """The first part that l4pack writes and that a card says otherwise, twice or not at all; None when all agree."""
    there, wanted = _parts(card), _parts(fresh)
    return next((name for name in GENERATED if there.get(name) != wanted.get(name)), None)


def _parts(card: str) -> dict[str, list[str]]:
    """The text under each heading of the second level, by name; all of it where a heading comes twice."""
    parts: dict[str, list[str]] = {}
    name = ""
    for line in _COMMENT.sub("", card).splitlines():
        if re.match(r"#{1,2}\s", line):
            name = line.strip("# \t")
            parts.setdefault(name, []).append("#")
        elif line.strip():
            parts.setdefault(name, []).append(" ".join(line.split()))
    return parts
