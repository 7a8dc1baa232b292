"""What a cluster costs and gives: a task's overhead, a job on 1 to N workers here, and task times played on 8 and 64.

Shows: seconds that starting a task takes, the bytes of one machine whatever the workers, and how long the same tasks would
take on more workers with the ends of stages between them. Needs `l4pack[ray]` and 2 GB of memory; takes five minutes. With
`evaluate`, an evaluation is the job, and its figures are what must be the same.

    python benchmarks/cluster.py [WORKERS] [evaluate]
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.cluster.cluster import Cluster, Piece, Work
from l4pack.cluster.connect import connected
from l4pack.cluster.options import ClusterOptions, Share
from l4pack.evaluate.evaluate import PreparedEvaluation, prepare_evaluation
from l4pack.evaluate.inputs import EvaluationSettings
from l4pack.plan.plan import Plan, make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import load_recipe
from l4pack.text.choice import TextChoice
from l4pack.timing.spread import makespan

TASKS, SAMPLES, PLAYED = 200, 4, (1, 2, 8, 64)
EVALUATED = 8  # sequences
Job = Callable[[Path, Cluster | None], str]  # does it in a folder; what it comes to


class Nothing:
    """A job of which nothing need be open."""

    def __init__(self, job: None) -> None:
        self.job = job

    def close(self) -> None:
        """Nothing to close."""


def nothing(_: Nothing, number: int) -> int:
    """A task that takes no time."""
    return number


@dataclass(frozen=True)
class Timed:
    """A task that was done: its stage, the worker, and the seconds it took there."""

    stage: str
    worker: str
    seconds: float


def watch(cluster: Cluster) -> list[Timed]:
    """Tasks as they are done."""
    found: list[Timed] = []
    count = cluster._count

    def note(piece: Piece, done: Any) -> None:
        found.append(Timed(_stage(piece), done.worker, done.seconds))
        count(piece, done)

    cluster._count = note  # type: ignore[method-assign]
    return found


def _stage(piece: Piece) -> str:
    stage = piece.argument[1] if isinstance(piece.argument, tuple) else piece.argument
    return f"{stage.layer}: {piece.name.partition(':')[0]}" if hasattr(stage, "layer") else "rounding"


def overhead(cluster: Cluster) -> float:
    """Seconds a task beside its own, one after another on all workers."""
    share, work = Share(1, 0, 1 << 20), Work("nothing", Nothing, None, nothing)
    pieces = [Piece(str(number), number) for number in range(TASKS)]
    cluster.run(work, pieces[:8], share, lambda *_: None, threading.Event())
    started = time.monotonic()
    cluster.run(work, pieces, share, lambda *_: None, threading.Event())
    return (time.monotonic() - started) / TASKS


def digest(folder: Path) -> str:
    """Of all files."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def demo() -> Plan:
    """Int4 of the demo on few sequences."""
    recipe = load_recipe("int4").calibrating(False, samples=SAMPLES, sequence_length=None, seed=None)
    return with_text(make_plan(open_source("demo"), recipe))


def on_workers(workers: int, job: Job, out: Path) -> list[Timed]:
    """The job on so many workers of one core each."""
    with connected(ClusterOptions("local"), threads=1, cores=workers) as cluster:
        per_task, timed = overhead(cluster), watch(cluster)
        started = time.monotonic()
        found = job(out, cluster)
        wall, busy = time.monotonic() - started, sum(one.seconds for one in timed)
    shown = f"{workers} workers: {wall:6.1f} s wall, {busy:6.1f} s in {len(timed)} tasks"
    print(f"{shown}, {1000 * per_task:.1f} ms a task beside its own, {found}")
    return timed


def quantized(out: Path, cluster: Cluster | None) -> str:
    """Quantize the demo; the digest of what comes of it."""
    run_plan(demo(), out, cluster=cluster)
    return digest(out)


def evaluated(artifact: Path, out: Path, cluster: Cluster | None) -> str:
    """Evaluate an artifact of the demo; the digest of the figures, and the KL."""
    record = _prepared(artifact, out).run(cluster)
    figures = {key: value for key, value in record.items() if key not in ("run", "resumed_layers")}
    whole = hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()[:16]
    return f"{whole}, KL {record['kl_mean']:.6f}"


def _prepared(artifact: Path, out: Path) -> PreparedEvaluation:
    settings = EvaluationSettings(work=out, text=TextChoice("demo", EVALUATED, None, 0), compute="cpu")
    return prepare_evaluation(open_folder(artifact), open_source("demo"), settings)


def played(timed: list[Timed]) -> None:
    """The same tasks on more workers, stage after stage."""
    stages: dict[str, list[float]] = defaultdict(list)
    for stage, tasks in groupby(timed, key=lambda one: one.stage):
        stages[stage] += [task.seconds for task in tasks]
    alone = sum(map(sum, stages.values()))
    for workers in PLAYED:
        whole = sum(makespan(tasks, workers) for tasks in stages.values())
        waiting = 1 - alone / (workers * whole)
        print(
            f"played on {workers:2} workers: {whole:6.1f} s, {alone / whole:4.1f} times as fast, {waiting:.0%} waited"
        )


def main() -> None:
    """Run it."""
    numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    with tempfile.TemporaryDirectory() as folder:
        job: Job = quantized
        if "evaluate" in sys.argv:
            artifact = Path(folder) / "artifact"
            run_plan(make_plan(open_source("demo"), load_recipe("int4-rtn")), artifact)
            job = partial(evaluated, artifact)
        started = time.process_time()
        found = job(Path(folder) / "alone", None)
        print(f"one process: {time.process_time() - started:.1f} CPU seconds, {found}")
        alike = [on_workers(workers, job, Path(folder) / str(workers)) for workers in range(1, (numbers or [2])[0] + 1)]
    played(alike[0])  # those that had a core for themselves


if __name__ == "__main__":
    main()
