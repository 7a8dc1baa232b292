"""What every command takes beside its own options: how much is said, and defaults from the environment and a file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from l4pack.cli import console
from l4pack.cli.options import LogFileOption, QuietOption, VerboseOption
from l4pack.errors import UsageError

PREFIX = "L4PACK_"
CONFIG = "L4PACK_CONFIG"
MAX_BYTES = 1_000_000
UNSET = ("--help", "--version", "--quiet", "--verbose", "--json")  # said each time, never by default


@dataclass(frozen=True)
class Default:
    """A default that somebody set: the option, its value as written, and where it is from."""

    option: str
    value: Any
    origin: str


def config_file() -> Path:
    """Where defaults are read from: L4PACK_CONFIG, else l4pack/config.toml in the user's configuration folder."""
    named = os.environ.get(CONFIG)
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(named) if named else base / "l4pack" / "config.toml"


@cache
def read_config(path: Path) -> dict[str, Any]:
    """The tables of a configuration file; none where there is no such file. Raises UsageError."""
    hint = f"mend it, or name another in {CONFIG}"
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES:,} bytes", hint=hint)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", hint=hint) from error


def prepare(command: Any, name: str, words: tuple[str, ...]) -> None:
    """Give a command, or each of a group's, the options that all take, and the defaults that were set for it."""
    console.without_types(command)
    inner = getattr(command, "commands", None)
    if inner is not None:
        for one, part in inner.items():
            prepare(part, one, (*words, name))
        return
    command.params += _shared_options()
    found = defaults_of(command, (*words, name))
    command.context_settings["default_map"] = {
        _option(command, default.option).name: default.value for default in found
    }


def defaults_in(command: Any, name: str, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Default]]:
    """Every default of a command, or of a group's, with the words that call it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield from ((" ".join((*words, name)), one) for one in defaults_of(command, (*words, name)))
        return
    for one, part in inner.items():
        yield from defaults_in(part, one, (*words, name))


def unknown_keys(path: Path, commands: list[Any]) -> list[str]:
    """Keys at the top of a configuration file that are no option of any command, nor the name of one."""
    known = {name.removeprefix("--") for command in commands for name in _all_options(command)}
    known |= {command.name for command in commands}
    return sorted(set(read_config(path)) - known)


def unknown_variables(commands: list[Any]) -> list[str]:
    """Variables of the environment that look like defaults, of no option of any command."""
    from l4pack.timing.kept import CACHE_ENV

    known = {_variable(name) for command in commands for name in _all_options(command)} | {CONFIG, CACHE_ENV}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def _variable(option: str) -> str:
    return PREFIX + option.removeprefix("--").upper().replace("-", "_")


def _all_options(command: Any) -> list[str]:
    inner = getattr(command, "commands", None)
    return _options(command) if inner is None else [name for part in inner.values() for name in _all_options(part)]


def defaults_of(command: Any, words: tuple[str, ...]) -> list[Default]:
    """What is set for a command's options; a variable counts before the file, the command's own table before the top."""
    path = config_file()
    top = read_config(path)
    own = _table(top, words, path, command)
    return [found for option in _options(command) if (found := _default(option, own, top, path)) is not None]


def _default(option: str, own: Mapping[str, Any], top: Mapping[str, Any], path: Path) -> Default | None:
    key = option.removeprefix("--")
    variable = _variable(option)
    if variable != CONFIG and variable in os.environ:
        return Default(option, os.environ[variable], variable)
    for table in (own, top):
        if key in table and not isinstance(table[key], dict):
            return Default(option, table[key], str(path))
    return None


def _table(top: Mapping[str, Any], words: tuple[str, ...], path: Path, command: Any) -> Mapping[str, Any]:
    """The command's own table, whose keys must be its options."""
    table: Any = top
    for word in words:
        table = table.get(word, {}) if isinstance(table, dict) else {}
    known = [option.removeprefix("--") for option in _options(command)]
    for key in table if isinstance(table, dict) else ():
        if key not in known:
            close = get_close_matches(key, known, n=2) or known
            raise UsageError(
                f"{path}: {' '.join(words)} has no option '{key}'", hint=f"did you mean {' or '.join(close)}?"
            )
    return table if isinstance(table, dict) else {}


def _options(command: Any) -> list[str]:
    """The long names of a command's options that may have a default of one's own."""
    return [name for name in _long_names(command) if name not in UNSET]


def _long_names(command: Any) -> Iterator[str]:
    for param in command.params:
        yield from (name for name in getattr(param, "opts", ()) if name.startswith("--") and not param.hidden)


def _option(command: Any, name: str) -> Any:
    return next(param for param in command.params if name in getattr(param, "opts", ()))


def _shared_options() -> list[Any]:
    """-q, -v and --log-file, as Click's own options."""
    holder = typer.Typer()
    holder.command()(_manner)
    return [param for param in get_command(holder).params if param.name in ("quiet", "verbose", "log_file")]


def _manner(quiet: QuietOption = False, verbose: VerboseOption = False, log_file: LogFileOption = None) -> None:
    """Never called: its options are taken from it."""
    raise AssertionError(quiet, verbose, log_file)
