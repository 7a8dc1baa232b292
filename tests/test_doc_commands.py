"""Every command in a `shell` block of the pages below is run, in order, from an empty folder."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/tutorial/first-artifact.md", "docs/how-to/convert-at-a-shell.md"]


def shell_commands(page):
    """The lines of a page's `shell` blocks, continued lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```shell\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


# Solving the demo takes a minute: where this module has done so, the same command finds its bytes and goes on.
SOLVED: dict[str, Path] = {}


def test_make_demo_ends_well(l4pack, tmp_path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    command = re.search(r"^demo: venv\n\t\$\(BIN\)/l4pack (.*)$", makefile, re.MULTILINE)[1]
    ended = l4pack(*shlex.split(command.replace("$(DEMO_OUT)", str(tmp_path / "demo-out"))))
    assert ended.code == 0, ended.err
    assert "KL" in ended.out
    assert "fits h100" in ended.out
    assert "serve    vllm serve " in ended.out
    assert "\\\\" not in ended.out  # a line of the command that goes on ends in one backslash
    SOLVED["quantize demo --recipe int4"] = tmp_path / "demo-out"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_end_well(page, l4pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = shell_commands(page)
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "l4pack", command
        _lend(arguments)
        ended = l4pack(*arguments)
        assert ended.code == 0, f"{command}\n{ended.err}"
        assert ended.out.strip(), command


def _lend(arguments):
    *job, _, out = arguments
    made = SOLVED.get(" ".join(job))
    if made is not None:
        shutil.copytree(made, out, ignore=shutil.ignore_patterns("accuracy.json"))
