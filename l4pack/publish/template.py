"""A user's card template, rendered in a process of its own: a template is a program, and may loop or grow without end.

Jinja's sandbox keeps it from attributes and files; the limits of the process keep it from time and memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4pack.errors import UsageError

SECONDS, MEMORY_BYTES, TEXT_BYTES = 10, 512 * 1024**2, 2_000_000


def render_template(text: str, where: str, values: Mapping[str, Any]) -> str:
    """The text that a Jinja template makes of plain values. Raises UsageError when it can't, or takes too much."""
    asked = json.dumps({"text": text, "values": values})
    hint = f"a template may use: {', '.join(sorted(values))}"
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=asked.encode(),
            capture_output=True,
            timeout=2 * SECONDS,
            check=False,
        )
        answer = json.loads(ended.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise UsageError(f"{where}: the template takes too much time or memory", hint=hint) from error
    if "error" in answer:
        raise UsageError(f"{where}: {answer['error']}", hint=hint)
    return str(answer["text"])


def _main() -> None:
    """Render what stands on standard input."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from l4pack.publish.markdown import code

    asked = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    environment.filters["code"] = code
    _limit(resource.RLIMIT_CPU, SECONDS)
    _limit(resource.RLIMIT_AS, _address_space() + MEMORY_BYTES)
    try:
        text = environment.from_string(asked["text"]).render(asked["values"])
        answer = {"text": text} if len(text) <= TEXT_BYTES else {"error": f"the card is over {TEXT_BYTES:,} characters"}
    except Exception as error:  # whatever the program in the template does wrong
        reason = getattr(error, "message", None) or str(error) or type(error).__name__
        answer = {"error": "it takes too much memory" if isinstance(error, MemoryError) else str(reason)[:300]}
    json.dump(answer, sys.stdout)


def _address_space() -> int:
    """Bytes of address space that the process has taken."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    _main()
