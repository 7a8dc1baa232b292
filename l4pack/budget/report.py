"""Results of checks in the formats that continuous integration reads, with the change since a saved baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from l4pack.budget.checks import CheckResult
from l4pack.budget.report_format import ReportFormat
from l4pack.budget.view import spare
from l4pack.datafile import read_json
from l4pack.errors import UsageError
from l4pack.units import human_bytes, human_gib

MAX_BASELINE_BYTES = 50_000_000


@dataclass(frozen=True)
class Baseline:
    """Records of an earlier run by check name."""

    records: dict[str, dict[str, Any]]

    def changes(self, result: CheckResult) -> str:
        """What moved since the baseline, in one phrase; empty when nothing did or nothing can be compared."""
        if result.found is None or result.limits is None:
            return ""
        before = self.records.get(result.check.name)
        if before is None:
            return "new check" if self.records else ""
        pairs = (
            ("weights", result.found.subject.weight_bytes, before.get("weight_bytes"), human_bytes),
            ("context", result.limits.max_context, before.get("max_context"), _tokens),
            ("sequences", result.limits.max_sequences, before.get("max_sequences"), str),
            ("headroom", result.found.headroom_bytes, before.get("headroom_bytes"), human_gib),
        )
        moved = [_moved(name, now, then, show) for name, now, then, show in pairs if type(then) is int and now != then]
        return ", ".join(moved)


def load_baseline(path: Path | None) -> Baseline:
    """The records of a `--format json` run. Raises UsageError."""
    if path is None:
        return Baseline({})
    hint = "save one with --format json"
    value = read_json(path, MAX_BASELINE_BYTES, hint)
    try:
        return Baseline({str(record["name"]): dict(record) for record in value["checks"]})
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a saved budget", hint=hint) from error


def render(results: Sequence[CheckResult], format: ReportFormat, baseline: Baseline) -> str:
    """The results as text in a format."""
    match format:
        case ReportFormat.TEXT:
            return _text(results, baseline)
        case ReportFormat.JSON:
            return json.dumps(checks_record(results, baseline), indent=2, ensure_ascii=False) + "\n"
        case ReportFormat.MARKDOWN:
            return _markdown(results, baseline)
        case ReportFormat.GITHUB:
            return _github(results, baseline)
        case ReportFormat.JUNIT:
            return _junit(results, baseline)


def checks_record(results: Sequence[CheckResult], baseline: Baseline) -> dict[str, Any]:
    """Plain data: `fits` is whether every check holds; `checks` has one record each."""
    records = [result.record() | {"change": baseline.changes(result)} for result in results]
    return {
        "fits": all(result.passed for result in results),
        "passed": sum(result.passed for result in results),
        "failed": sum(not result.passed for result in results),
        "checks": records,
    }


def summary(result: CheckResult) -> str:
    """One phrase: by how much a check holds or fails."""
    if result.found is None or result.limits is None:
        return " ".join(result.error.message.split()) if result.error else "not run"
    if result.missing_headroom:
        return f"{human_gib(result.found.headroom_bytes)} to spare, {human_gib(result.check.min_headroom)} asked for"
    return spare(result.found)


def _moved(name: str, now: int, then: int, show: Any) -> str:
    grew = now > then
    word = "grew" if grew else "shrank"
    return f"{name} {word} by {show(abs(now - then))}"


def _tokens(count: int) -> str:
    return f"{count:,} tokens"


def _count(results: Sequence[CheckResult]) -> str:
    passed = sum(result.passed for result in results)
    return f"{passed} of {len(results)} {'check' if len(results) == 1 else 'checks'} hold"


def _text(results: Sequence[CheckResult], baseline: Baseline) -> str:
    width = max(len(result.check.name) for result in results)
    lines = []
    for result in results:
        lines.append(f"{'ok  ' if result.passed else 'FAIL'}  {result.check.name:<{width}}  {summary(result)}")
        if result.limits and not result.passed:
            lines.append(f"{'':<{width + 8}}largest context here: {result.limits.max_context:,} tokens")
        if result.error and result.error.hint:
            lines.append(f"{'':<{width + 8}}hint: {result.error.hint}")
        if change := baseline.changes(result):
            lines.append(f"{'':<{width + 8}}since the baseline: {change}")
    return "\n".join([*lines, "", _count(results)]) + "\n"


def _markdown(results: Sequence[CheckResult], baseline: Baseline) -> str:
    head = ["Check", "Device", "Context", "Headroom", "Largest context", "Weights"]
    head += ["Since the baseline"] if baseline.records else []
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for result in results:
        cells = [
            f"{'✅' if result.passed else '❌'} {result.check.name}",
            result.check.device,
            f"{result.check.context:,}",
        ]
        if result.found and result.limits:
            cells += [summary(result), f"{result.limits.max_context:,}", human_bytes(result.found.subject.weight_bytes)]
        else:
            cells += [summary(result), "", ""]
        cells += [baseline.changes(result)] if baseline.records else []
        rows.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join([f"### Memory budget: {_count(results)}", "", *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _github(results: Sequence[CheckResult], baseline: Baseline) -> str:
    """Workflow commands, https://docs.github.com/actions/reference/workflow-commands-for-github-actions."""
    lines = []
    for result in results:
        level = "notice" if result.passed else "error"
        change = baseline.changes(result)
        message = summary(result) + (f"; since the baseline: {change}" if change else "")
        place = f"file={_property(str(result.file))},title={_property(f'budget {result.check.name}')}"
        lines.append(f"::{level} {place}::{_escaped(message)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")


def _junit(results: Sequence[CheckResult], baseline: Baseline) -> str:
    failed = [result for result in results if result.found and not result.passed]
    errors = [result for result in results if result.error]
    counts = {"tests": str(len(results)), "failures": str(len(failed)), "errors": str(len(errors))}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "l4pack budget", **counts})
    for result in results:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "budget", "name": result.check.name, "time": "0"}
        )
        if not result.passed:
            ElementTree.SubElement(case, "error" if result.error else "failure", {"message": summary(result)})
        if change := baseline.changes(result):
            ElementTree.SubElement(case, "system-out").text = f"since the baseline: {change}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
