"""Texts: what is solved on, what is measured on."""

from __future__ import annotations

from typing import Annotated, TypeVar

import typer

from l4pack.cli import console
from l4pack.errors import UsageError
from l4pack.units import parse_tokens

_T = TypeVar("_T")

_PANEL = "Text"

_A_PANEL = "a file of text or rows, a folder, or wikitext2, c4, demo"
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE|DIR|SET",
        help=f"Text that is calibrated on: {_A_PANEL}. Unless given, one that ships; of `measure`, the rest of --text.",
        rich_help_panel=_PANEL,
    ),
]
CalibrationSamplesOption = Annotated[
    _T,
    typer.Option(
        "--calibration-samples",
        metavar="N",
        help="How much of it: whole sequences, short rows count by their tokens.",
        rich_help_panel=_PANEL,
    ),
]
TextOption = Annotated[
    str,
    typer.Option(
        "--text", metavar="FILE|DIR|SET", help=f"Text that is measured on: {_A_PANEL}.", rich_help_panel=_PANEL
    ),
]
SamplesOption = Annotated[
    int,
    typer.Option(
        "--samples",
        metavar="N",
        help="How much of it: whole sequences, short rows count by their tokens.",
        rich_help_panel=_PANEL,
    ),
]
SequenceLengthOption = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        metavar="TOKENS",
        parser=parse_tokens,
        help="Most tokens a sequence of either text; 2048 or the model's context unless given.",
        rich_help_panel=_PANEL,
    ),
]
SeedOption = Annotated[
    _T, typer.Option("--seed", metavar="N", help="Which sequences of a text are taken.", rich_help_panel=_PANEL)
]
EarlierTextOption = Annotated[
    str | None, typer.Option("--text", hidden=True, help="What --calibration was called here.", rich_help_panel=_PANEL)
]
EarlierSamplesOption = Annotated[
    int | None,
    typer.Option("--samples", hidden=True, help="What --calibration-samples was called here.", rich_help_panel=_PANEL),
]


def now_called(name: str, given: _T | None, earlier_name: str, earlier: _T | None) -> _T | None:
    """The value of an option that was called otherwise before; says so on stderr. Raises UsageError if both are given."""
    if earlier is None:
        return given
    if given is not None:
        raise UsageError(f"{name} and {earlier_name}, what it was called before, are both given", hint=f"use {name}")
    console.warning(f"{earlier_name} is called {name} now")
    return earlier
