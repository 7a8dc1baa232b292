"""The one walk through models' layers: layer order, prefetch, hidden states, progress, going on after a stop or a kill.

After each layer (after every third, where hidden states stay on a device) the outputs are put on disk and then a state (see
`kept`) says which layer is done and what its outputs are; what an earlier state vouches for is overwritten only after that. A
thread puts and seals them while the next layer's attention is computed. What runs with which weights, and what is recorded, a
visitor says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from l4pack.stream.kept import WalkState
from l4pack.stream.lanes import Lane, Lanes
from l4pack.stream.layer import Blocks, LayerPass
from l4pack.stream.prefetch import Prefetch
from l4pack.stream.rows import LAYERS_KEPT
from l4pack.stream.sides import Stream
from l4pack.stream.stages import forget_stages
from l4pack.stream.supply import Supply
from l4pack.stream.transfer import beside, hand_over
from l4pack.stream.units import LoadedUnit, Unit, expert_unit, layer_units, load_unit
from l4pack.stream.visitor import Progress, Visit, Visitor
from l4pack.work.identity import Identity
from l4pack.work.signals import check_stop

_Together = tuple[Unit, ...]
_Ready = Prefetch[tuple[int, _Together], list[LoadedUnit]]


class Walk:
    """Takes lanes through all layers, those of one model together, model by model; a context manager."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        work: Path,
        job: Identity,
        visitor: Visitor | None = None,
        *,
        blocks: Blocks | None = None,
        progress: Progress | None = None,
        release: bool = False,
        supply: Supply | None = None,
        first: int = 0,
        keep: int | None = None,
        ahead: bool = True,
        resident: bool = False,
    ) -> None:
        """`work` is a folder that this process holds; one begun for another `job` is refused with UsageError.

        With `release`, pages of hidden states are let go as soon as they are used, so that they don't count as the
        process's. `supply` gets the models' files, which else must all be there. The walk begins with the step `first`
        if an earlier one in this folder has copied its inputs, and copies those of the step `keep`. Without `ahead`,
        a unit is loaded when the one before it is done with, which takes less memory. `resident` hidden states stay on the
        device. Raises BudgetError when the disk
        has no room for the hidden states.
        """
        self.models = list({id(lane.model): lane.model for lane in lanes}.values())
        skeleton = self.models[0].skeleton
        self.order = range(skeleton.config.text.num_hidden_layers)
        self._visitor, self._progress, self._supply = visitor or Visitor(), progress or Progress(), supply
        self._blocks = blocks or Blocks.on(skeleton.device, skeleton.text.hidden_size)
        self._release, self._keep, self._ahead = release, keep, ahead
        self._kept_every = LAYERS_KEPT if resident else 1
        work.mkdir(parents=True, exist_ok=True)
        forget_stages(work)
        self._lanes = Lanes(work, lanes, resident=resident, elsewhere=self._visitor.elsewhere)
        self._state = WalkState(work, job)
        self.records, self.resumed_layers = self._resumed()
        self._begun = self.resumed_layers or self._kept(first)
        if not self.resumed_layers:
            self._state.begin([lane.name for lane in lanes], self._begun)
        self._lanes.open(self._begun % 2, kept=self.resumed_layers > 0)
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._saver.shutdown(wait=True)
        self._lanes.close()

    @property
    def streams(self) -> dict[str, Stream]:
        """Hidden states by lane."""
        return self._lanes.streams

    def run(self) -> None:
        """Walk to the last layer; each stream's `current` then holds its outputs. Raises StoppedError when asked to."""
        self._begin()
        with Prefetch(self._load, ahead=self._ahead) as ready:
            for step in range(self._begun, len(self.order)):
                with self._supplied(step + 1):
                    self._layer(step, ready)
        self._settle()

    def _resumed(self) -> tuple[list[dict[str, Any]], int]:
        """What is recorded of the steps that need not be done again, and their number."""
        names = [lane.name for lane in self._lanes.lanes]
        done, records = self._state.done(names, len(self.order), self._lanes.spans), self._state.records
        return (records, done) if done and self._visitor.resume(records) else ([], 0)

    def _kept(self, first: int) -> int:
        """The step to begin with: `first` if its inputs are copied."""
        return first if first and self._state.keeps(first, self._lanes.copies(first)) else 0

    def _begin(self) -> None:
        """Put the first step's inputs in place."""
        if not self._begun:
            with self._supplied(0):
                self._lanes.embed()
        elif not self.resumed_layers:
            self._lanes.restore(self._begun)
        elif self._begun == self._keep and self._state.kept != self._keep:  # it was killed between the two
            self._copy_inputs(self._begun)
        for number in range(len(self.models)):
            for layer in self.order[: self._begun]:
                self._count(number, layer_units(self.models[number].skeleton.config, layer))

    @contextmanager
    def _supplied(self, step: int) -> Iterator[None]:
        """A step with its files there; 0 is embedding, layers come after it."""
        if self._supply is None:
            yield
            return
        self._supply.arrive(step)
        yield
        for model in self.models:
            model.weights.close_files()
        self._supply.leave(step)

    def _load(self, key: tuple[int, _Together]) -> list[LoadedUnit]:
        number, units = key
        weights = self.models[number].weights
        with beside(weights.device):
            loaded = [LoadedUnit(unit, load_unit(weights, unit)) for unit in units]
        for one in loaded:
            hand_over(one.weights.on_device())
        return loaded

    def _layer(self, step: int, ready: _Ready) -> None:
        started, layer = time.monotonic(), self.order[step]
        used: set[int] = set()
        visits = [self._entered(number, step) for number in range(len(self.models))]
        if self._visitor.spread(visits, self._settle):
            for number in range(len(self.models)):
                self._count(number, layer_units(self.models[number].skeleton.config, layer))
        else:
            for visit in visits:
                self._visit(visit, used, ready)
        rows = sum(lane.packed.rows for lane in self._lanes.lanes if lane.walks(step))
        rate = rows / max(time.monotonic() - started, 1e-9)
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        self._progress.step(f"layer {layer + 1} of {len(self.order)} done, {speed} tokens/s")
        self._save(step, self._visitor.leave(layer, self.streams))

    def _entered(self, number: int, step: int) -> Visit:
        """One model's lanes before a layer."""
        model, layer = self.models[number], self.order[step]
        lanes = {lane.name: lane for lane in self._lanes.lanes if lane.model is model}

        def enter(name: str) -> LayerPass:
            stream, packed = self.streams[name], lanes[name].packed
            return LayerPass(model.skeleton, layer, packed, stream, self._blocks, release=self._release)

        passes = {name: enter(name) for name, lane in lanes.items() if lane.walks(step)}
        return Visit(layer, number, passes, self.streams, enter)

    def _visit(self, visit: Visit, used: set[int], ready: _Ready) -> None:
        units = layer_units(self.models[visit.model].skeleton.config, visit.layer)
        attention, everyones, *experts = units
        ready.plan((visit.model, (unit,)) for unit in (attention, everyones))
        self._run(visit, (attention,), ready)
        if experts:
            experts = self._routed(visit, used)
        together = self._together(experts)
        ready.plan((visit.model, some) for some in together)
        self._settle()  # from here on the side is written that a killed run would go on from
        for some in ((everyones,), *together):
            self._run(visit, some, ready)
        read = {attention, everyones, *experts}
        self._count(visit.model, [unit for unit in units if unit not in read])
        for one in visit.passes.values():
            one.finish()

    def _routed(self, visit: Visit, used: set[int]) -> list[Unit]:
        """The experts that run, once all routers are asked; those with tokens join the `used` ones of this layer."""
        for one in visit.passes.values():
            routing = one.route()
            assert routing is not None
            used |= {expert for expert, count in enumerate(routing.counts()) if count}
        self._visitor.routed(visit)
        return [expert_unit(visit.layer, expert) for expert in self._visitor.experts(visit, used)]

    def _together(self, experts: Sequence[Unit]) -> list[_Together]:
        """Experts as they are visited."""
        step = self._visitor.together
        return [tuple(experts[first : first + step]) for first in range(0, len(experts), step)]

    def _run(self, visit: Visit, together: _Together, ready: _Ready) -> None:
        check_stop(self._progress.stop)
        self._progress.label(self._what(visit, together))
        self._visitor.visit_together(visit, ready.take((visit.model, together)))
        self._count(visit.model, together)

    def _what(self, visit: Visit, together: _Together) -> str:
        """`layer 12 of 48, original, experts 5 to 8 of 16`."""
        first, last = together[0], together[-1]
        part = first.part.value.replace("_", " ")
        if first.expert is not None and last.expert is not None:
            several = f"s {first.expert + 1} to" if last is not first else ""
            part = f"expert{several} {last.expert + 1} of {self.models[0].skeleton.config.text.num_local_experts}"
        count = f", {len(visit.passes)} streams" if len(visit.passes) > 1 else ""
        model = f", {self.models[visit.model].name}" if len(self.models) > 1 else ""
        return f"layer {visit.layer + 1} of {len(self.order)}{model}, {part}{count}"

    def _count(self, number: int, units: Sequence[Unit]) -> None:
        """Tell progress of units that have run, or need not: experts without tokens, layers done before."""
        self._progress.advance(sum(self._visitor.size(self.models[number], unit) for unit in units))

    def _save(self, step: int, record: dict[str, Any]) -> None:
        self.records.append(record)
        done, records = step + 1, list(self.records)

        def save() -> None:
            self._lanes.flush(done % 2, release=self._release)
            # What is copied is forgotten before it is overwritten: a run killed between has this walk's own outputs.
            self._state.finish(records, self._lanes.spans(done), forget=done == self._keep)
            if done == self._keep:
                self._copy_inputs(done)

        self._settle()
        if done % self._kept_every == 0:
            self._saving = self._saver.submit(save)
        self._lanes.advance()

    def _copy_inputs(self, step: int) -> None:
        self._lanes.copy(step)
        self._state.keep(step, self._lanes.copies(step))

    def _settle(self) -> None:
        """Wait until the last complete layer is on disk."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None
