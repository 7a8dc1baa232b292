"""Quality gates: the least accuracy an artifact must keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l4pack.errors import QualityError, UsageError
from l4pack.recipe import Gates


def parse_recovery(texts: list[str]) -> dict[str, float]:
    """`task=0.99` options. Raises UsageError."""
    result = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not name or not 0 <= share <= 2:
            raise UsageError(f"--min-recovery {text}: not TASK=SHARE", hint="for example arc=0.99")
        result[name] = share
    return result


def gate_results(record: Mapping[str, Any], gates: Gates, recovery: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every gate asked for, its limit, the value measured (None: not measured) and whether it passed."""
    asked = [
        ("max_kl", gates.max_kl, record.get("kl_mean"), True),
        ("min_agreement", gates.min_agreement, record.get("top1_agreement"), False),
        ("max_perplexity_ratio", gates.max_perplexity_ratio, record.get("perplexity_ratio"), True),
    ]
    tasks = record.get("tasks", {})
    asked += [
        (f"min_recovery {name}", share, tasks.get(name, {}).get("recovery"), False) for name, share in recovery.items()
    ]
    return [
        {"gate": name, "limit": limit, "value": value, "ok": _passes(value, limit, at_most)}
        for name, limit, value, at_most in asked
        if limit is not None
    ]


def _passes(value: float | None, limit: float, at_most: bool) -> bool:
    if value is None:
        return False
    return value <= limit if at_most else value >= limit


def require(results: list[dict[str, Any]]) -> None:
    """Raise QualityError naming every gate that was missed; one that could not be measured is missed."""
    missed = [result for result in results if not result["ok"]]
    if not missed:
        return
    texts = [
        f"{result['gate']} {result['limit']:g} ("
        + ("not measured" if result["value"] is None else f"{result['value']:.6g}")
        + ")"
        for result in missed
    ]
    raise QualityError(
        f"{len(missed)} of {len(results)} quality gates missed: {', '.join(texts)}",
        hint="look at the worst layers with `l4pack report`, or choose a recipe that keeps more",
    )
