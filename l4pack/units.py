"""Printing and reading byte counts, durations and rates."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from l4pack.errors import UsageError

KIB, MIB, GIB = 1024, 1024**2, 1024**3
_SUFFIXES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 1024**4,
}

_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
_THOUSANDS = {"": 1, "k": KIB, "m": MIB}


def parse_size(text: str) -> int:
    """Bytes meant by `1500000`, `4GB` or `3.5GiB`. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    factor = _SUFFIXES.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise UsageError(f"'{text}' is not a size", hint="write a number and a unit, for example 4GB or 1.5GiB")
    return int(Decimal(match[1]) * factor)


def given_size(text: str | None) -> int | None:
    """Bytes of an option that may be left out. Raises UsageError."""
    return None if text is None else parse_size(text)


def parse_tokens(text: str) -> int:
    """Tokens meant by `131072`, `128k` or `1M`: k is 1,024 as in the names of contexts, M its square. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,18})\s*([kKmM]?)\s*", text)
    if match is None:
        raise UsageError(f"'{text}' is not a number of tokens", hint="write 131072, or 128k for the same")
    return int(match[1]) * _THOUSANDS[match[2].lower()]


_SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
_LONGEST = 366 * 86400


def parse_duration(text: str) -> float:
    """Seconds meant by `8h`, `90min`, `1h30min`, `2d` or `45s`: more than none, a year at most. Raises UsageError."""
    parts = re.findall(r"(\d{1,9}(?:\.\d{1,9})?)(min|[smhd])", text.strip().lower())
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != text.strip().lower() or not 0 < seconds <= _LONGEST:
        raise UsageError(
            f"'{text}' is not a time", hint="write numbers and units up to a year, for example 8h, 90min or 2d"
        )
    return seconds


def unit_of(count: float) -> tuple[str, int]:
    """The largest decimal unit that a byte count has one of, and its bytes: what an axis is in."""
    return next(((unit, size) for unit, size in _UNITS if count >= size), ("B", 1))


def with_error(value: float, error: float) -> str:
    """A number with its standard error, to the digits that the error leaves a meaning: `0.00970 ± 0.00026`."""
    digits = 4 if error <= 0 else min(max(1 - math.floor(math.log10(error)), 0), 8)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def human_bytes(count: float) -> str:
    """Decimal bytes for people: `64.87 GB`, `512 B`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_gib(count: float) -> str:
    """Binary gibibytes, the unit drivers report device memory in: `60.42 GiB`."""
    return f"{count / GIB:.2f} GiB"


def human_seconds(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
