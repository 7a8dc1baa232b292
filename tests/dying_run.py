"""Runs that die by SIGKILL at a chosen point, in a process of their own. Imported by a fork server: keep it light."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l4pack import job, run
from l4pack.checkpoint.open import open_source
from l4pack.execute import Executor
from l4pack.plan import make_plan
from l4pack.recipe import load_recipe


def die_in(point: str, after: int, source: Path, recipe: str, out: Path) -> int:
    """Run a job that is killed at the `after`-th passing of `point`; returns how its process ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(point, after, str(source), recipe, out))
    process.start()
    process.join(60)
    return process.exitcode if process.exitcode is not None else 0


def _run(point: str, after: int, source: str, recipe: str, out: Path) -> None:
    job.SYNC_SECONDS = 0.001  # journal often, so that every resumed run finds something done
    plan = make_plan(open_source(source), load_recipe(recipe))
    passed: list[None] = []

    def mortal(function: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            passed.append(None)
            if before and len(passed) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if not before and len(passed) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    where, _, moment = point.partition(", ")
    owner, name = {
        "task": (Executor, "run"),
        "small file": (run, "write_atomic"),
        "appearance": (Path, "replace"),
        "tidying": (shutil, "rmtree"),
    }[where]
    steady = Executor.run
    Executor.run = lambda self, task: (time.sleep(0.0005), steady(self, task))[1]  # type: ignore[method-assign]
    setattr(owner, name, mortal(getattr(owner, name), before=moment == "before"))
    run.run_plan(plan, out)
