"""Results of checks in the formats that continuous integration reads, with the change since a saved baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from l4pack.budget.checks import CheckResult
from l4pack.budget.model import Budget, Verdict
from l4pack.budget.report_format import ReportFormat
from l4pack.budget.trend import earlier_runs, trend
from l4pack.budget.view import spare
from l4pack.datafile import read_json
from l4pack.errors import UsageError
from l4pack.units import human_bytes, human_gib

MAX_BASELINE_BYTES = 50_000_000
BAR_WIDTH = 20


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

    def earlier(self, result: CheckResult) -> list[dict[str, int]]:
        """What the check found in runs before this, oldest first."""
        return earlier_runs(self.records.get(result.check.name, {}))

    def trend(self, result: CheckResult) -> str:
        """Headroom over several runs, in one phrase; empty where there were few, or none can be told now."""
        return "" if result.found is None else trend(self.earlier(result), result.found.headroom_bytes)


def load_baseline(path: Path | None) -> Baseline:
    """The records of a `--format json` run; none where there is no such file yet, as in a first run. Raises UsageError."""
    if path is None or not path.exists():
        return Baseline({})
    hint = "save one with --format json"
    value = read_json(path, MAX_BASELINE_BYTES, hint)
    try:
        return Baseline({str(record["name"]): dict(record) for record in value["checks"]})
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a saved budget", hint=hint) from error


def parse_reports(texts: Sequence[str]) -> dict[Path, ReportFormat]:
    """`FORMAT=FILE` options, by file. Raises UsageError."""
    reports = {}
    for text in texts:
        name, _, path = text.partition("=")
        if name not in set(ReportFormat) or not path:
            formats = ", ".join(ReportFormat)
            raise UsageError(
                f"--report {text}: not FORMAT=FILE", hint=f"for example json=budget.json; formats: {formats}"
            )
        reports[Path(path)] = ReportFormat(name)
    return reports


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
    records = [
        result.record() | {"change": baseline.changes(result), "earlier": baseline.earlier(result)}
        for result in results
    ]
    return {
        "fits": all(result.passed for result in results),
        "passed": sum(result.passed for result in results),
        "failed": sum(not result.passed for result in results),
        "checks": records,
    }


def summary(result: CheckResult) -> str:
    """One phrase: by how much a check holds or fails."""
    broken = [_one_line(error.message) for error in (result.error, *result.broken) if error]
    if result.found is None or result.limits is None:
        return broken[0] if broken else "not run"
    if result.missing_headroom:
        room = f"{human_gib(result.found.headroom_bytes)} to spare, {human_gib(result.check.min_headroom)} asked for"
    else:
        room = f"{_VERDICTS[result.found.verdict]}{spare(result.found)}"
    return "; ".join([room, *broken])


_VERDICTS = {Verdict.FITS: "", Verdict.UNSURE: "may not fit: ", Verdict.TOO_LARGE: "does not fit: "}


def remedies(result: CheckResult) -> list[str]:
    """What would make a failed check hold, each in a phrase: changes that were tried, hints of errors."""
    tried = [
        f"{change.what} ({change.option}): {human_gib(change.headroom_bytes)} to spare, {change.max_context:,} tokens"
        for change in result.changes
    ]
    errors = [error for error in (result.error, *result.broken) if error and error.hint]
    return [*tried, *(_one_line(error.hint) for error in errors)]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _moved(name: str, now: int, then: int, show: Any) -> str:
    grew = now > then
    word = "grew" if grew else "shrank"
    return f"{name} {word} by {show(abs(now - then))}"


def _tokens(count: int) -> str:
    return f"{count:,} tokens"


def _count(results: Sequence[CheckResult]) -> str:
    passed = sum(result.passed for result in results)
    return f"{passed} of {len(results)} checks hold"


def _text(results: Sequence[CheckResult], baseline: Baseline) -> str:
    width = max(len(result.check.name) for result in results)
    indent = " " * (width + 8)
    lines = []
    for result in results:
        lines.append(f"{'ok  ' if result.passed else 'FAIL'}  {result.check.name:<{width}}  {summary(result)}")
        if result.limits and not result.roomy:
            lines.append(f"{indent}largest context here: {result.limits.max_context:,} tokens")
        if not result.passed:
            lines += [f"{indent}{'hint' if result.error else 'would do'}: {remedy}" for remedy in remedies(result)]
        if change := baseline.changes(result):
            lines.append(f"{indent}since the baseline: {change}")
        if course := baseline.trend(result):
            lines.append(f"{indent}{course}")
    return "\n".join([*lines, "", _count(results)]) + "\n"


def _markdown(results: Sequence[CheckResult], baseline: Baseline) -> str:
    head = ["Check", "Device", "Memory of the GPU that decides", "Context", "Largest context", "Weights"]
    head += ["Since the baseline"] if baseline.records else []
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for result in results:
        cells = [f"{'✅' if result.passed else '❌'} {result.check.name}", result.check.device, *_cells(result)]
        cells += [_since(result, baseline)] if baseline.records else []
        rows.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    failed = [line for result in results if not result.passed for line in _failure(result)]
    return "\n".join([f"### Memory budget: {_count(results)}", "", *rows, *failed]) + "\n"


def _since(result: CheckResult, baseline: Baseline) -> str:
    """What moved since the baseline, and over the runs before it."""
    course = baseline.trend(result)
    return (baseline.changes(result) or "as before") + (f"; {course}" if course else "")


def _cells(result: CheckResult) -> list[str]:
    context = f"{result.check.context:,}"
    if result.found is None or result.limits is None:
        return [summary(result), context, "", ""]
    weights = human_bytes(result.found.subject.weight_bytes)
    return [f"`{_bar(result.found)}` {summary(result)}", context, f"{result.limits.max_context:,}", weights]


def _bar(found: Budget) -> str:
    """What the runtime may plan with as a bar: used at least, used at most, free; `!` beyond its end."""
    planned = found.tightest.planned_bytes
    low = min(sum(line.low for line in found.lines), planned)
    high = min(sum(line.high for line in found.lines), planned)
    sure, maybe = (BAR_WIDTH * part // planned for part in (low, high))
    return f"{'█' * sure}{'▒' * (maybe - sure)}{'·' * (BAR_WIDTH - maybe)}{'' if found.fits else '!'}"


def _failure(result: CheckResult) -> list[str]:
    """A failed check below the table, with what would make it hold."""
    return ["", f"**{result.check.name}**: {summary(result)}", *(f"- {remedy}" for remedy in remedies(result))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _github(results: Sequence[CheckResult], baseline: Baseline) -> str:
    """Workflow commands, https://docs.github.com/actions/reference/workflow-commands-for-github-actions; none when all is
    well."""
    lines = []
    for result in results:
        if result.passed:
            continue
        change = baseline.changes(result)
        parts = [summary(result), *remedies(result), *([f"since the baseline: {change}"] if change else [])]
        title = _property(f"budget {result.check.name}")
        place = f"file={_property(str(result.file))},line={result.line},title={title}"
        lines.append(f"::error {place}::{_escaped(chr(10).join(parts))}\n")
    return "".join(lines)


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")


def _junit(results: Sequence[CheckResult], baseline: Baseline) -> str:
    failed = [result for result in results if result.found and not result.passed]
    errors = [result for result in results if result.error]
    seconds = f"{sum(result.seconds for result in results):.3f}"
    counts = {"tests": str(len(results)), "failures": str(len(failed)), "errors": str(len(errors)), "time": seconds}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "l4pack budget", **counts})
    for result in results:
        suite.append(_case(result, baseline.changes(result)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(result: CheckResult, change: str) -> ElementTree.Element:
    named = {"classname": "budget", "name": result.check.name, "time": f"{result.seconds:.3f}"}
    case = ElementTree.Element("testcase", {**named, "file": str(result.file), "line": str(result.line)})
    if not result.passed:
        kind = "error" if result.error else "failure"
        ElementTree.SubElement(case, kind, {"message": summary(result)}).text = "\n".join(remedies(result))
    if change:
        ElementTree.SubElement(case, "system-out").text = f"since the baseline: {change}"
    return case
