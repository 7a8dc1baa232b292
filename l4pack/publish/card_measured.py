"""What a model card says of what was measured: its tables, rows and words, from the records of evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l4pack.errors import UsageError
from l4pack.evaluate.refusal_text import refusal_lines, refusal_rows
from l4pack.evaluate.sample import turns
from l4pack.publish.card_facts import CardFacts, Rung
from l4pack.publish.markdown import code, safe, word
from l4pack.units import with_error as with_digits

NOT_RECORDED = "not recorded"
_TASK_KEYS = ("accuracy_reference", "accuracy")


def tasks_measured(facts: CardFacts) -> dict[str, Mapping[str, Any]]:
    """Each task from the evaluation that asked most of its questions, beside the original where any did."""
    found: dict[str, Mapping[str, Any]] = {}
    for one in (facts.accuracy or {}, *facts.others):
        for name, task in (one.get("tasks") or {}).items():
            if name not in found or _asked(task) > _asked(found[name]):
                found[name] = task
    return dict(sorted(found.items()))


def _asked(task: Mapping[str, Any]) -> tuple[bool, int]:
    return "accuracy_reference" in task, task["questions"]


def accuracy_table(measured: Mapping[str, Any] | None, tasks: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of paired numbers with their error bars; None when the original was not measured beside the artifact."""
    if measured is None or "kl_mean" not in measured:
        return None
    try:
        return {
            "tokens": f"{measured['tokens']:,}",
            "text": setting(measured.get("text")),
            "computed": _computed(measured.get("run")),
            "rows": _rows(measured, tasks),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"accuracy.json: {error} is missing or no number", hint="run l4pack evaluate again") from error


def _computed(run: Mapping[str, Any] | None) -> str:
    return f"; {safe(run['dtype'])}, activations {safe(run['activations'])}" if run else ""


def _rows(measured: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    def number(key: str) -> str:
        return with_error(measured[key], measured[f"{key}_standard_error"])

    kl = with_error(measured["kl_mean"], measured["kl_standard_error"])
    rows = [
        ("Perplexity", number("perplexity_reference"), number("perplexity_artifact")),
        ("Perplexity ratio", "1", number("perplexity_ratio")),
        ("KL divergence from the original, nats a token", "0", kl),
        ("Same most likely token as the original", "1", number("top1_agreement")),
    ]
    for name, task in tasks.items():
        before, after = (task.get(key) for key in _TASK_KEYS)
        pair = [
            "not measured" if one is None else with_error(one["value"], one["standard_error"])
            for one in (before, after)
        ]
        rows.append((f"Task {safe(name)}, {task['questions']:,} questions, accuracy", pair[0], pair[1]))
    return rows + [_suite_row(one) for one in (measured.get("suites") or {}).values()]


def _suite_row(suite: Mapping[str, Any]) -> tuple[str, str, str]:
    """A set of tasks: its means, and the recovery beside this model's."""
    before, percent = suite.get("mean_reference"), suite.get("recovery_percent")
    recovery = "" if percent is None else f", recovery {percent:.1f} %"
    left = f", without {', '.join(map(safe, suite['left_out']))}" if suite["left_out"] else ""
    what = f"{safe(suite['title'])}: mean of {len(suite['tasks'])} tasks{left}"
    return what, "not measured" if before is None else f"{before:.4f}", f"{suite['mean']:.4f}{recovery}"


def refusals(facts: CardFacts) -> dict[str, Any] | None:
    """Refusals by the most careful evaluation that asked for them; None where none did."""
    found = next((one["refusals"] for one in (facts.accuracy or {}, *facts.others) if one.get("refusals")), None)
    if found is None:
        return None
    rows = [tuple(cell or "not measured" for cell in row) for row in refusal_rows(found)]
    return {"rows": rows, "lines": refusal_lines(found), "openings": found["openings"], "suite": code(found["suite"])}


def in_a_row(measured: Mapping[str, Any]) -> dict[str, str]:
    """One more evaluation in a table's row."""
    paired = "kl_mean" in measured
    return {
        "text": setting(measured.get("text")) + _computed(measured.get("run")),
        "tokens": f"{measured['tokens']:,}",
        "kl": with_error(measured["kl_mean"], measured["kl_standard_error"]) if paired else "not measured",
        "agreement": (
            with_error(measured["top1_agreement"], measured["top1_agreement_standard_error"])
            if paired
            else "not measured"
        ),
    }


def images_seen(measured: Mapping[str, Any]) -> int:
    """Images in the text of an evaluation beside the original."""
    count = (measured.get("text") or {}).get("images", 0) if "kl_mean" in measured else 0
    return count if isinstance(count, int) else 0


def said(measured: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What both models say after the same prompts, in bold from where they part; None where they were not asked."""
    found = turns(measured or {})
    if measured is None or not found:
        return None

    def marked(same: str, rest: str | None) -> str:
        if rest is None:
            return "not asked"
        return " ".join([*([code(same)] if word(same) else []), *([f"**{code(rest)}**"] if word(rest) else [])])

    rows = [(safe(one.prompt), marked(one.same, one.original), marked(one.same, one.artifact)) for one in found]
    return {"tokens": measured["sample"]["tokens"], "rows": rows}


def gate_line(gate: Mapping[str, Any]) -> str:
    value = "not measured" if gate["value"] is None else f"{gate['value']:.6g}"
    return f"{code(gate['gate'])} {gate['limit']:g}: {value}, {'met' if gate['ok'] else '**missed**'}"


def with_error(value: float, error: float | None) -> str:
    """A number with its standard error, to the digits that the error leaves a meaning."""
    if error is None:
        return f"{value:.4g} (one sequence: no error bar)"
    return with_digits(value, error)


def setting(text: Any) -> str:
    """The text and setting of a measurement: what its record says that is short; digests stay there."""
    if not isinstance(text, Mapping):
        return NOT_RECORDED
    short = {
        key: value
        for key, value in text.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool) and not key.endswith("sha256")
    }
    return ", ".join(f"{safe(key.replace('_', ' '))} {safe(value)}" for key, value in sorted(short.items()))


def tokens_measured(one: Rung) -> Any:
    """Which tokens an artifact was measured on: only the same ones make its figures comparable."""
    return ((one.accuracy or {}).get("text") or {}).get("tokens_sha256")
