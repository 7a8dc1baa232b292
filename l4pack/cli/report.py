"""`l4pack report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l4pack.checkpoint.journal import write_atomic
from l4pack.checkpoint.source import open_folder
from l4pack.cli import console
from l4pack.cli.evaluate import beside
from l4pack.cli.options import Artifact, DeviceName


def report(
    artifact: Artifact,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Page to write; DIR.report.html.", show_default=False),
    ] = None,
    device: DeviceName = "h100",
) -> None:
    """Write one HTML page about an artifact: size, memory, errors by layer and expert, KL, gates. Needs no network.

    Example: `l4pack report demo-int4`
    """
    from l4pack.evaluate.record import ACCURACY_NAME, read_accuracy
    from l4pack.evaluate.report import render_report
    from l4pack.subject import open_subject

    checkpoint = open_folder(artifact)
    accuracy = read_accuracy(artifact) if (artifact / ACCURACY_NAME).exists() else None
    page = render_report(checkpoint, accuracy, open_subject(str(artifact)), device)
    path = out or beside(artifact, ".report.html")
    write_atomic(path, page.encode())
    console.show(f"[bold]{console.plain(path)}[/bold]  open it in a browser")
