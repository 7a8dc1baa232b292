"""Text from outside in a Markdown page: it must stay text, whatever it holds."""

from __future__ import annotations

import re

# Letters, digits and marks that Markdown, HTML and a reader that turns addresses into links leave alone.
_PLAIN = re.compile(r"(?:[\w ,.+%();'’·±-]|: |:$)*")


def code(text: object) -> str:
    """As inline code, so that it can be nothing but text."""
    return f"`{word(text)}`"


def safe(text: object) -> str:
    """As it is where nothing in it could be markup or a link, as inline code otherwise."""
    plain = word(text)
    return plain if _PLAIN.fullmatch(plain) and "www." not in plain.lower() else f"`{plain}`"


def word(text: object) -> str:
    """On one line, without what would end inline code or a table's cell."""
    return " ".join("".join(char if char.isprintable() and char not in "`|<>" else " " for char in str(text)).split())
