"""What a check found over several runs: each saved record carries the numbers of those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l4pack.units import human_gib

MOST = 30  # earlier runs that a record keeps
_KEYS = ("weight_bytes", "max_context", "headroom_bytes")
_BARS = "▁▂▃▄▅▆▇█"
_FEWEST = 3  # with two, the change since the baseline says it all


def earlier_runs(saved: Mapping[str, Any]) -> list[dict[str, int]]:
    """Numbers of the run that a record was saved by and of those before it, oldest first, a run that found none left out."""
    before = saved.get("earlier")
    runs = [*(before if isinstance(before, list) else []), saved]
    return [{key: run[key] for key in _KEYS} for run in runs if _is_run(run)][-MOST:]


def _is_run(run: object) -> bool:
    return isinstance(run, Mapping) and all(type(run.get(key)) is int for key in _KEYS)


def trend(earlier: Sequence[Mapping[str, int]], headroom_bytes: int) -> str:
    """Headroom from run to run, for example `█▆▁ 20.31 GiB to 5.20 GiB to spare in 3 runs`; empty of few runs."""
    values = [run["headroom_bytes"] for run in earlier] + [headroom_bytes]
    if len(values) < _FEWEST:
        return ""
    return f"{_drawn(values)} {human_gib(values[0])} to {human_gib(values[-1])} to spare in {len(values)} runs"


def _drawn(values: Sequence[int]) -> str:
    """A bar a run between the least and the most."""
    least, span = min(values), max(values) - min(values)
    return "".join(_BARS[(value - least) * (len(_BARS) - 1) // span if span else 3] for value in values)
