"""Carrying out an export: threads that write and prove, a journal, and a folder that appears when all of it is proved."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from l4pack.checkpoint.apart import refuse_overlap
from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.writer import ShardWriter
from l4pack.errors import SourceError, UsageError
from l4pack.export.artifact import Rows
from l4pack.export.carry import carry
from l4pack.export.plan import ExportPlan
from l4pack.export.prove import Proof, Proving
from l4pack.export.record import RECORD_NAME
from l4pack.export.target import Carried
from l4pack.plan.memory import check_room
from l4pack.work import machine
from l4pack.work.command import this_command
from l4pack.work.files import check_disk, sync_folder, write_atomic
from l4pack.work.folder import LOCK_NAME, check_writable, mark_name, owned, tidy, work_beside
from l4pack.work.progress import Shown
from l4pack.work.signals import check_stop, stop_signals
from l4pack.work.threads import in_threads

_KIND = "export"
_JOURNAL = "journal.jsonl"
_FILES = "files"
_OWN_NAMES = {_JOURNAL, f"{_JOURNAL}.tmp", _FILES, LOCK_NAME, mark_name(_KIND)}
_DONE = ""  # the journal's word for what a piece of work wrote: a run that goes on reads all of it again


@dataclass(frozen=True)
class ExportResult:
    """What a run did. `proof` is None where the folder was there already, made by the same plan."""

    out: Path
    seconds: float
    proof: Proof | None
    peak_rss_bytes: int


@dataclass(frozen=True)
class _Task:
    """One matrix into its tensors."""

    carried: Carried
    number: int

    @property
    def key(self) -> str:
        return f"{self.carried.name} {self.number}"


def run_export(plan: ExportPlan, out: Path, *, restart: bool = False, shown: Shown | None = None) -> ExportResult:
    """Write and prove the export of `plan` in the folder `out`, which appears when it is complete.

    Work lies in `out` + '.partial' until then; the same call goes on where an earlier one was stopped or killed. Raises
    UsageError (`out` is taken, or the work begun belongs to another export), BudgetError (memory, disk), SourceError,
    L4packError (a value read back is not the artifact's), StoppedError (a signal asked to stop).
    """
    started = time.monotonic()
    work = work_beside(out, _OWN_NAMES)
    refuse_overlap([plan.artifact.checkpoint], out, work)
    check_room(plan.peak_ram_bytes, machine.memory())
    if _is_finished(plan, out):
        tidy(work, _KIND)
        return ExportResult(out, 0.0, None, machine.peak_rss())
    with owned(work, _KIND, restart=restart) as folder, stop_signals() as stop:
        check_writable(out.parent)
        proof = _work(plan, work, shown or Shown(), stop)
        (work / _FILES).replace(out)
        sync_folder(out.parent)
        folder.remove()
    return ExportResult(out, time.monotonic() - started, proof, machine.peak_rss())


def _is_finished(plan: ExportPlan, out: Path) -> bool:
    """Whether `out` holds this export, by its record and sizes. Raises UsageError when it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    sizes = {path.name: path.stat().st_size for path in out.iterdir()} if out.is_dir() else {}
    record = out / RECORD_NAME
    same = all(sizes.get(name) == size for name, size in plan.files.items() if "/" not in name)
    if same and record.read_bytes() == plan.record_json:
        return True
    raise UsageError(f"{out} exists and is not this export", hint="choose another --out, or remove it yourself")


def _work(plan: ExportPlan, work: Path, shown: Shown, stop: threading.Event) -> Proof:
    folder = work / _FILES
    folder.mkdir(exist_ok=True)
    begun_as = plan.identity()
    journal = Journal(work / _JOURNAL, begun_as, this_command())
    store = plan.artifact.checkpoint.store
    assert store is not None
    try:
        check_disk(plan.artifact_bytes, folder.iterdir(), folder)
        with Reader(plan.artifact.checkpoint.entries, store.path) as reader:
            rows = Rows(plan.artifact, reader)
            writer = ShardWriter(folder, plan.layout.shards, plan.layout.places)
            try:
                with Proving(plan, folder) as proving:
                    _carry_all(plan, rows, writer, proving, journal, shown, stop)
                    proof = proving.proof
            finally:
                writer.close()
            _write_beside(plan, folder)
            changed = reader.changed()
        if changed is not None or plan.identity().changes(begun_as.parts):
            raise SourceError(
                f"{plan.artifact.checkpoint.name} was changed while the job ran",
                hint="begin again with --restart once it stays as it is",
            )
        write_atomic(folder / RECORD_NAME, plan.record_json)
        return proof
    finally:
        journal.close()


def _carry_all(
    plan: ExportPlan,
    rows: Rows,
    writer: ShardWriter,
    proving: Proving,
    journal: Journal,
    shown: Shown,
    stop: threading.Event,
) -> None:
    """Carry what the journal doesn't have, and prove all of it: nothing that an earlier run left is believed."""
    tasks = [_Task(one, number) for one in plan.carried for number in range(max(1, len(one.sources)))]
    carried_before = set(journal.finished)
    done: list[_Task] = []
    lock = threading.Lock()

    def do(task: _Task) -> None:
        if task.carried.constant is not None:
            writer.write(task.carried.name, 0, task.carried.constant)
            proving.constant(task.carried)
        elif task.key in carried_before:
            proving.matrix(task.carried, task.number, rows.pieces(task.carried.sources[task.number]))
        else:
            proving.matrix(task.carried, task.number, carry(task.carried, task.number, rows, writer))
        with lock:
            done.append(task)

    def settle() -> None:
        with lock:
            finished: Sequence[_Task] = tuple(done)
            done.clear()
        if finished:
            writer.sync()
            journal.record(finished={task.key: _DONE for task in finished if task.key not in carried_before})
            shown.advance(sum(_nbytes(plan, task) for task in finished))

    in_threads(tasks, do, plan.workers, settle, stop)
    settle()
    check_stop(stop)


def _nbytes(plan: ExportPlan, task: _Task) -> int:
    return plan.artifact.nbytes(task.carried.sources[task.number]) if task.carried.sources else 0


def _write_beside(plan: ExportPlan, folder: Path) -> None:
    """The small files: those of the container, and those that come along."""
    store = plan.artifact.checkpoint.store
    assert store is not None
    for name, data in plan.layout.beside.items():
        write_atomic(folder / name, data)
    for name in plan.copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, store.path(name).read_bytes())
