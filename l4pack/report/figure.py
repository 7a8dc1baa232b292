"""A drawing and the table of what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from l4pack.units import with_error as with_digits


@dataclass(frozen=True)
class Figure:
    """A drawing, and its numbers as a table: names of columns, `>` before those of numbers, and rows of words."""

    drawing: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: float | None, digits: int = 4) -> str:
    """A number for people; None was not measured."""
    return "not measured" if value is None else f"{value:,.{digits}g}"


def with_error(value: float | None, error: float | None) -> str:
    """A number with its standard error, to the digits that the error leaves a meaning."""
    if value is None or not error:
        return number(value)
    return with_digits(value, error)
