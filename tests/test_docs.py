"""The documents say what the tool does: every command, recipe, format, exit code and link in them is real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from command_line import CODES, commands

from l4pack.cli.app import app
from l4pack.formats.known import format_names
from l4pack.recipe import recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = ROOT / "docs" / "reference"
TEXT = {path: path.read_text(encoding="utf-8") for path in PAGES}


def command_lines():
    """Every `l4pack ...` line of every code block, with the page it is on."""
    for path, text in TEXT.items():
        for block in re.findall(r"^ *```(?:console|bash|sh|shell|)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if "[OPTIONS]" not in line and (
                    match := re.match(r"\s*(?:\$ )?(?:\.venv/bin/|uvx )?(l4pack .*)", line)
                ):
                    yield path.relative_to(ROOT), match[1]


def test_the_reference_is_what_the_program_says():
    """Commands with their options, and the keys of recipes and formats: written by a tool, never by hand."""
    tool = ROOT / "tools" / "make_reference.py"
    checked = subprocess.run([sys.executable, tool, "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("words", sorted(commands()))
def test_every_command_is_in_the_reference(words):
    assert re.search(rf"\bl4pack {words}\b", TEXT[REFERENCE / "cli.md"])


@pytest.mark.parametrize(
    ("page", "name"),
    [("recipes.md", name) for name in recipe_names()] + [("formats.md", name) for name in format_names()],
)
def test_every_shipped_recipe_and_format_is_in_the_reference(page, name):
    assert re.search(rf"(^#+ |`|name: ){name}(`|$)", TEXT[REFERENCE / page], re.MULTILINE)


@pytest.mark.parametrize("code", sorted(set(CODES.values())))
def test_every_exit_code_is_documented(code):
    assert any(re.search(rf"^\W*{code}\b", text, re.MULTILINE) for text in TEXT.values())


@pytest.mark.parametrize(("page", "line"), list(command_lines()), ids=str)
def test_command_lines_are_real(page, line):
    words = shlex.split(line.split(" | ")[0].split(" > ")[0], comments=True)[1:]
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        named = words[0] in command.commands
        if not named and "show" not in command.commands:
            break
        command = command.commands[words.pop(0) if named else "show"]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in known, f"{page}: {line}"
    assert not hasattr(command, "commands") or not words or words[0].startswith("-") or command.callback, (
        f"{page}: {line}"
    )


def test_links_lead_somewhere():
    for path, text in TEXT.items():
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"
