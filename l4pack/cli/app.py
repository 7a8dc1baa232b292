"""The Typer application: every command is registered here."""

from __future__ import annotations

from typing import Annotated

import typer

from l4pack import __version__
from l4pack.cli import console
from l4pack.cli.budget import budget_app, devices
from l4pack.cli.build import build_command
from l4pack.cli.coverage import coverage
from l4pack.cli.evaluate import evaluate
from l4pack.cli.fit import fit
from l4pack.cli.inspect import inspect
from l4pack.cli.licence import licence
from l4pack.cli.measure import measure
from l4pack.cli.package import package
from l4pack.cli.plan import plan
from l4pack.cli.push import push
from l4pack.cli.quantize import quantize
from l4pack.cli.recipes import formats, recipes
from l4pack.cli.report import report
from l4pack.cli.verify import verify

app = typer.Typer(
    name="l4pack",
    help="Turn a full Llama 4 checkpoint into a verified Int4 or FP8 artifact, on hardware far smaller than the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        console.show(f"l4pack {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    del version


for command in (
    inspect, plan, measure, fit, quantize, verify, evaluate, coverage, report, licence, package, push, recipes,
    formats, devices,
):  # fmt: skip
    app.command()(command)
app.command(name="build")(build_command)
app.add_typer(budget_app, name="budget")
