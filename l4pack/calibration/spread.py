"""Calibrating on the workers of a cluster: a layer in five stages, each done everywhere before the next one begins.

    attention   some batches of sequences a task      route       some blocks of rows
    solve       a unit a task                         feed        the MLP of all rows by blocks, then the experts

Tokens are routed to one expert each, so experts write rows of their own and nothing has to be summed over workers. Rows are
computed in the blocks of one machine, wherever that is, and sums are in its order: the bytes are the same.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from l4pack.calibration.desk import CalibrationDesk, CalibrationJob, Shards, Solved, Stage, apart_file
from l4pack.calibration.inputs import InputScales
from l4pack.calibration.kv_cache import CacheRange
from l4pack.calibration.output import Output
from l4pack.calibration.run import CalibrationRun, lane_names
from l4pack.calibration.written import unit_key
from l4pack.cluster.cluster import Cluster, Parcel, Piece, Work
from l4pack.cluster.options import Share, worker_device
from l4pack.errors import UsageError
from l4pack.plan.plan import Plan
from l4pack.stream.compute import float32_on
from l4pack.stream.hidden import Buffer
from l4pack.stream.layer import Blocks, LayerPass, Routing
from l4pack.stream.units import Unit, layer_units
from l4pack.stream.visitor import Visit
from l4pack.work.progress import Shown

TASKS_A_SLOT = 3  # so that whoever is done early takes over from whoever is late


def parts_of(device: str) -> dict[str, Any]:
    """What decides the last bits where this is called, and so must be the same on every node."""
    return float32_on(device).parts()


def share_of(plan: Plan, cluster: Cluster) -> Share:
    """What a task takes of a node."""
    assert plan.needs is not None
    memory = plan.needs.memory
    return Share(cluster.threads, cluster.options.gpus, memory.ram)


@dataclass(frozen=True)
class Workers:
    """A cluster, and with what its workers open the shards that a job writes; `shards` is what `opening` is given."""

    cluster: Cluster
    opening: Callable[[Any], Shards]
    shards: Any


class SpreadCalibration(CalibrationRun):
    """A calibration whose layers others run. It alone says what is finished."""

    def __init__(
        self,
        workers: Workers,
        plan: Plan,
        output: Output,
        folder: Path,
        stop: threading.Event,
        shown: Shown,
        device: str = "cpu",
    ) -> None:
        """See `CalibrationRun`; the source's path in `plan` must mean the same on every node."""
        super().__init__(plan, output, folder, stop, shown, device)
        self._resident = False  # others read and write the hidden states
        self._cluster, self._share = workers.cluster, share_of(plan, workers.cluster)
        blocks = Blocks.on(self._skeleton.device, self._skeleton.text.hidden_size)
        where, lanes = worker_device(device), tuple(lane_names(plan))
        self._job = CalibrationJob(plan, folder.absolute(), lanes, blocks, where, workers.opening, workers.shards)

    def run(self) -> None:
        """See `CalibrationRun`. Raises UsageError too, where several hosts would write into one page of a file."""
        text, cluster = self._config.text, self._cluster
        if self._config.text.moe_layers and text.num_experts_per_tok != 1:
            raise UsageError("--ray calibrates models whose tokens go to one expert each", hint="leave --ray out")
        if text.hidden_size * torch.float32.itemsize % mmap.PAGESIZE and cluster.hosts() > 1:
            raise UsageError(
                f"a row of {text.hidden_size} numbers is no whole number of pages of {mmap.PAGESIZE} bytes, "
                "and two hosts must not write into one page",
                hint="take the nodes of one host, or leave --ray out",
            )
        self._folder.mkdir(exist_ok=True)
        for lane in self._job.lanes:
            rows, width = self._packed.rows, text.hidden_size
            Buffer(self._folder / apart_file(lane), rows, width, torch.float32).close()
        super().run()

    def spread(self, visit: Visit, settle: Callable[[], None]) -> bool:
        """Run a layer, stage by stage."""
        passes = list(visit.passes.values())
        stage = Stage(visit.layer, next(iter(visit.streams.values())).side)
        _, everyones, *experts = layer_units(self._config, visit.layer)
        self._attend(stage, passes[0])
        routing = self._route(stage, visit, passes) if experts else None
        stage = replace(stage, routing=routing)
        self._solve_all(stage, everyones, experts, passes[-1])
        settle()
        self._feed(
            f"{everyones}", [replace(stage, units=(everyones,), some=some) for some in self._some(_blocks(passes[0]))]
        )
        self._feed("experts", [replace(stage, units=(expert,)) for expert in experts], passes[-1])
        return True

    def _attend(self, stage: Stage, one: LayerPass) -> None:
        self._cache = self._cache_range()
        stages = [replace(stage, some=some) for some in self._some(len(one.batches()))]
        self._run("attention", CalibrationDesk.attend, stages, lambda _, found: self._seen(found))

    def _seen(self, found: CacheRange | None) -> None:
        if self._cache is not None and found is not None:
            self._cache.join(found)

    def _route(self, stage: Stage, visit: Visit, passes: Sequence[LayerPass]) -> Parcel:
        found: dict[int, list[Routing]] = {}

        def note(piece: Piece, routing: list[Routing]) -> None:
            found[piece.argument.some.start] = routing

        stages = [replace(stage, some=some) for some in self._some(_blocks(passes[0]))]
        self._run("routing", CalibrationDesk.route, stages, note)
        by_lane = zip(*(found[start] for start in sorted(found)), strict=True)
        whole = [_joined(parts) for parts in by_lane]
        for one, routing in zip(passes, whole, strict=True):
            one.routing = routing
        self.routed(visit)
        return self._cluster.parcel(whole)

    def _solve_all(self, stage: Stage, everyones: Unit, experts: Sequence[Unit], quantized: LayerPass) -> None:
        """Solve what is left, the experts in the same company as on one machine."""
        step, finished = self.together, self._output.journal.finished
        groups = [(everyones,), *(tuple(experts[first : first + step]) for first in range(0, len(experts), step))]
        left = [
            units
            for units in groups
            if any(self._solver.targets(one) and unit_key(one) not in finished for one in units)
        ]
        stages = [replace(stage, units=units) for units in left]
        self._run("solving", CalibrationDesk.solve, stages, lambda _, found: self._solved(found), quantized)

    def _solved(self, found: Sequence[Solved]) -> None:
        self._output.journal.record(
            finished={one.key: one.digest for one in found},
            digests={name: sha256 for one in found for name, sha256 in one.tensors.items()},
            results={one.key: {"matrices": one.results} for one in found},
        )
        self._check_fallbacks()

    def _feed(self, name: str, stages: Sequence[Stage], routed: LayerPass | None = None) -> None:
        def join(_: Piece, found: InputScales) -> None:
            self._inputs.join(found)

        self._run(f"running {name}", CalibrationDesk.feed, stages, join, routed)

    def _run(
        self,
        name: str,
        work: Callable[[CalibrationDesk, Stage], Any],
        stages: Sequence[Stage],
        done: Callable[[Piece, Any], None],
        routed: LayerPass | None = None,
    ) -> None:
        """Have stages done, those of most rows first."""
        job = self._job
        whole = Work(f"calibrating {job.hidden}", CalibrationDesk, job, work, rate="{:,.0f} tokens".format)
        pieces = [Piece(_name(name, stage), stage, self._rows(stage, routed)) for stage in stages]
        self._cluster.run(whole, pieces, self._share, done, self._progress.stop)

    def _rows(self, stage: Stage, routed: LayerPass | None) -> int:
        """About how many rows a task goes through."""
        if routed is not None and routed.routing is not None and any(unit.expert is not None for unit in stage.units):
            counts = routed.routing.counts()
            return sum(counts[unit.expert] for unit in stage.units if unit.expert is not None)
        return self._packed.rows if stage.some is None else len(stage.some)

    def _some(self, count: int) -> Iterator[range]:
        """So many batches or blocks shared out."""
        slots = self._cluster.slots(self._share)
        wanted = min(count, TASKS_A_SLOT * slots)
        edges = [number * count // wanted for number in range(wanted + 1)]
        return itertools.starmap(range, itertools.pairwise(edges))


def _blocks(one: LayerPass) -> int:
    return len(one.row_blocks())


def _joined(parts: Sequence[Routing]) -> Routing:
    names = ("logits", "experts", "scores")
    return Routing(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _name(name: str, stage: Stage) -> str:
    where = ", ".join(map(str, stage.units)) or f"layer {stage.layer}"
    return f"{name}: {where}" + ("" if stage.some is None else f", {stage.some.start} to {stage.some.stop}")
