"""Regular expressions that come with a checkpoint, matched so that none can take the machine.

Runtimes match the `ignore` and `targets` entries of a stanza with Python's `re`, and so must this; but `re` may take
longer than the universe on a short name, and can't be interrupted. So an expression is matched here only if its form
shows that it is quick; all others are matched in a process of their own, within limits of time and memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache

from l4pack.errors import L4packError

MAX_PATTERN = 2000  # characters
SECONDS = 5
_MAX_STARS = 2
# Letters, escaped dots, runs of digits, one choice between words, and `.*` (counted beside): at worst the square of a
# name's length.
_QUICK = re.compile(r"(?:\.\*|[\w.-]|\\\.|\\d\+?|\((?:\w+\|)*\w+\))*\$?")
_CHILD = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
pattern, names = json.load(sys.stdin)
match = re.compile(pattern).match
print(json.dumps([number for number, name in enumerate(names) if match(name)]))
"""


class PatternError(L4packError):
    """An expression that is none, or can't be matched within the limits."""

    def __init__(self, text: str, why: str) -> None:
        super().__init__(f"{text!r:.80} {why}", hint="mend the stanza of config.json")
        self.text, self.why = text, why


class Pattern:
    """One expression, matched from the start of a name as runtimes do."""

    def __init__(self, text: str) -> None:
        """Raises PatternError for what is no expression."""
        self.text = text
        self._found: dict[str, bool] = {}
        if len(text) > MAX_PATTERN:
            raise PatternError(text, "is too long for a regular expression")
        try:
            compiled = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(text, f"is no regular expression ({error})") from error
        quick = _QUICK.fullmatch(text) is not None and text.count("*") <= _MAX_STARS
        self._quick = compiled if quick else None

    def match(self, name: str) -> bool:
        """Whether it names a module. Raises PatternError."""
        if self._quick is not None:
            return self._quick.match(name) is not None
        if name not in self._found:
            self.prepare([name])
        return self._found[name]

    def prepare(self, names: Iterable[str]) -> None:
        """Match many names at once, which is cheaper where a process is needed. Raises PatternError."""
        wanted = [name for name in names if name not in self._found]
        if self._quick is None and wanted:
            matching = set(_match_apart(self.text, wanted))
            self._found.update({name: number in matching for number, name in enumerate(wanted)})


@lru_cache(maxsize=1024)
def pattern(text: str) -> Pattern:
    """A pattern, kept with what it is known to match. Raises PatternError."""
    return Pattern(text)


def matches(entry: str, module: str) -> bool:
    """Whether a target or ignore entry names a module, as all runtimes read it: exact, or `re:` from the start.

    Raises PatternError.
    """
    if entry.startswith("re:"):
        return pattern(entry.removeprefix("re:")).match(module)
    return entry == module


def _match_apart(text: str, names: Sequence[str]) -> list[int]:
    """Which of the names an expression matches, found by another process."""
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    try:
        done = subprocess.run(
            command, input=json.dumps([text, names]).encode(), capture_output=True, timeout=SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        raise PatternError(text, f"takes more than {SECONDS} s to match: runtimes would hang") from error
    except (subprocess.CalledProcessError, OSError) as error:
        raise PatternError(text, "can't be matched within the limits") from error
    found: list[int] = json.loads(done.stdout)
    return found
