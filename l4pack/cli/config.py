"""`l4pack config`."""

from __future__ import annotations

from l4pack.cli import console
from l4pack.cli.options import AsJsonOption


def config(as_json: AsJsonOption = False) -> None:
    """Show the defaults that you set: in the environment, as L4PACK_MAX_RAM=8GB, or in a file.

    The file is TOML: a key is an option's long name, at the top for every command that takes it, or in the table of one.

    Example: `L4PACK_MAX_RAM=8GB l4pack config`
    """
    from l4pack.cli.app import COMMANDS, loaded
    from l4pack.cli.shared import config_file, defaults_in, unknown_keys, unknown_variables

    path, commands = config_file(), [loaded(name) for name in COMMANDS]
    for key in unknown_keys(path, commands):
        console.warning(f"{path}: no command takes '{key}'")
    for name in unknown_variables(commands):
        console.warning(f"{name}: no command takes such an option")
    found = [(words, default) for name in COMMANDS for words, default in defaults_in(loaded(name), name)]
    if as_json:
        rows = [
            {"command": words, "option": one.option, "value": one.value, "from": one.origin} for words, one in found
        ]
        console.show_json({"file": str(path), "there": path.is_file(), "defaults": rows})
        return
    table = console.table("Command", "Option", "Value", "From")
    for words, one in found:
        table.add_row(words, one.option, console.plain(one.value), console.plain(one.origin))
    there = "" if path.is_file() else ", which is not there"
    console.show(f"file: {console.plain(path)}{there}", *([table] if found else ["no default of your own is set"]))
