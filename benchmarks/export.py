"""Export an artifact and say what planning, carrying and proving take, beside `cp` of the artifact.

python benchmarks/export.py ARTIFACT gguf OUT
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from l4pack.checkpoint.open import open_source
from l4pack.export.known import target_named
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.units import human_bytes
from l4pack.work.progress import Shown

T = TypeVar("T")


def timed(what: str, do: Callable[[], T]) -> T:
    """Do it, and print wall seconds and CPU seconds of this process, by its own code and by the system for it."""
    wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    result = do()
    after = resource.getrusage(resource.RUSAGE_SELF)
    own, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    print(f"{what}: {time.monotonic() - wall:.1f} s wall, {own:.1f} + {system:.1f} CPU s", flush=True)
    return result


def main(artifact: str, container: str, out: Path) -> None:
    copy = out.with_name(f"{out.name}-cp")
    timed(
        "cp and sync",
        lambda: subprocess.run(f"cp -r '{artifact}' '{copy}' && sync -f '{copy}'", shell=True, check=True),
    )
    plan = timed("plan", lambda: plan_export(open_source(artifact), target_named(container)))
    print(f"reads {human_bytes(plan.read_bytes)}, writes {human_bytes(plan.artifact_bytes)}, {plan.workers} threads")
    started = time.monotonic()

    def step(_: str) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(
            f"carried after {time.monotonic() - started:.1f} s wall; {used.ru_utime + used.ru_stime:.1f} CPU s so far"
        )

    result = timed("carry and prove", lambda: run_export(plan, out, shown=Shown(step=step)))
    print(f"peak {human_bytes(result.peak_rss_bytes)} of {human_bytes(plan.peak_ram_bytes)} planned, {result.proof}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
