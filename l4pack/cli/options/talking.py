"""What is said while a command runs, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l4pack.cli import console

_PANEL = "Talk"

QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=console.set_quiet, expose_value=False, help="Say errors only.", rich_help_panel=_PANEL
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=console.set_verbose, expose_value=False, help="Say every part of a step.",
        rich_help_panel=_PANEL,
    ),
]  # fmt: skip
LogFileOption = Annotated[
    Path | None,
    typer.Option(
        "--log-file", metavar="FILE", callback=console.set_log, expose_value=False,
        help="Add progress, warnings and errors to a file, with the time.", rich_help_panel=_PANEL,
    ),
]  # fmt: skip
