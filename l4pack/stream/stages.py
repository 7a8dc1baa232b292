"""A layer of a walk that other processes run, stage by stage: the files of hidden states that they share.

    LANE-0, LANE-1                          a layer's inputs, and its outputs once all of them are there
    stages/MARK/LANE-middle, -apart, -following     what the stages of one layer write, of one run of the job

A task writes rows that nobody else writes, has them on disk when it ends, and reads nothing that is written in the same
stage: it may be done again, or by two at once, to the same bytes. One that was given up as lost may live on, or its
node may write pages back minutes later, when others are layers ahead. So every layer, of every run, writes files of a name
of its own: who comes late finds none, or has open what is a file of nobody any more, and what was read from there has
stayed as it was. A layer's outputs take the place of older ones by being renamed.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l4pack.stream.hidden import Buffer, Elsewhere, Rows
from l4pack.stream.lanes import Lane, shape_of
from l4pack.stream.layer import ALL, Blocks, LayerPass
from l4pack.stream.sides import Stream, side_file
from l4pack.stream.units import Unit, load_small
from l4pack.work.files import sync_folder

if TYPE_CHECKING:
    import torch

    from l4pack.cluster.cluster import Parcel

FOLDER = "stages"
CURRENT, MIDDLE, APART, FOLLOWING = "current", "middle", "apart", "following"
ATTENDING, LOOKING, FEEDING = (CURRENT, MIDDLE), (MIDDLE,), (MIDDLE, APART, FOLLOWING)


@dataclass(frozen=True)
class Stage:
    """A task: of a layer whose inputs lie on a `side`, and whose files are in the folder `mark`; `some` batches or blocks of
    rows (None: all), or some units. `routing` has that of each lane by its name, where it is known."""

    layer: int
    side: int
    mark: str
    some: range | None = None
    units: tuple[Unit, ...] = ()
    routing: Parcel | None = None


class StageFiles:
    """The files that the stages of one run write, as whoever gives out the tasks makes and removes them."""

    def __init__(self, folder: Path, lanes: Sequence[str], shape: tuple[int, int, torch.dtype]) -> None:
        """`shape` is a lane's rows, width and dtype."""
        self._folder, self._lanes, self._shape, self._run = folder, tuple(lanes), shape, secrets.token_hex(4)

    def begin(self, layer: int, side: int) -> Stage:
        """Make what attention writes; the stage that all others of the layer are made of. Raises BudgetError."""
        stage = Stage(layer, side, f"{layer}-{self._run}")
        self._place(stage).mkdir(parents=True)
        self._make(stage, MIDDLE)
        return stage

    def outputs(self, stage: Stage) -> None:
        """Make what MLPs write, in place of the last layer's inputs, which must not be needed any more. Raises
        BudgetError."""
        for lane in self._lanes:
            (self._folder / side_file(lane, 1 - stage.side)).unlink(missing_ok=True)
        self._make(stage, APART)
        self._make(stage, FOLLOWING)

    def finish(self, stage: Stage) -> None:
        """Take the outputs, which are complete, as those of the layer; nothing else of it is left."""
        place = self._place(stage)
        for lane in self._lanes:
            (place / side_file(lane, FOLLOWING)).replace(self._folder / side_file(lane, 1 - stage.side))
        sync_folder(self._folder)
        shutil.rmtree(place)

    def _place(self, stage: Stage) -> Path:
        return self._folder / FOLDER / stage.mark

    def _make(self, stage: Stage, end: str) -> None:
        for lane in self._lanes:
            Buffer(self._place(stage) / side_file(lane, end), *self._shape).close()


def forget_stages(folder: Path) -> None:
    """Remove what the stages of a run before this one have left."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


class StageDesk:
    """The lanes of a walk as a worker has them: it opens their files for a task, and closes them after it."""

    def __init__(self, folder: Path, lanes: Sequence[Lane], blocks: Blocks) -> None:
        self._folder, self.lanes, self._blocks = folder, tuple(lanes), blocks

    @contextmanager
    def passes(self, stage: Stage, opens: Sequence[str], *, writes: bool) -> Iterator[dict[str, LayerPass]]:
        """The lanes in a layer by name, with those of their files open; what is written there is on disk once the block
        is left."""
        with ExitStack() as stack:
            files = {lane.name: self._open(stage, lane, opens, stack) for lane in self.lanes}
            yield {lane.name: self._entered(stage, lane, files[lane.name]) for lane in self.lanes}
            for buffers in files.values() if writes else ():
                for buffer in buffers.values():
                    buffer.flush()

    @contextmanager
    def rows(self, stage: Stage, end: str) -> Iterator[dict[str, Rows]]:
        """One file of each lane."""
        with ExitStack() as stack:
            yield {lane.name: Rows(self._open(stage, lane, (end,), stack)[end]) for lane in self.lanes}

    def _open(self, stage: Stage, lane: Lane, opens: Sequence[str], stack: ExitStack) -> dict[str, Buffer]:
        found = {}
        for end in opens:
            found[end] = Buffer(self._path(stage, lane, end), *shape_of(lane), kept=True)
            stack.callback(found[end].close)
        return found

    def _path(self, stage: Stage, lane: Lane, end: str) -> Path:
        if end == CURRENT:
            return self._folder / side_file(lane.name, stage.side)
        return self._folder / FOLDER / stage.mark / side_file(lane.name, end)

    def _entered(self, stage: Stage, lane: Lane, buffers: Mapping[str, Buffer]) -> LayerPass:
        def rows(end: str) -> Rows:
            return Rows(buffers[end]) if end in buffers else Elsewhere()

        stream = Stream(lane.name, (rows(CURRENT), rows(FOLLOWING)), rows(MIDDLE), 0)
        some = ALL if stage.some is None else slice(stage.some.start, stage.some.stop)
        entered = LayerPass(
            lane.model.skeleton, stage.layer, lane.packed, stream, self._blocks,
            release=True, some=some, apart=rows(APART),
        )  # fmt: skip
        entered.place(load_small(lane.model.weights, stage.layer))
        if stage.routing is not None:
            entered.routing = stage.routing.open()[lane.name]
        return entered
