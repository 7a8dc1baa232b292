"""`l4pack` with every task slowed down, for tests that stop it half way: slow_run.py SECONDS ARGUMENTS..."""

from __future__ import annotations

import sys
import time

from l4pack.__main__ import main
from l4pack.quantize.execute import Executor
from l4pack.work import threads

PAUSE = float(sys.argv[1])
sys.argv = ["l4pack", *sys.argv[2:]]
run_task = Executor.run


def slowly(self: Executor, task: object) -> None:
    time.sleep(PAUSE)
    run_task(self, task)  # type: ignore[arg-type]


Executor.run = slowly  # type: ignore[method-assign,assignment]
threads.SYNC_SECONDS = 0.02
main()
