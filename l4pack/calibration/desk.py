"""What a worker of a cluster does of a calibrated layer: some sequences, some rows, or some units, from the files up.

Hidden states lie in the job's folder, see `stream.stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from l4pack.gradient.moments import GradientMoments
from l4pack.stream.compute import calibrating
from l4pack.stream.hidden import Packed
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.layer import Blocks, LayerPass, Routing
from l4pack.stream.modules import Skeleton
from l4pack.stream.stages import ATTENDING, FEEDING, LOOKING, Stage, StageDesk
from l4pack.stream.units import LoadedUnit, Part, Unit, load_unit
from l4pack.stream.weights import Weights

if TYPE_CHECKING:
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
    moments: GradientMoments | None = None


@dataclass(frozen=True)
class Solved:
    """A unit whose matrices are in the shards: its key in the journal, what that notes, and what is recorded."""

    key: str
    digest: str
    tensors: dict[str, str]
    results: dict[str, dict[str, Any]]


class CalibrationDesk:
    """A calibrated job as a worker has it open."""

    def __init__(self, job: CalibrationJob) -> None:
        plan = job.plan
        assert plan.text is not None
        self._job, self._plan, self._shards = job, plan, job.opening(job.shards)
        place = torch.device(job.device)
        self._skeleton = Skeleton(plan.checkpoint.config, place, torch.float32)
        self._weights = Weights(plan.checkpoint, place, torch.float32)
        packed = Packed(plan.text.sequences)
        model = Model("source", self._weights, self._skeleton)
        lanes = [Lane(name, model, packed) for name in job.lanes]
        self._files = StageDesk(job.hidden, lanes, job.blocks)
        self._solver = UnitSolver(plan, self._skeleton, job.moments)
        self._written = WrittenUnits(plan, self._shards.writer, self._shards.executor, place)

    def close(self) -> None:
        """Close all files."""
        self._weights.close_files()
        self._shards.close()

    def attend(self, stage: Stage) -> CacheRange | None:
        """Attention of some batches of sequences in every lane; what entered the cache, if that is watched."""
        wanted, text = self._plan.recipe.kv_cache, self._plan.checkpoint.config.text
        cache = None if wanted is None else CacheRange(wanted.strategy, text.num_key_value_heads)
        with self._passes(stage, ATTENDING, writes=True) as passes:
            self._written.run(self._load(Unit(stage.layer, Part.ATTENTION)), passes, self._scales(), cache)
        return cache

    def route(self, stage: Stage) -> dict[str, Routing]:
        """Where the router sends the rows of some blocks, in every lane."""
        with calibrating(), self._files.passes(stage, LOOKING, writes=False) as passes:
            return {name: routing for name, one in passes.items() if (routing := one.route()) is not None}

    def solve(self, stage: Stage) -> list[Solved]:
        """Solve units for all their rows, and write them; attention for what the layer is given."""
        attention = stage.units[0].part is Part.ATTENTION
        with self._passes(stage, ATTENDING if attention else LOOKING, writes=False) as passes:
            loaded = [self._load(unit) for unit in stage.units]
            solved = [self._put(one) for one in self._solver.solve(loaded, passes)]
        self._shards.writer.sync()
        return solved

    def feed(self, stage: Stage) -> InputScales:
        """Run units as they are and as they were written: an MLP of all rows for some blocks of them, experts for theirs."""
        scales = self._scales()
        with self._passes(stage, FEEDING, writes=True) as passes:
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
    def _passes(self, stage: Stage, opens: Sequence[str], *, writes: bool) -> Iterator[Sequence[LayerPass]]:
        with calibrating(), self._files.passes(stage, opens, writes=writes) as passes:
            yield list(passes.values())
