"""What a worker of a cluster does of a calibrated layer: some sequences, some rows, or some units, from the files up.

Hidden states lie in the job's folder. A task opens them, writes rows that nobody else writes, and has them on disk when it
ends; it reads nothing that is written in the same stage. So it may be done again, or twice at once, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from l4pack.calibration.inputs import InputScales
from l4pack.calibration.kv_cache import CacheRange
from l4pack.calibration.output import MatrixWriter
from l4pack.calibration.solver import SolvedUnit, UnitSolver
from l4pack.calibration.written import unit_key
from l4pack.calibration.written_units import WrittenUnits
from l4pack.checkpoint.writer import ShardWriter
from l4pack.stream.compute import reproducible
from l4pack.stream.hidden import Buffer, Packed, Rows
from l4pack.stream.lanes import Lane, Lanes, Model
from l4pack.stream.layer import ALL, Blocks, LayerPass, Routing
from l4pack.stream.modules import Skeleton
from l4pack.stream.units import LoadedUnit, Part, Unit, load_small, load_unit
from l4pack.stream.weights import Weights

if TYPE_CHECKING:
    from l4pack.cluster.cluster import Parcel
    from l4pack.plan.plan import Plan


class Shards(Protocol):
    """The shards that a job writes, as a worker has them open."""

    @property
    def writer(self) -> ShardWriter: ...

    @property
    def executor(self) -> MatrixWriter: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class CalibrationJob:
    """What a worker opens: the plan, the folder of hidden states, and with `opening` the shards."""

    plan: Plan
    hidden: Path
    lanes: tuple[str, ...]
    blocks: Blocks
    device: str
    opening: Callable[[Any], Shards]
    shards: Any


@dataclass(frozen=True)
class Stage:
    """A task: of a layer whose inputs lie on a `side`, `some` batches or blocks of rows (None: all), or some units.

    `routing` has that of each lane, where it is known.
    """

    layer: int
    side: int
    some: range | None = None
    units: tuple[Unit, ...] = ()
    routing: Parcel | None = None


@dataclass(frozen=True)
class Solved:
    """A unit whose matrices are in the shards: its key in the journal, what that notes, and what is recorded."""

    key: str
    digest: str
    tensors: dict[str, str]
    results: dict[str, dict[str, Any]]


def apart_file(lane: str) -> str:
    """Where the shared expert's outputs of a lane lie."""
    return f"{lane}-apart.hidden"


class CalibrationDesk:
    """A calibrated job as a worker has it open."""

    def __init__(self, job: CalibrationJob) -> None:
        plan = job.plan
        assert plan.text is not None
        self._job, self._plan, self._shards = job, plan, job.opening(job.shards)
        place = torch.device(job.device)
        self._skeleton = Skeleton(plan.checkpoint.config, place, torch.float32)
        self._weights = Weights(plan.checkpoint, place, torch.float32)
        self._packed = Packed(plan.text.sequences)
        model = Model("source", self._weights, self._skeleton)
        self._lanes = [Lane(name, model, self._packed) for name in job.lanes]
        self._solver = UnitSolver(plan, self._skeleton)
        self._written = WrittenUnits(plan, self._shards.writer, self._shards.executor, place)

    def close(self) -> None:
        """Close all files."""
        self._weights.close_files()
        self._shards.close()

    def attend(self, stage: Stage) -> CacheRange | None:
        """Attention of some batches of sequences in every lane; what entered the cache, if that is watched."""
        wanted, text = self._plan.recipe.kv_cache, self._plan.checkpoint.config.text
        cache = None if wanted is None else CacheRange(wanted.strategy, text.num_key_value_heads)
        with self._passes(stage, writes=True) as passes:
            self._written.run(self._load(Unit(stage.layer, Part.ATTENTION)), passes, self._scales(), cache)
        return cache

    def route(self, stage: Stage) -> list[Routing]:
        """Where the router sends the rows of some blocks, in every lane."""
        with self._passes(stage, writes=False) as passes:
            return [routing for one in passes if (routing := one.route()) is not None]

    def solve(self, stage: Stage) -> list[Solved]:
        """Solve units for all their rows, and write them."""
        with self._passes(stage, writes=False) as passes:
            loaded = [self._load(unit) for unit in stage.units]
            solved = [self._put(one) for one in self._solver.solve(loaded, passes)]
        self._shards.writer.sync()
        return solved

    def feed(self, stage: Stage) -> InputScales:
        """Run units as they are and as they were written: an MLP of all rows for some blocks of them, experts for theirs."""
        scales = self._scales()
        with self._passes(stage, writes=True) as passes:
            for unit in stage.units:
                self._written.run(self._load(unit), passes, scales)
        return scales

    def _put(self, solved: SolvedUnit) -> Solved:
        written = self._written.write(solved)
        tensors = written.tensors(self._plan.places)
        return Solved(unit_key(solved.unit), written.digest, tensors, dict(solved.results))

    def _load(self, unit: Unit) -> LoadedUnit:
        return LoadedUnit(unit, load_unit(self._weights, unit))

    def _scales(self) -> InputScales:
        return InputScales(self._plan.observed)

    @contextmanager
    def _passes(self, stage: Stage, *, writes: bool) -> Iterator[Sequence[LayerPass]]:
        """The lanes in a layer; what is written there is on disk once the block is left."""
        lanes = Lanes(self._job.hidden, self._lanes)
        lanes.open(stage.side, kept=True, begun=True)
        apart = {name: self._apart(name) for name in self._job.lanes}
        try:
            with reproducible():
                yield [self._entered(stage, number, lanes, apart) for number in range(len(self._lanes))]
            if writes:
                lanes.flush_all()
                for buffer in apart.values():
                    buffer.flush()
        finally:
            lanes.close()
            for buffer in apart.values():
                buffer.close()

    def _entered(self, stage: Stage, number: int, lanes: Lanes, apart: Mapping[str, Buffer]) -> LayerPass:
        name, some = self._job.lanes[number], ALL if stage.some is None else slice(stage.some.start, stage.some.stop)
        entered = LayerPass(
            self._skeleton, stage.layer, self._packed, lanes.streams[name], self._job.blocks,
            release=True, some=some, apart=Rows(apart[name]),
        )  # fmt: skip
        entered.place(load_small(self._weights, stage.layer))
        if stage.routing is not None:
            entered.routing = stage.routing.open()[number]
        return entered

    def _apart(self, lane: str) -> Buffer:
        width = self._plan.checkpoint.config.text.hidden_size
        return Buffer(self._job.hidden / apart_file(lane), self._packed.rows, width, torch.float32, kept=True)
