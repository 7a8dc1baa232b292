"""Quality gates: the least accuracy an artifact must keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l4pack.errors import QualityError, UsageError
from l4pack.recipe import Gates

_MEASURES = {"max_kl": "kl_mean", "min_agreement": "top1_agreement", "max_perplexity_ratio": "perplexity_ratio"}
_AT_MOST = ("max_kl", "max_perplexity_ratio")
_RECOVERY = "min_recovery "


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


def asked_gates(**values: float | None) -> Gates:
    """Gates from what the user typed. Raises UsageError."""
    try:
        return Gates(**values)
    except ValueError as error:
        first = str(error).splitlines()
        raise UsageError(
            f"a gate is out of range: {first[1] if len(first) > 1 else first[0]}",
            hint="KL is 0 or more, shares are 0 to 1",
        ) from error


def limits_of(gates: Gates, recovery: Mapping[str, float]) -> dict[str, float]:
    """Every gate asked for with its limit."""
    asked = gates.model_dump(exclude_none=True)
    return {**asked, **{f"{_RECOVERY}{task}": share for task, share in recovery.items()}}


def judge(record: Mapping[str, Any], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every gate, its limit, the value measured (None: not measured) and whether it passed."""
    results = []
    for gate, limit in limits.items():
        value = _value(record, gate)
        passed = value is not None and (value <= limit if gate in _AT_MOST else value >= limit)
        results.append({"gate": gate, "limit": limit, "value": value, "ok": passed})
    return results


def _value(record: Mapping[str, Any], gate: str) -> float | None:
    if gate.startswith(_RECOVERY):
        value = record.get("tasks", {}).get(gate.removeprefix(_RECOVERY), {}).get("recovery")
    else:
        value = record.get(_MEASURES[gate])
    return None if value is None else float(value)


def recorded(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gates that a record was judged by, judged again by its own numbers."""
    return judge(record, {gate["gate"]: gate["limit"] for gate in record["gates"]})


MISSED_HINT = "look at the worst layers with `l4pack report`, or choose a recipe that keeps more"


def require(results: list[dict[str, Any]], hint: str = MISSED_HINT) -> None:
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
        hint=hint,
    )
