"""Calibrating on the workers of a cluster: a layer in five stages, each done everywhere before the next one begins.

    attention   solved, where it is, as one task      route       some blocks of rows
                then some batches of sequences a task
    solve       a unit a task                         feed        the MLP of all rows by blocks, then the experts

Tokens are routed to one expert each, so experts write rows of their own and nothing has to be summed over workers. Rows are
computed in the blocks of one machine, wherever that is, and sums are in its order: the bytes are the same.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from l4pack.calibration.desk import CalibrationDesk, CalibrationJob, Shards, Solved
from l4pack.calibration.output import Output
from l4pack.calibration.run import CalibrationRun, lane_names
from l4pack.calibration.written import unit_key
from l4pack.cluster.cluster import Cluster
from l4pack.cluster.options import Share, worker_device
from l4pack.gradient.moments import GradientMoments
from l4pack.plan.plan import Plan
from l4pack.stream.compute import float32_on
from l4pack.stream.layer import Blocks, LayerPass
from l4pack.stream.spread import Workers, check_spreadable, joined
from l4pack.stream.stages import Stage, StageFiles
from l4pack.stream.units import Unit, layer_units
from l4pack.stream.visitor import Visit
from l4pack.work.progress import Shown


def parts_of(device: str) -> dict[str, Any]:
    """What decides the last bits where this is called, and so must be the same on every node."""
    return float32_on(device).parts()


def share_of(plan: Plan, cluster: Cluster) -> Share:
    """What a task takes of a node."""
    assert plan.needs is not None
    memory = plan.needs.memory
    return Share(cluster.threads, cluster.options.gpus, memory.ram)


@dataclass(frozen=True)
class Opening:
    """A cluster, and with what its workers open the shards that a job writes; `shards` is what `opening` is given."""

    cluster: Cluster
    opening: Callable[[Any], Shards]
    shards: Any


class SpreadCalibration(CalibrationRun):
    """A calibration whose layers others run. It alone says what is finished."""

    elsewhere = True

    def __init__(
        self,
        opening: Opening,
        plan: Plan,
        output: Output,
        folder: Path,
        stop: threading.Event,
        shown: Shown,
        device: str = "cpu",
        moments: GradientMoments | None = None,
    ) -> None:
        """See `CalibrationRun`; the source's path in `plan` must mean the same on every node. Raises UsageError for a
        model that can't be spread."""
        super().__init__(plan, output, folder, stop, shown, device, moments=moments)
        text, cluster = self._skeleton.text, opening.cluster
        check_spreadable(self._config.text, torch.float32.itemsize, cluster)
        self._resident = False  # others read and write the hidden states
        blocks = Blocks.on(self._skeleton.device, text.hidden_size)
        where, lanes = worker_device(device), tuple(lane_names(plan))
        moments = moments and replace(moments, folder=moments.folder.absolute())
        job = CalibrationJob(plan, folder.absolute(), lanes, blocks, where, opening.opening, opening.shards, moments)
        self._workers = Workers(
            cluster, share_of(plan, cluster), f"calibrating {job.hidden} {secrets.token_hex(4)}", CalibrationDesk, job
        )
        self._files = StageFiles(folder, lanes, (self._packed.rows, text.hidden_size, torch.float32))

    def spread(self, visits: Sequence[Visit], settle: Callable[[], None]) -> bool:
        """Run a layer, stage by stage."""
        (visit,) = visits
        passes = list(visit.passes.values())
        attention, everyones, *experts = layer_units(self._config, visit.layer)
        stage = self._files.begin(visit.layer, next(iter(visit.streams.values())).side)
        self._solve_all(stage, [(attention,)], passes[-1])
        self._attend(stage, passes[0])
        if experts:
            stage = self._route(stage, visit)
        step = self.together
        together = [tuple(experts[first : first + step]) for first in range(0, len(experts), step)]
        self._solve_all(stage, [(everyones,), *together], passes[-1])
        settle()
        self._files.outputs(stage)
        blocks = self._workers.some(len(passes[0].row_blocks()))
        self._feed(f"{everyones}", [replace(stage, units=(everyones,), some=some) for some in blocks])
        self._feed("experts", [replace(stage, units=(expert,)) for expert in experts], passes[-1])
        self._files.finish(stage)
        return True

    def _attend(self, stage: Stage, one: LayerPass) -> None:
        self._cache = self._cache_range()
        stages = [replace(stage, some=some) for some in self._workers.some(len(one.batches()))]
        for found in self._run("attention", CalibrationDesk.attend, stages):
            if self._cache is not None and found is not None:
                self._cache.join(found)

    def _route(self, stage: Stage, visit: Visit) -> Stage:
        """The stage with where the router sends every row."""
        one = next(iter(visit.passes.values()))
        stages = [replace(stage, some=some) for some in self._workers.some(len(one.row_blocks()))]
        parts = self._run("routing", CalibrationDesk.route, stages)
        whole = {name: joined([part[name] for part in parts]) for name in visit.passes}
        for name, routing in whole.items():
            visit.passes[name].routing = routing
        self.routed(visit)
        return replace(stage, routing=self._workers.cluster.parcel(whole))

    def _solve_all(self, stage: Stage, groups: Sequence[tuple[Unit, ...]], quantized: LayerPass) -> None:
        """Solve what is left, the experts in the same company as on one machine."""
        finished = self._output.journal.finished
        left = [
            units
            for units in groups
            if any(self._solver.targets(one) and unit_key(one) not in finished for one in units)
        ]
        stages = [replace(stage, units=units) for units in left]
        self._run("solving", CalibrationDesk.solve, stages, quantized, lambda _, found: self._solved(found))

    def _solved(self, found: Sequence[Solved]) -> None:
        self._output.journal.record(
            finished={one.key: one.digest for one in found},
            digests={name: sha256 for one in found for name, sha256 in one.tensors.items()},
            results={one.key: {"matrices": one.results} for one in found},
        )
        self._check_fallbacks()

    def _feed(self, name: str, stages: Sequence[Stage], routed: LayerPass | None = None) -> None:
        for found in self._run(f"running {name}", CalibrationDesk.feed, stages, routed):
            self._inputs.join(found)

    def _run(
        self,
        name: str,
        work: Callable[[CalibrationDesk, Stage], Any],
        stages: Sequence[Stage],
        routed: LayerPass | None = None,
        done: Callable[[Stage, Any], None] = lambda *_: None,
    ) -> list[Any]:
        """Have stages done, those of most rows first; what came of each."""
        return self._workers.run(name, work, stages, self._progress.stop, lambda stage: self._rows(stage, routed), done)

    def _rows(self, stage: Stage, routed: LayerPass | None) -> int:
        """About how many rows a task goes through."""
        if routed is not None and routed.routing is not None and any(unit.expert is not None for unit in stage.units):
            counts = routed.routing.counts()
            return sum(counts[unit.expert] for unit in stage.units if unit.expert is not None)
        return self._packed.rows if stage.some is None else len(stage.some)
