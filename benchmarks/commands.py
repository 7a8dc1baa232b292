"""Run l4pack's commands in processes of their own and take what each printed, its time and its memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.5

# `getrusage` would count what the parent held when it started the process, so it leaves its own status behind.
_LEAVING_STATUS = """
import atexit, pathlib, sys
from l4pack.__main__ import main
status = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: status.write_text(pathlib.Path("/proc/self/status").read_text()))
main()
"""


@dataclass(frozen=True)
class Ended:
    """One process: its JSON, wall and processor seconds, and peak resident bytes (0 where it was killed)."""

    output: dict[str, Any]
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(*arguments: object, accepted: tuple[int, ...] = (0,), killed_when: Callable[[], bool] | None = None) -> Ended:
    """`l4pack ARGUMENTS --json` to its end, or until `killed_when` says so. Leaves the program on other exit codes."""
    with tempfile.TemporaryDirectory() as folder:
        status, out = Path(folder, "status"), Path(folder, "out")
        command = [sys.executable, "-c", _LEAVING_STATUS, str(status), *map(str, arguments), "--json"]
        started = time.monotonic()
        with out.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream)
        if killed_when is not None:
            _kill(process.pid, killed_when)
        _, ended, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        code = os.waitstatus_to_exitcode(ended)
        if code not in (accepted if killed_when is None else (-signal.SIGKILL,)):
            sys.exit(f"l4pack {' '.join(map(str, arguments))} ended with {code}")
        output, peak = ({}, 0) if killed_when else (json.loads(out.read_text()), peak_bytes(status.read_text()))
        return Ended(output, seconds, usage.ru_utime + usage.ru_stime, peak)


def _kill(process: int, when: Callable[[], bool]) -> None:
    while not when() and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(POLL_SECONDS)
    os.kill(process, signal.SIGKILL)


def peak_bytes(status: str) -> int:
    """The peak resident memory that a process's `/proc/PID/status` states."""
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
