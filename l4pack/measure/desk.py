"""What a worker of a cluster does of a measurement: one wave of altered streams, through all layers, in a folder of its own."""

from __future__ import annotations

import secrets
import shutil
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from l4pack.evaluate.statistics import clusters
from l4pack.gradient.keep import LayerGradients
from l4pack.measure.changes import Change, Single
from l4pack.measure.prepare import Direct, PreparedMeasurement
from l4pack.measure.terms import Slopes, row_clusters
from l4pack.measure.wave import Shared, Wave, WaveFound
from l4pack.recipe import Calibration
from l4pack.stream.compute import calibrating
from l4pack.stream.hidden import Packed
from l4pack.stream.kept import STATE_NAME
from l4pack.stream.lanes import Model
from l4pack.stream.modules import Skeleton
from l4pack.stream.visitor import Progress
from l4pack.stream.weights import Weights
from l4pack.work.files import write_atomic

STOP_NAME, DONE_NAME = "stop", "done"


@dataclass(frozen=True)
class WaveTask:
    """Streams that walk together, and changes whose error alone is found on the way; the name of the folder they have."""

    name: str
    changes: tuple[Change, ...]
    errors_only: tuple[Single, ...]


@dataclass(frozen=True)
class MeasuringJob:
    """What a worker opens: the measurement, and the folder where waves lie."""

    prepared: PreparedMeasurement
    folder: Path


class MeasuringDesk:
    """A measurement as a worker has it open."""

    def __init__(self, job: MeasuringJob) -> None:
        self._job = job

    def close(self) -> None:
        """A wave has closed its files."""

    def run(self, task: WaveTask) -> WaveFound:
        """See `Wave.run`. Goes on where somebody before has left the wave."""
        folder, job = _own_folder(self._job.folder / task.name), self._job
        progress = _Told(job.folder / STOP_NAME, folder / DONE_NAME).progress
        with ExitStack() as stack:
            stack.enter_context(calibrating())
            return Wave(shared(job.prepared, folder, stack, progress), task.changes, task.errors_only).run()


def shared(prepared: PreparedMeasurement, work: Path, stack: ExitStack, progress: Progress) -> Shared:
    """What waves share that walk in a folder."""
    checkpoint, compute, texts = prepared.checkpoint, prepared.compute, prepared.texts
    weights = stack.enter_context(Weights(checkpoint, compute.device, compute.dtype))
    measured = Packed(texts.measured.sequences)
    return Shared(
        model=Model("original", weights, Skeleton(checkpoint.config, compute.device, compute.dtype)),
        measured=measured,
        calibration=None if texts.calibration is None else Packed(texts.calibration.sequences),
        options=prepared.options,
        blocks=prepared.blocks,
        work=work,
        job=prepared.job(),
        progress=progress,
        ahead=prepared.ahead,
        min_tokens=Calibration().min_tokens,
        slopes=_slopes(prepared, measured) if prepared.direct is Direct.FEW else None,
    )


def _slopes(prepared: PreparedMeasurement, measured: Packed) -> Slopes:
    gradients = LayerGradients(prepared.settings.gradients, prepared.checkpoint.config, measured.rows)
    return Slopes(gradients, row_clusters(measured.scored_rows(), clusters(measured.scored_lengths()), measured.rows))


class _Stop(threading.Event):
    """Set once a file is there, which whoever gives out the tasks puts there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def is_set(self) -> bool:
        return super().is_set() or self._path.exists()


class _Told:
    """Progress in a file: bytes of weights that are done with, after every layer."""

    def __init__(self, stop: Path, done: Path) -> None:
        self._done, self._path = 0, done
        self.progress = Progress(advance=self._advance, step=self._step, stop=_Stop(stop))

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes

    def _step(self, _: str) -> None:
        write_atomic(self._path, str(self._done).encode())


def _own_folder(wave: Path) -> Path:
    """A new folder with what somebody before has finished of the wave.

    One that was given up as lost may live on and write where it did: so its files are copied, and removed. What they were
    sealed as, the walk holds them against.
    """
    own = wave / secrets.token_hex(4)
    own.mkdir(parents=True)
    for before in sorted(path for path in wave.iterdir() if path.is_dir() and path != own):
        with suppress(FileNotFoundError):  # whoever it was is at it still
            _take_over(before, own)
        shutil.rmtree(before, ignore_errors=True)
    return own


def _take_over(before: Path, own: Path) -> None:
    if not (before / STATE_NAME).exists():
        return
    for path in sorted(before.glob("*.hidden")):
        if not path.name.endswith("-middle.hidden"):
            shutil.copyfile(path, own / path.name)
            path.unlink()
    shutil.copyfile(before / STATE_NAME, own / STATE_NAME)
