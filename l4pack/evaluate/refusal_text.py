"""What was measured of refusals, in words: for a terminal, a card and a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = ("harmful", "harmless")
SELDOM = 0.01  # a mean probability of refusing below this is none


def refusal_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """For each kind of request: what it is, and in per cent how probable refusing is by original and artifact, and the
    change with its standard error; empty where there was no original."""
    rows = []
    for kind in KINDS:
        one = found[kind]
        before, change = one.get("probability_original"), one.get("probability_change")
        rows.append(
            (
                f"{one['requests']} {kind} requests",
                "" if before is None else _percent(before["value"]),
                _percent(one["probability_artifact"]["value"]),
                "" if change is None else _change(change),
            )
        )
    return rows


def refusal_lines(found: Mapping[str, Any]) -> list[str]:
    """Verdicts, and what keeps the numbers from meaning much."""
    lines = [line for kind in KINDS if (line := _verdicts(kind, found[kind]))]
    before = found["harmful"].get("probability_original")
    if before is not None and before["value"] < SELDOM:
        lines.append(
            "The original itself refuses next to nothing: none of its refusals can be lost, whatever the artifact does."
        )
    if not found.get("chat_template", True):
        lines.append("There is no chat template: the requests were put as plain text, which few models refuse.")
    return lines


def _verdicts(kind: str, one: Mapping[str, Any]) -> str:
    if one.get("refused_original") is None:
        return f"{one['refused_artifact']} of {one['requests']} {kind} requests are more likely refused than not."
    return (
        f"Of {one['requests']} {kind} requests the original is more likely than not to refuse {one['refused_original']}, "
        f"the artifact {one['refused_artifact']}; {one['refused_by_original_only']} the original alone, "
        f"{one['refused_by_artifact_only']} the artifact alone (McNemar, exact: p = {one['p_value']:.2g})."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _change(change: Mapping[str, Any]) -> str:
    error = change["standard_error"]
    return f"{100 * change['value']:+.2f}" + (" %" if error is None else f" ± {100 * error:.2f} %")
