"""`l4pack licence`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import RenderableType

from l4pack.cli import console
from l4pack.cli.options import AsJsonOption, AuditedOption, NameOption
from l4pack.errors import LicenceError

if TYPE_CHECKING:
    from l4pack.publish.licence import Audit


def licence(
    target: AuditedOption,
    name: NameOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Say which duties of the model's licence a folder or repository does not meet; exit 7 if there are any.

    Example: `l4pack licence Llama-4-Scout-17B-16E-Instruct-W4A16-g128-mixed`
    """
    from l4pack.publish.licence import audit

    result = audit(target, name=name)
    console.show_json(result.record()) if as_json else console.show(*audit_view(result))
    if not result.ok:
        raise typer.Exit(LicenceError.exit_code)


def audit_view(result: Audit) -> list[RenderableType]:
    """An audit for people."""
    who = f"[bold]{console.plain(result.name)}[/bold]: {result.policy.title}, {result.duties} duties"
    if result.ok:
        return [f"{who}, all met"]
    table = console.table("Rule", "Where", "What is wrong")
    for finding in result.findings:
        table.add_row(finding.rule, console.plain(finding.where), console.plain(finding.message))
    return [f"{who}, [red]{len(result.findings)} findings[/red]", "", table]
