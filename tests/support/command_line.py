"""Every command of the command line, and the exit code of every error."""

from __future__ import annotations

import typer.main

from l4pack.cli.app import app


def commands():
    """Every command and subcommand by its words."""
    found = {}

    def walk(group, words):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, [*words, name])
            if not hasattr(command, "commands") or command.callback:
                found[" ".join([*words, name])] = command

    walk(typer.main.get_command(app), [])
    return found


CODES = {"L4packError": 1, "UsageError": 2, "RecipeError": 2, "BudgetError": 3, "SourceError": 4, "HubError": 5, "ClusterError": 5,
         "QualityError": 6, "LicenceError": 7, "StoppedError": 75}  # fmt: skip
