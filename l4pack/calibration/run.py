"""Solving a model as it is walked through: each layer's real inputs, the solved layer's outputs, nothing kept but those.

Up to two lanes go through every layer: the model as quantized so far, whose inputs the matrices are solved for, and the
original, whose outputs they aim at. A unit is in the journal once its matrices are on disk. A run that goes on repeats the
layer it was killed in, and those before it whose hidden states only a device had; it reads the finished matrices back from
the shards, so it computes the same numbers and ends in the same bytes: on one machine with as many threads, torch's products
of the same shapes are the same bit by bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l4pack.calibration.coverage import Coverage
from l4pack.calibration.inputs import InputScales, stored_scale
from l4pack.calibration.kv_cache import CacheRange
from l4pack.calibration.output import Output
from l4pack.calibration.solver import SolvedUnit, UnitSolver
from l4pack.calibration.written import (
    cache_key,
    input_scales_key,
    layers_of,
    unit_key,
)
from l4pack.calibration.written_units import WrittenUnits
from l4pack.checkpoint.writer import Written
from l4pack.errors import QualityError
from l4pack.plan.assign import is_calibrated
from l4pack.plan.needs import asymmetric
from l4pack.stream.compute import calibrating
from l4pack.stream.hidden import Packed
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.layer import LayerPass
from l4pack.stream.modules import Skeleton
from l4pack.stream.sides import Stream
from l4pack.stream.supply import Supply
from l4pack.stream.transfer import beside
from l4pack.stream.units import LoadedUnit, Part, Unit
from l4pack.stream.visitor import Progress, Visit, Visitor
from l4pack.stream.walk import Walk
from l4pack.stream.weights import Weights
from l4pack.work.progress import Shown

if TYPE_CHECKING:
    from l4pack.gradient.moments import GradientMoments
    from l4pack.plan.plan import Plan


def lane_names(plan: Plan) -> list[str]:
    """What walks: the model as quantized so far, and before it the original where its outputs are aimed at."""
    return ["original", "quantized"] if asymmetric(plan.recipe, plan.calibrated) else ["quantized"]


class CalibrationRun(Visitor):
    """Solves and writes the calibrated matrices of a plan; every other matrix of a layer must be in the shards before it."""

    def __init__(
        self,
        plan: Plan,
        output: Output,
        folder: Path,
        stop: threading.Event,
        shown: Shown,
        device: str = "cpu",
        supply: Supply | None = None,
        moments: GradientMoments | None = None,
    ) -> None:
        """`folder` takes the hidden states; `supply` gets the source's files, which else must all be there. `moments` are
        those of two-sided schemes."""
        assert plan.text is not None
        assert plan.recipe.calibration is not None
        assert plan.needs is not None
        self._plan, self._output, self._folder = plan, output, folder
        self._progress, self._supply = Progress.of(shown, stop), supply
        self._options, self._ahead = plan.recipe.calibration, plan.needs.ahead
        self._resident, self.together = plan.needs.resident, max(1, plan.needs.together)
        self._config = plan.checkpoint.config
        self._inputs = InputScales(plan.observed)
        self._cache: CacheRange | None = None
        self._packed = Packed(plan.text.sequences)
        place, dtype = torch.device(device), torch.float32
        self._skeleton = Skeleton(self._config, place, dtype)
        self._weights = Weights(plan.checkpoint, place, dtype)
        self._solver = UnitSolver(plan, self._skeleton, moments)
        self._written = WrittenUnits(plan, output.writer, output.executor, place)
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="solved")
        self._saving: Future[None] | None = None
        self._coverage = Coverage.of(self._config, self._options.max_cold_experts)
        for key, found in output.journal.results.items():
            if "tokens" in found:
                self._coverage.add(int(key), found["tokens"])

    def run(self) -> None:
        """Walk to the last layer. Raises StoppedError, QualityError when a gate is missed, SourceError, and BudgetError
        when the disk has no room for the hidden states."""
        model = Model("source", self._weights, self._skeleton)
        lanes = [Lane(name, model, self._packed) for name in lane_names(self._plan)]
        job = self._output.journal.identity
        with (
            calibrating(),
            self._saver,
            self._weights,
            Walk(
                lanes,
                self._folder,
                job,
                self,
                progress=self._progress,
                release=True,
                supply=self._supply,
                ahead=self._ahead,
                resident=self._resident,
            ) as walk,
        ):
            walk.run()

    def resume(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all that the layers before wrote is in the journal, whose end may have been lost."""
        journal, done = self._output.journal, len(records)
        written = [key for key, layer in layers_of(self._plan).items() if layer < done]
        seen = [str(layer) for layer in self._config.text.moe_layers if layer < done]
        return journal.finished.keys() >= set(written) and journal.results.keys() >= set(seen)

    def size(self, model: Model, unit: Unit) -> int:
        """Source bytes of the matrices that are solved."""
        del model
        return sum(self._plan.target_bytes(target) for target in self._solver.targets(unit).values())

    def experts(self, visit: Visit, used: Iterable[int]) -> Iterable[int]:
        """All of them: one without tokens is solved for borrowed ones."""
        del visit, used
        return range(self._config.text.num_local_experts)

    def visit_together(self, visit: Visit, loaded: Sequence[LoadedUnit]) -> None:
        """Run units in both lanes, once they are solved."""
        passes = list(visit.passes.values())
        finished, solved = self._output.journal.finished, {}
        if any(self._solver.targets(one.unit) and unit_key(one.unit) not in finished for one in loaded):
            solved = self._solve(loaded, passes)
        for one in loaded:
            if one.unit.part is Part.ATTENTION:
                self._cache = self._cache_range()
            self._written.run(one, passes, self._inputs, self._cache, solved.get(one.unit))

    def routed(self, visit: Visit) -> None:
        """Record how many tokens each expert sees. Raises QualityError."""
        routing = next(iter(visit.passes.values())).routing
        assert routing is not None
        tokens = routing.counts()
        self._coverage.add(visit.layer, tokens)
        if self._plan.calibrated or self._plan.observed:  # what enters the KV cache, no expert decides
            self._coverage.check()
        self._output.journal.record(results={str(visit.layer): {"tokens": tokens}})

    def leave(self, layer: int, streams: Mapping[str, Stream]) -> dict[str, Any]:
        """Write the scales that are known now."""
        del streams
        self._settle()
        self._write_input_scales(layer)
        if self._cache is not None:
            self._write_cache_scales(layer, self._cache)
        return {}

    def _write_input_scales(self, layer: int) -> None:
        found = self._inputs.finish()
        if not found:
            return
        matrices: dict[str, dict[str, Any]] = {}
        with self._output.writer.watched() as written:
            for module, amax in sorted(found.items()):
                target = self._plan.targets[module]
                self._output.writer.write(target.input_scale.name, 0, stored_scale(amax, target))
                rounded = {} if is_calibrated(self._plan.recipe, target) else {"method": "rtn"}
                matrices[module] = {**rounded, "input_amax": float(f"{amax:.6g}")}
        key = input_scales_key(layer)
        self._finished({key: written}, {key: {"matrices": matrices}})

    def _finished(self, written: Mapping[str, Written], results: Mapping[str, Any]) -> None:
        """Note what came of pieces of work by their keys, of all or of none, once their bytes are on disk."""
        self._output.writer.sync()
        digests = {name: sha256 for one in written.values() for name, sha256 in one.tensors(self._plan.places).items()}
        finished = {key: one.digest for key, one in written.items()}
        self._output.journal.record(finished=finished, digests=digests, results=results)

    def _cache_range(self) -> CacheRange | None:
        wanted = self._plan.recipe.kv_cache
        return None if wanted is None else CacheRange(wanted.strategy, self._config.text.num_key_value_heads)

    def _write_cache_scales(self, layer: int, cache: CacheRange) -> None:
        tensors = [tensor for tensor in self._plan.kv_scales if tensor.layer == layer]
        with self._output.writer.watched() as written:
            for tensor, scale in zip(tensors, cache.scales(), strict=True):
                self._output.writer.write(tensor.name, 0, scale)
        key = cache_key(layer)
        self._finished({key: written}, {key: {"kv_cache": {str(layer): cache.record()}}})

    def _solve(self, loaded: Sequence[LoadedUnit], passes: Sequence[LayerPass]) -> dict[Unit, SolvedUnit]:
        """Solve units that come together; those that need not be read back to be run."""
        solved = self._solver.solve(loaded, passes)
        self._settle()
        self._saving = self._saver.submit(self._save, solved)
        if all(one.on_device for one in solved):
            return {one.unit: one for one in solved}
        self._settle()
        return {}

    def _save(self, solved: Sequence[SolvedUnit]) -> None:
        with beside(self._skeleton.device, after=True):
            written = {unit_key(one.unit): self._written.write(one) for one in solved}
        self._finished(written, {unit_key(one.unit): {"matrices": one.results} for one in solved})
        self._check_fallbacks()

    def _settle(self) -> None:
        """Wait until what was solved is on disk and in the journal."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def _check_fallbacks(self) -> None:
        results = [
            found for unit in self._output.journal.results.values() for found in unit.get("matrices", {}).values()
        ]
        rounded = sum(found["method"] == "rtn" for found in results if "reason" in found)
        allowed = self._options.max_fallbacks * len(self._plan.calibrated)
        if rounded > allowed:
            last = next(found["reason"] for found in reversed(results) if found.get("reason"))
            raise QualityError(
                f"{rounded} of {len(results)} matrices could only be rounded to nearest ({last}); "
                f"the gate is {self._options.max_fallbacks:.1%} of all {len(self._plan.calibrated)}",
                hint="give more --calibration-samples or a broader --calibration, or raise calibration.max_fallbacks in the recipe",
            )
