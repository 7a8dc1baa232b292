"""Carrying out a plan: threads, a journal, and a folder that appears when it is complete."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from l4pack.checkpoint.apart import refuse_overlap
from l4pack.checkpoint.header import DTYPE_BITS
from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.matrices import MatrixSource, matrices_of
from l4pack.checkpoint.parts import as_opened
from l4pack.checkpoint.reader import NUMPY_TYPES, Reader
from l4pack.checkpoint.source import Store
from l4pack.checkpoint.writer import Extent, ShardWriter
from l4pack.dequantize.plan import COPY_BYTES, WEIGHTS, DequantizePlan, Task, is_this
from l4pack.errors import SourceError
from l4pack.plan.memory import check_room
from l4pack.quant.dtypes import FloatName
from l4pack.quant.floats import HELD_AS, narrowed, not_finite, widen
from l4pack.work import machine
from l4pack.work.command import this_command
from l4pack.work.files import check_disk, sync_folder, write_atomic
from l4pack.work.folder import LOCK_NAME, check_writable, mark_name, owned, tidy, work_beside
from l4pack.work.progress import Shown
from l4pack.work.signals import check_stop, stop_signals
from l4pack.work.threads import in_threads

_KIND = "dequantize"
_JOURNAL, _FILES = "journal.jsonl", "files"
_OWN_NAMES = {_JOURNAL, f"{_JOURNAL}.tmp", _FILES, LOCK_NAME, mark_name(_KIND)}
_ROWS = 128


@dataclass(frozen=True)
class DequantizeResult:
    """What a run did; `already_done` where the folder was there, made by the same plan."""

    out: Path
    seconds: float
    peak_rss_bytes: int
    already_done: bool = False


def run_dequantize(
    plan: DequantizePlan, out: Path, *, restart: bool = False, shown: Shown | None = None
) -> DequantizeResult:
    """Write the checkpoint of `plan` to the folder `out`, which appears when it is complete.

    Work lies in `out` + '.partial' until then; the same call goes on where an earlier one was stopped or killed. Raises
    UsageError (`out` is taken, or the work begun belongs to another job), BudgetError (memory, disk), SourceError (a scale or
    code that is no number, a source that was changed), StoppedError (a signal asked to stop).
    """
    started, work = time.monotonic(), work_beside(out, _OWN_NAMES)
    refuse_overlap([plan.checkpoint], out, work)
    check_room(plan.peak_ram_bytes, machine.memory())
    if is_this(plan, out):
        tidy(work, _KIND)
        return DequantizeResult(out, 0.0, machine.peak_rss(), already_done=True)
    with owned(work, _KIND, restart=restart) as folder, stop_signals() as stop:
        check_writable(out.parent)
        _work(plan, work, shown or Shown(), stop)
        (work / _FILES).replace(out)
        sync_folder(out.parent)
        folder.remove()
    return DequantizeResult(out, time.monotonic() - started, machine.peak_rss())


def _work(plan: DequantizePlan, work: Path, shown: Shown, stop: threading.Event) -> None:
    folder, store = work / _FILES, plan.checkpoint.store
    assert store is not None
    folder.mkdir(exist_ok=True)
    begun_as = plan.identity()
    if not as_opened(plan.checkpoint):
        raise _changed(plan)
    journal = Journal(work / _JOURNAL, begun_as, this_command())
    try:
        check_disk(plan.artifact_bytes, folder.iterdir(), folder)
        writer = ShardWriter(folder, plan.shards, plan.places)
        try:
            with Reader(plan.checkpoint.entries, store.path) as reader:
                _write_all(plan, reader, writer, journal, shown, stop)
                changed = reader.changed()
        finally:
            writer.close()
        _write_beside(plan, store, folder)
        if changed is not None or plan.identity().changes(begun_as.parts):
            raise _changed(plan)
    finally:
        journal.close()


def _write_all(
    plan: DequantizePlan, reader: Reader, writer: ShardWriter, journal: Journal, shown: Shown, stop: threading.Event
) -> None:
    """Do what the journal doesn't have, or what the files no longer hold."""
    todo = [task for task in plan.tasks if journal.finished.get(task.key) != _digest(task, journal, writer)]
    shown.advance(plan.read_bytes - sum(task.read_bytes for task in todo))
    matrices = matrices_of(plan.checkpoint, reader)
    done: list[tuple[Task, str]] = []
    lock = threading.Lock()

    def do(task: Task) -> None:
        with writer.watched() as written:
            if task.source is None:
                _fuse(task, matrices, writer)
            else:
                _copy(task, task.source, plan, reader, writer)
        with lock:
            done.append((task, written.digest))

    def settle() -> None:
        with lock:
            finished: Sequence[tuple[Task, str]] = tuple(done)
            done.clear()
        if finished:
            writer.sync()
            journal.record(finished={task.key: digest for task, digest in finished})
            shown.advance(sum(task.read_bytes for task, _ in finished))

    in_threads(todo, do, plan.workers, settle, stop)
    settle()
    check_stop(stop)


def _digest(task: Task, journal: Journal, writer: ShardWriter) -> str:
    """What the files hold of a task that the journal has; no digest of one that it has not."""
    if task.key not in journal.finished:
        return "not done"
    return writer.digest([Extent(task.tensor.name, task.start, task.nbytes)])


def _copy(task: Task, source: str, plan: DequantizePlan, reader: Reader, writer: ShardWriter) -> None:
    """A tensor as it lies, whole rows at a time."""
    entry, tensor = plan.checkpoint.entries[source], task.tensor
    dtype = cast("FloatName", entry.dtype)
    row = entry.nbytes // max(1, int(np.prod(entry.shape[:-1])))
    step = max(1, COPY_BYTES // row // _ROWS) * _ROWS * row
    for start in range(0, entry.nbytes, step):
        values = reader.span(source, start, min(step, entry.nbytes - start)).view(NUMPY_TYPES[dtype])
        place = start * DTYPE_BITS[tensor.dtype] // DTYPE_BITS[dtype]
        writer.write(tensor.name, place, _kept(values, dtype, cast("FloatName", tensor.dtype), source))


def _fuse(task: Task, matrices: MatrixSource, writer: ShardWriter) -> None:
    """One expert's matrices side by side, in x out."""
    dtype = cast("FloatName", task.tensor.dtype)
    whole = np.empty(task.tensor.shape[1:], HELD_AS[dtype])
    column = 0
    for linear in task.linears:
        step = max(1, WEIGHTS // linear.in_features // _ROWS) * _ROWS
        for start in range(0, linear.out_features, step):
            block = matrices.slab([linear], slice(start, min(start + step, linear.out_features))).blocks()[0]
            made = _kept(block.out_in, block.dtype, dtype, linear.module)
            whole[:, column + start : column + start + len(made)] = made.T
        column += linear.out_features
    writer.write(task.tensor.name, task.start, whole)


def _kept(values: NDArray[Any], dtype: FloatName, wanted: FloatName, name: str) -> NDArray[Any]:
    """Numbers in the dtype that they are written in. Raises SourceError for one that is none, or that it can't hold."""
    made = values if dtype == wanted else widen(values) if wanted == "F32" else narrowed(widen(values), wanted)
    if not_finite(np.ascontiguousarray(made), wanted).any():
        raise SourceError(
            f"{name} holds a weight that is NaN, infinite or too large for {wanted}",
            hint="the artifact is damaged: l4pack verify says where",
        )
    return made


def _write_beside(plan: DequantizePlan, store: Store, folder: Path) -> None:
    for name in plan.checkpoint.companions:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, store.path(name).read_bytes())
    for name, data in plan.beside.items():
        write_atomic(folder / name, data)


def _changed(plan: DequantizePlan) -> SourceError:
    return SourceError(
        f"{plan.checkpoint.name} was changed while the job ran",
        hint="begin again with --restart once it stays as it is",
    )
