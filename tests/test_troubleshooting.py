"""Every message that the page on errors quotes is one that the code can say, with the exit code of its section."""

from __future__ import annotations

import ast
import errno
import os
import re
from functools import cache
from pathlib import Path

import pytest

from l4pack import errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
CLASSES = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
GAP = "\0"


def quoted():
    """Each quoted message with the exit code of its section."""
    for section in PAGE.split("\n## Exit code ")[1:]:
        for message in re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE):
            if message.replace("…", "").strip(" :,"):
                yield int(section.split(":")[0]), message


@cache
def spoken():
    """Texts of the code, what varies as a gap, with the exit codes of the errors that are raised with them."""
    found = {}
    for path in (ROOT / "l4pack").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr) and (text := template(node)):
                found.setdefault(text, set())
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES and node.args:
                found.setdefault(template(node.args[0]), set()).add(CLASSES[node.func.id].exit_code)
    return found


def template(node):
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if not isinstance(node, ast.JoinedStr):
        return ""
    return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)


@pytest.mark.parametrize(("code", "message"), list(quoted()))
def test_the_code_can_say_it(code, message):
    if message == os.strerror(errno.ENOSPC):
        return
    shape = re.compile(".+".join(map(re.escape, message.split("…"))), re.DOTALL)
    codes = [codes for text, codes in spoken().items() if shape.fullmatch(text)]
    assert codes, message
    assert not any(codes) or any(code in one for one in codes), message


def test_every_exit_code_has_its_section():
    assert {int(code) for code in re.findall(r"^## Exit code (\d+)", PAGE, re.MULTILINE)} == {
        kind.exit_code for kind in CLASSES.values()
    }
