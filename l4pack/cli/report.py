"""`l4pack report`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4pack.cli import console
from l4pack.cli.options import ArtifactOption, DeviceOption, FittedOption, OutOption
from l4pack.errors import UsageError

if TYPE_CHECKING:
    from l4pack.report.page import Records


def report(
    artifact: ArtifactOption,
    out: OutOption[Path | None] = None,
    device: DeviceOption[str | None] = None,
    fitted: FittedOption = None,
) -> None:
    """Write one HTML page about an artifact: how close it is, where it runs, how it was made. Needs no network.

    The page is DIR.report.html unless `--out` names another. Memory is that of the device and load that the artifact's
    recipe promises, else of one h100.

    Example: `l4pack report demo-int4`
    """
    from l4pack.budget.load import Load
    from l4pack.budget.named import Asked, question_of
    from l4pack.checkpoint.source import open_folder
    from l4pack.report.page import render_report
    from l4pack.work.files import path_beside, write_atomic

    checkpoint = open_folder(artifact)
    records = _records(artifact, fitted)
    question = question_of(Asked(str(artifact), None, device, Load()))
    page = render_report(checkpoint, records, question, datetime.now(UTC).date().isoformat())
    path = out or path_beside(artifact, ".report.html")
    write_atomic(path, page.encode())
    console.show(f"[bold]{console.plain(path)}[/bold]  open it in a browser")


def _records(artifact: Path, fitted: Path | None) -> Records:
    """What was measured and fitted. Raises UsageError, QualityError for a measurement of other weights."""
    from l4pack.evaluate.record import check_current, read_evaluations
    from l4pack.report.page import Records

    measured = read_evaluations(artifact)
    check_current(artifact, measured)
    return Records(measured[0] if measured else None, _fitted(artifact, fitted))


def _fitted(artifact: Path, file: Path | None) -> dict[str, Any] | None:
    """What fit decided, from the file named or the one beside the artifact. Raises UsageError for one that is not."""
    from l4pack.fit.record import read_fit
    from l4pack.work.files import path_beside

    record = read_fit(file or path_beside(artifact, ".fit.json"))
    if record is None and file is not None:
        raise UsageError(f"{file} is not what fit says", hint="make one with: l4pack fit SOURCE ... --json > fit.json")
    return None if record is None else record.model_dump(mode="json")
