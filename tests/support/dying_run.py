"""Runs that die by SIGKILL at a chosen point, each in a process of its own.

Run as a script it is a server that has everything loaded: it reads one JSON list a line (point, passings, source,
recipe, out), forks a run, and answers with the way the run ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from l4pack.checkpoint.open import open_source
from l4pack.plan.plan import make_plan
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import quantize_block
from l4pack.quantize import run
from l4pack.quantize.execute import Executor
from l4pack.recipe import load_recipe
from l4pack.work import threads
from l4pack.work.folder import WorkFolder


class DyingRuns:
    """The client's end of the server."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def die_in(self, point: str, after: int, source: Path, recipe: str, out: Path) -> int:
        """Run a job that is killed at the `after`-th passing of `point`; 0, or minus the signal that ended it."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps([point, after, str(source), recipe, str(out)]) + "\n")
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """Stop the server."""
        self._server.communicate()


def serve() -> None:
    """Fork a run for every line of stdin."""
    scheme = load_recipe("int4-rtn").schemes["int4"]
    for layout in Layout:  # loads the kernels, for all children
        quantize_block(np.zeros((128, 128), np.uint16), layout, "BF16", scheme)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run_and_die(*json.loads(line))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run_and_die(point: str, after: int, source: str, recipe: str, out: str) -> None:
    threads.SYNC_SECONDS = 0.003  # journal often, so that a resumed run finds something done
    steady = Executor.run
    Executor.run = lambda self, task: (time.sleep(0.0005), steady(self, task))[1]  # type: ignore[method-assign]
    where, _, moment = point.partition(", ")
    owner, name = {
        "task": (Executor, "run"),
        "small file": (run, "write_atomic"),
        "appearance": (Path, "replace"),
        "tidying": (WorkFolder, "remove"),
        "removal": (Path, "rmdir"),
    }[where]
    setattr(owner, name, _mortal(getattr(owner, name), after, before=moment == "before"))
    run.run_plan(make_plan(open_source(source), load_recipe(recipe)), Path(out))


def _mortal(function: Callable[..., Any], after: int, *, before: bool) -> Callable[..., Any]:
    passed: list[None] = []

    def call(*arguments: Any, **options: Any) -> Any:
        passed.append(None)
        last = len(passed) > after
        if last and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


if __name__ == "__main__":
    serve()
