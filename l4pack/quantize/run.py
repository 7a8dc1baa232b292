"""Running a plan: a journal, a lock, and a folder that appears only when it is complete."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from l4pack.artifact.calibration_record import RECORD_NAME
from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.calibration.output import Output
from l4pack.calibration.text import with_text
from l4pack.checkpoint.agree import check_duplicates
from l4pack.checkpoint.apart import refuse_overlap
from l4pack.checkpoint.companions import folder_files
from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.parts import as_opened, source_part
from l4pack.checkpoint.reader import Reader
from l4pack.checkpoint.sample import sample_digest
from l4pack.checkpoint.source import Store
from l4pack.checkpoint.tied import check_tied_head
from l4pack.checkpoint.writer import ShardWriter
from l4pack.cluster.cluster import Cluster
from l4pack.cluster.sight import NONCE_NAME
from l4pack.containers.safetensors_folder import CONTAINER
from l4pack.errors import SourceError, UsageError
from l4pack.plan.itinerary import Itinerary
from l4pack.plan.memory import check_room
from l4pack.plan.plan import Plan
from l4pack.quant.quantize import quantize_block
from l4pack.quantize.execute import Executor, Quantizer
from l4pack.quantize.fetching import Fetching
from l4pack.quantize.finished import is_finished
from l4pack.quantize.job import Crew, Job
from l4pack.quantize.resume import forget_damaged
from l4pack.quantize.spread import SlicesDesk, Spread, check_nodes, spread_job
from l4pack.quantize.threads import Threads
from l4pack.quantize.walk_back import walk_back
from l4pack.stream.supply import Supply
from l4pack.units import MIB
from l4pack.work import machine
from l4pack.work.command import this_command
from l4pack.work.device import CPU
from l4pack.work.files import check_disk, sync_folder, write_atomic
from l4pack.work.folder import LOCK_NAME, check_writable, mark_name, owned, tidy, work_beside
from l4pack.work.identity import Identity
from l4pack.work.progress import Shown
from l4pack.work.signals import stop_signals

_JOURNAL = "journal.jsonl"
_ARTIFACT = "artifact"
_HIDDEN = "hidden"
_FETCHED = "fetched"
_GRADIENT = "gradient"
_KIND = "quantize"
_OWN_NAMES = {
    _JOURNAL,
    f"{_JOURNAL}.tmp",
    NONCE_NAME,
    f"{NONCE_NAME}.tmp",
    _ARTIFACT,
    _HIDDEN,
    _FETCHED,
    _GRADIENT,
    LOCK_NAME,
    mark_name(_KIND),
}
_COPY_CHUNK = 8 * MIB


@dataclass(frozen=True)
class RunResult:
    """What a run did. `resumed_bytes` of the source were read by an earlier run of the same job."""

    out: Path
    seconds: float
    read_bytes: int
    resumed_bytes: int
    peak_rss_bytes: int
    already_done: bool = False


def run_plan(
    plan: Plan,
    out: Path,
    *,
    restart: bool = False,
    quantize: Quantizer = quantize_block,
    shown: Shown | None = None,
    device: str = "cpu",
    cluster: Cluster | None = None,
) -> RunResult:
    """Write the artifact of `plan` to the folder `out`, which appears when it is complete.

    Work lies in `out` + '.partial' until then; the same call goes on where an earlier one was stopped or killed.
    `shown` is told the source bytes of each finished task and the layers that are done; calibration computes on `device`, with the text that comes
    with the package if the plan has none. With a `cluster`, its workers do it, to the same bytes. Raises UsageError (`out` is taken, or the work begun belongs to another plan),
    BudgetError (memory, disk), SourceError, QualityError (a gate on calibration), StoppedError (a signal asked to stop).
    """
    store = plan.checkpoint.store
    if plan.checkpoint.bare or store is None:
        raise SourceError(
            f"{plan.checkpoint.name} is a configuration without weights", hint="give the checkpoint itself"
        )
    plan = plan if cluster is None else plan.on_cluster()
    started, done = time.monotonic(), RunResult(out, 0.0, 0, plan.read_bytes, machine.peak_rss(), already_done=True)
    work = work_folder(out)
    refuse_overlap([plan.checkpoint], out, work)
    check_room(plan.peak_ram_bytes, machine.memory())
    _check_device(plan, device)
    if plan.needs is not None:
        plan = _ready_to_calibrate(plan, device)
    if is_finished(plan, out):
        tidy(work, _KIND)
        return done
    with owned(work, _KIND, restart=restart, keep={_FETCHED}) as folder, stop_signals() as stop:
        check_writable(out.parent)
        if is_finished(plan, out):  # another run has finished it meanwhile
            folder.remove()
            return done
        resumed = _work(plan, store, work, quantize, shown or Shown(), stop, device, cluster)
        (work / _ARTIFACT).replace(out)
        sync_folder(out.parent)
        folder.remove()
    return RunResult(out, time.monotonic() - started, plan.read_bytes - resumed, resumed, machine.peak_rss())


def work_folder(out: Path) -> Path:
    """The folder beside `out` where work lies until it is complete. Raises UsageError."""
    return work_beside(out, _OWN_NAMES)


def _work(
    plan: Plan,
    store: Store,
    work: Path,
    quantize: Quantizer,
    shown: Shown,
    stop: threading.Event,
    device: str,
    cluster: Cluster | None,
) -> int:
    """Write every file, the manifest last; returns the source bytes that an earlier run was done with."""
    folder = work / _ARTIFACT
    folder.mkdir(exist_ok=True)
    begun_as = plan.identity()
    if not as_opened(plan.checkpoint):
        raise _changed(plan)
    journal = Journal(work / _JOURNAL, begun_as, this_command())
    try:
        _check_begun(plan, folder)
        _check_disk(plan, folder)
        check_duplicates(plan.checkpoint)
        check_tied_head(plan.checkpoint)
        writer = ShardWriter(folder, plan.shards, plan.places)
        try:
            forget_damaged(plan, journal, writer, stop)
            with Reader(plan.checkpoint.entries, store.path) as reader:
                executor = Executor(plan.recipe, plan.checkpoint, reader, writer, quantize)
                crew = _crew(plan, folder, journal, device, cluster) or Threads(executor, writer, plan.workers)
                walked = Itinerary.of(plan.checkpoint).walked() if plan.needs is not None and store.fetches else ()
                job = Job(plan, store, journal, reader, writer, crew, shown.advance, stop, held=walked)
                calibrate = partial(
                    _calibrate, plan, Output(journal, writer, executor), work, shown, stop, device, cluster
                )
                if walked:
                    with Fetching(plan.checkpoint, store, job, reader) as supply:
                        calibrate(supply)
                else:
                    job.run()
                    writer.sync()
                    if plan.needs is not None:
                        calibrate(None)
                journal.record(digests=_digests_left(plan, journal, writer))
                sample = None if store.fetches else sample_digest(plan.checkpoint)
                changed = reader.changed()
        finally:
            writer.close()
        files = _write_beside(plan, store, folder, begun_as)
        if changes := [f"source {changed} has changed"] if changed else plan.identity().changes(begun_as.parts):
            raise _changed(plan, changes[0])
        write_atomic(folder / MANIFEST_NAME, plan.sampled(sample).manifest_json(journal.digests, files))
        return job.resumed_bytes
    finally:
        journal.close()


def _crew(plan: Plan, folder: Path, journal: Journal, device: str, cluster: Cluster | None) -> Crew | None:
    """The cluster's workers, once every node has been seen to see the job."""
    if cluster is None:
        return None
    job = spread_job(plan, folder, journal, device)
    check_nodes(cluster, job)
    return Spread(cluster, job)


def _check_device(plan: Plan, device: str) -> None:
    """Raise BudgetError where the device has less memory free than the plan needs."""
    if device == CPU:
        return
    from l4pack.stream.compute import float32_on  # imports torch

    room = float32_on(device).device_room()
    assert room is not None
    check_room(plan.peak_vram_bytes, room, "device memory")


def _ready_to_calibrate(plan: Plan, device: str) -> Plan:
    """The plan with its tokens, and with what computes it. Raises UsageError, SourceError."""
    from l4pack.stream.compute import float32_on  # imports torch

    assert plan.needs is not None
    # A device's products of several matrices may round otherwise than those of one.
    together = {"experts together": plan.needs.together} if plan.needs.together else {}
    return (plan if plan.text is not None else with_text(plan)).computed_on(float32_on(device).parts() | together)


def _calibrate(
    plan: Plan,
    output: Output,
    work: Path,
    shown: Shown,
    stop: threading.Event,
    device: str,
    cluster: Cluster | None,
    supply: Supply | None,
) -> None:
    """Solve the calibrated matrices and write the record of it; before, walk back through the model if the plan says so."""
    moments = walk_back(plan, output.journal, work / _GRADIENT, stop, shown, device)
    if cluster is None:
        from l4pack.calibration.run import CalibrationRun

        CalibrationRun(plan, output, work / _HIDDEN, stop, shown, device, supply, moments).run()
    else:
        from l4pack.calibration.spread import Opening, SpreadCalibration

        job = spread_job(plan, work / _ARTIFACT, output.journal, device)
        opening = Opening(cluster, SlicesDesk, job)
        SpreadCalibration(opening, job.plan, output, work / _HIDDEN, stop, shown, device, moments).run()
    write_atomic(work / _ARTIFACT / RECORD_NAME, plan.calibration_json(output.journal.results))


def _digests_left(plan: Plan, journal: Journal, writer: ShardWriter) -> dict[str, str]:
    """Digests of the shards that only calibration completed."""
    return {name: sha256 for shard in plan.shards for name, sha256 in writer.digests(shard, journal.digests).items()}


def _check_begun(plan: Plan, folder: Path) -> None:
    """Refuse to publish what somebody put among the shards."""
    found = folder_files(folder, plan.checkpoint.included)
    strange = {name.removesuffix(".tmp") for name in found} - plan.files.keys()
    if strange:
        raise UsageError(
            f"{folder} was changed since the job stopped: {min(strange)} is not the job's",
            hint="remove it, or add --restart to begin again",
        )


def _check_disk(plan: Plan, folder: Path) -> None:
    beside = (folder.parent / name for name in (_HIDDEN, _FETCHED, _GRADIENT))
    files = (*folder.iterdir(), *(path for place in beside for path in place.rglob("*") if path.is_file()))
    check_disk(plan.disk_bytes, files, folder)


def _write_beside(plan: Plan, store: Store, folder: Path, begun_as: Identity) -> dict[str, str]:
    """Write the files beside the weights, config.json last; returns their hex SHA-256, taken of what was read."""
    digests = {}
    for file in plan.checkpoint.companions:
        digest = hashlib.sha256()
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        with store.path(file).open("rb") as stream:
            write_atomic(folder / file, _hashed(stream, digest))
        digests[file] = digest.hexdigest()
        if digests[file] != begun_as.parts[source_part(file)]:
            raise _changed(plan, f"{source_part(file)} has changed")
    if plan.needs is not None:
        digests[RECORD_NAME] = hashlib.sha256((folder / RECORD_NAME).read_bytes()).hexdigest()
    for file, data in ((CONTAINER.index_name, plan.index_json), (CONTAINER.config_name, plan.config_json)):
        if data is not None:
            write_atomic(folder / file, data)
            digests[file] = hashlib.sha256(data).hexdigest()
    return digests


def _hashed(stream: BinaryIO, digest: hashlib._Hash) -> Iterator[bytes]:
    while chunk := stream.read(_COPY_CHUNK):
        digest.update(chunk)
        yield chunk


def _changed(plan: Plan, change: str = "") -> SourceError:
    return SourceError(
        f"{plan.checkpoint.name} was changed while the job ran{change and f': {change}'}",
        hint="begin again with --restart once it stays as it is",
    )
