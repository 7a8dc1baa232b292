"""One page about an artifact that a person can look at: no network, no script, light and dark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from l4pack import __version__
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.manifest_schema import artifact_bytes, read_manifest
from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.model import budget
from l4pack.budget.named import Question
from l4pack.budget.serve import serve_command
from l4pack.budget.solve import limits
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import L4packError
from l4pack.evaluate.refusal_text import refusal_lines, refusal_rows
from l4pack.evaluate.sample import turns
from l4pack.publish.licence import audit_materials, folder_materials
from l4pack.report.accuracy import accuracy_figures, measures
from l4pack.report.bars import memory_bars, size_pairs, size_rows
from l4pack.report.experts import FEW_TOKENS, expert_figures
from l4pack.report.figure import number, with_error
from l4pack.report.fitted import choices, frontier_figure
from l4pack.report.making import a_line_each, making
from l4pack.units import human_bytes, human_gib, human_seconds
from l4pack.verify.verify import Verification

RUNTIME = "vllm"
_SHOWN_FINDINGS = 10


@dataclass(frozen=True)
class Records:
    """What is known beside the artifact: what `verify` found, its most careful evaluation, what `fit --json` said."""

    verification: Verification
    accuracy: Mapping[str, Any] | None = None
    fitted: Mapping[str, Any] | None = None


def render_report(artifact: Checkpoint, records: Records, question: Question, day: str) -> str:
    """The page's HTML, made on `day` (2026-11-26); sections without data are left out.

    Raises BudgetError or UsageError for an unknown device, UsageError for a manifest or record that can't be read.
    """
    folder, accuracy, fitted = Path(artifact.name), records.accuracy, records.fitted
    manifest = read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None
    pairs = size_pairs(artifact)
    page = environment().get_template("report.html")
    return page.render(
        name=folder.resolve().name,
        day=day,
        version=__version__,
        accuracy=accuracy,
        measures=measures(accuracy) if accuracy else [],
        figures=defaultdict(
            lambda: None,  # a record need not have what a figure shows
            **(accuracy_figures(accuracy) | expert_figures(accuracy["layers"]) if accuracy else {}),
            **({"frontier": frontier_figure(fitted, accuracy)} if fitted else {}),
        ),
        few_tokens=FEW_TOKENS,
        sample=turns(accuracy or {}),
        refusals=_refusals(accuracy),
        fitted=fitted,
        choices=choices(fitted) if fitted else [],
        size=artifact_bytes(folder) if manifest else None,
        pairs=pairs,
        size_rows=size_rows(pairs),
        serving=_serving(question, folder.resolve().name),
        making=making(folder, manifest, artifact.config) if manifest else None,
        checks=_checks(records.verification),
        licence=_licence(folder),
    )


def _refusals(accuracy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows and words of what was measured of refusals."""
    found = (accuracy or {}).get("refusals")
    return {"rows": refusal_rows(found), "lines": refusal_lines(found)} if found else None


def environment() -> Environment:
    """What pages are made with: the templates, and words for numbers in them."""
    page = Environment(
        loader=PackageLoader("l4pack.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page.filters |= {"bytes": human_bytes, "gib": human_gib, "seconds": human_seconds, "number": number}
    page.globals |= {"with_error": with_error}
    return page


def _serving(question: Question, name: str) -> dict[str, Any]:
    """What serving takes on the device asked for, and the command; only `error` for a load that can't be."""
    host = find_host(question.device, load_devices())
    try:
        found = budget(question.subject, host, question.load, RUNTIME)
    except L4packError as error:
        return {"error": error.message}
    command = serve_command(found, name)
    return {
        "error": "",
        "fits": found.fits,
        "lacks": "" if found.fits else found.lacking("lacks"),
        "device": host.name,
        "gpu": host.device.title,
        "runtime": found.runtime.title,
        "setting": found.setting,
        "promised_by": question.promised_by,
        "max_context": limits(found).max_context,
        "headroom": found.headroom_bytes,
        "memory": memory_bars(found),
        "command": a_line_each(command) if command else None,
    }


def _checks(found: Verification) -> dict[str, Any]:
    """What `verify` found, findings of the same words at many places together."""
    told: dict[tuple[str, str], list[str]] = defaultdict(list)
    for finding in found.findings:
        told[finding.level, finding.message].append(finding.where)
    findings = [
        {"level": level, "message": message, "where": where[0], "more": len(where) - 1}
        for (level, message), where in told.items()
    ]
    return {
        "ok": found.ok,
        "against": found.against,
        "tally": found.checked.tally,
        "modules": found.checked.modules,
        "files": found.checked.files,
        "findings": findings[:_SHOWN_FINDINGS],
        "more": max(0, len(findings) - _SHOWN_FINDINGS),
    }


def _licence(folder: Path) -> dict[str, Any]:
    audit = audit_materials(folder_materials(folder, folder.resolve().name))
    return {"title": audit.policy.title, "ok": audit.ok, "duties": audit.duties, "findings": audit.findings}
