"""The command under way, as a person would type it again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

_PROGRAM = "l4pack"
_LONGEST = 2000


def this_command() -> str:
    """The command line, quoted for a shell; nothing when l4pack is used as a library, or when it is very long."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.name != _PROGRAM and program.parts[-2:] != (_PROGRAM, "__main__.py"):
        return ""
    text = shlex.join([_PROGRAM, *sys.argv[1:]])
    return text if len(text) <= _LONGEST else ""
