"""`l4pack report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l4pack.cli import console
from l4pack.cli.options import ArtifactOption, DeviceOption, FittedOption, OutOption
from l4pack.errors import UsageError


def report(
    artifact: ArtifactOption,
    out: OutOption[Path | None] = None,
    device: DeviceOption[str] = "h100",
    fitted: FittedOption = None,
) -> None:
    """Write one HTML page about an artifact: size, memory, errors by layer and expert, KL, gates. Needs no network.

    The page is DIR.report.html unless `--out` names another.

    Example: `l4pack report demo-int4`
    """
    from l4pack.budget.named import open_subject
    from l4pack.checkpoint.source import open_folder
    from l4pack.evaluate.record import check_current, read_evaluations
    from l4pack.report.page import render_report
    from l4pack.work.files import path_beside, write_atomic

    checkpoint = open_folder(artifact)
    measured = read_evaluations(artifact)
    check_current(artifact, measured)
    accuracy = measured[0] if measured else None
    page = render_report(checkpoint, accuracy, open_subject(str(artifact)), device, _fitted(artifact, fitted))
    path = out or path_beside(artifact, ".report.html")
    write_atomic(path, page.encode())
    console.show(f"[bold]{console.plain(path)}[/bold]  open it in a browser")


def _fitted(artifact: Path, file: Path | None) -> dict[str, Any] | None:
    """What fit decided, from the file named or the one beside the artifact. Raises UsageError for one that is not."""
    from l4pack.fit.record import read_fit
    from l4pack.work.files import path_beside

    record = read_fit(file or path_beside(artifact, ".fit.json"))
    if record is None and file is not None:
        raise UsageError(f"{file} is not what fit says", hint="make one with: l4pack fit SOURCE ... --json > fit.json")
    return None if record is None else record.model_dump(mode="json")
