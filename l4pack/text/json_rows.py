"""JSON as people write rows in it: one value a line, values one after another, one list, or a list under a known key."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from l4pack.errors import UsageError
from l4pack.text.layouts import MAX_ROW, has_layout, is_message

_CHUNK = 1 << 16
_LONGEST_WORD = 16  # of those that JSON has, escapes included
_SPACE = re.compile(r"[ \t\r\n]*")
_WRAPPERS = ("data", "train", "rows", "examples", "instances")
_OTHER_SPLITS = ("test", "validation")


class _Values:
    """JSON values of a stream, one at a time."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._line = "", 0, 1

    @property
    def line(self) -> int:
        """The line that the next character stands in."""
        return self._line + self._text.count("\n", 0, self._at)

    def next(self) -> str:
        """The next character that is no space, not taken; nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self) -> None:
        """Step over the next character."""
        self._at += 1

    def value(self) -> Any:
        """The next value. Raises UsageError for what is not JSON, is nested too deeply or too long."""
        self.next()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self.bad("nested too deeply") from error
            except ValueError as error:
                if not self._cut_off(error):
                    raise self.bad("not JSON") from error
                if not self._more():
                    raise self.bad("not JSON, it ends too early") from error
            else:
                return value

    def _cut_off(self, error: ValueError) -> bool:
        """Whether more characters could mend it."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_WORD

    def _more(self) -> bool:
        """Read on, as much again as is there; what is used up is dropped."""
        self._line = self.line
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) >= MAX_ROW:
            raise self.bad(f"one value of more than {MAX_ROW:,} characters")
        more = self._stream.read(max(_CHUNK, len(self._text)))
        self._text += more
        return bool(more)

    def bad(self, what: str) -> UsageError:
        return UsageError(
            f"{self._path}, line {self.line}: {what}",
            hint="JSONL has one object a line; a file of words must not begin with a bracket and a quote",
        )


def json_rows(stream: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Rows with where they lie. Raises UsageError."""
    values = _Values(stream, path)
    if values.next() == "[":
        yield from _list(values, path)
    elif values.next():
        yield from _objects(values, path)


def _objects(values: _Values, path: Path) -> Iterator[tuple[str, Any]]:
    line, first = values.line, values.value()
    if values.next():
        yield f"{path}, line {line}", first
        yield from _one_by_one(values, path)
    else:
        yield from _unwrapped(first, path, line)


def _one_by_one(values: _Values, path: Path) -> Iterator[tuple[str, Any]]:
    while values.next():
        line = values.line
        yield f"{path}, line {line}", values.value()


def _list(values: _Values, path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a list; a list of messages is a row itself, and others may follow."""
    line = values.line
    elements = _elements(values)
    first = next(elements, None)
    if is_message(first):
        yield f"{path}, line {line}", [first, *elements]
        yield from _one_by_one(values, path)
        return
    for number, value in enumerate(itertools.chain([] if first is None else [first], elements), 1):
        yield f"{path}, row {number}", value
    if values.next():
        raise values.bad("something follows the end of the list")


def _elements(values: _Values) -> Iterator[Any]:
    """The elements of the list that comes next."""
    values.take()
    while values.next() != "]":
        yield values.value()
        if values.next() == ",":
            values.take()
        elif values.next() != "]":
            raise values.bad("the list does not end" if not values.next() else "no comma between two rows")
    values.take()


def _unwrapped(value: Any, path: Path, line: int) -> Iterator[tuple[str, Any]]:
    """The rows of a file that is one value: a row, or an object with a list of rows."""
    lists = [key for key, held in value.items() if isinstance(held, list)] if isinstance(value, dict) else []
    if not {*_WRAPPERS, *_OTHER_SPLITS} & {*lists} or has_layout(value):
        yield f"{path}, line {line}", value
        return
    if len(lists) != 1 or lists[0] not in _WRAPPERS:
        keys = ", ".join(str(key)[:40] for key in list(value)[:12])
        raise UsageError(
            f"{path}: one object with the keys {keys}; which of them are the rows is not clear",
            hint="write the rows as JSONL, one object a line",
        )
    for number, row in enumerate(value[lists[0]], 1):
        inner = row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row
        yield f"{path}, row {number}", inner
