"""The Typer application: every command is named here, and its module is imported when the command is asked for."""

from __future__ import annotations

from collections import UserDict
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from l4pack import __version__
from l4pack.cli import console

COMMANDS = {
    "inspect": "inspect:inspect",
    "plan": "plan:plan",
    "measure": "measure:measure",
    "fit": "fit:fit",
    "quantize": "quantize:quantize",
    "verify": "verify:verify",
    "evaluate": "evaluate:evaluate",
    "compare": "compare:compare",
    "chat": "chat:chat",
    "coverage": "coverage:coverage",
    "report": "report:report",
    "licence": "licence:licence",
    "export": "export:export",
    "dequantize": "dequantize:dequantize",
    "package": "package:package",
    "push": "push:push",
    "recipes": "recipes:recipes",
    "formats": "recipes:formats",
    "devices": "budget:devices",
    "build": "build:build",
    "budget": "budget:budget_app",
    "config": "config:config",
}
"""What stands for each command, as `module:name` in this package: a function, or a Typer application of its own."""

STYLE: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": "markdown"}


@cache
def loaded(name: str) -> Any:
    """The command of that name as Click knows it."""
    from l4pack.cli.shared import prepare

    module, _, attribute = COMMANDS[name].partition(":")
    command = getattr(import_module(f"l4pack.cli.{module}"), attribute)
    holder = typer.Typer(add_completion=False, **STYLE)
    holder.callback()(lambda: None)  # with one, Typer makes a group even of a single command
    if isinstance(command, typer.Typer):
        holder.add_typer(command, name=name)
    else:
        holder.command(name)(command)
    group: Any = get_command(holder)
    found = group.commands[name]
    prepare(found, name, ())
    return found


class _Commands(UserDict[str, Any]):
    """Commands by name; only those that are taken out are imported."""

    def __getitem__(self, name: str) -> Any:
        return loaded(name) if name in self.data else super().__getitem__(name)


class _Root(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Commands(COMMANDS)
        console.without_types(self)


app = typer.Typer(
    name="l4pack",
    cls=_Root,
    help="Turn a full Llama 4 checkpoint into a verified Int4 or FP8 artifact, on hardware far smaller than the model.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **STYLE,
)


def _version(wanted: bool) -> None:
    if wanted:
        console.show_text(f"l4pack {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    del version
