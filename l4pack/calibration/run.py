"""Solving a model as it is walked through: each layer's real inputs, the solved layer's outputs, nothing kept but those.

Up to two lanes go through every layer: the model as quantized so far, whose inputs the matrices are solved for, and the
original, whose outputs they aim at. A unit is in the journal once its matrices are on disk. A run that goes on repeats the layer it was killed in, reading the finished
matrices back from the shards, so it computes the same numbers and ends in the same bytes: on one machine with as many
threads, torch's products of the same shapes are the same bit by bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.activations import ACT2FN

from l4pack.calibration.coverage import Coverage
from l4pack.calibration.inputs import InputScales, stored_scale
from l4pack.calibration.kv_cache import CacheRange
from l4pack.calibration.mlp import Matrices, result_of, solve_mlp, stored
from l4pack.calibration.output import Output
from l4pack.calibration.rows import UnitRows, blocks, expert_rows
from l4pack.calibration.written import (
    cache_key,
    input_scale,
    input_scales_key,
    layers_of,
    unit_key,
    written_weights,
)
from l4pack.checkpoint.writer import Written
from l4pack.errors import QualityError, SourceError
from l4pack.model.parts import MLP_MATRICES
from l4pack.plan.needs import asymmetric
from l4pack.quant.dtypes import FloatName
from l4pack.quant.quantize import NonFiniteError
from l4pack.quant.torch_ops import DTYPES
from l4pack.stream.compute import reproducible
from l4pack.stream.hidden import Packed
from l4pack.stream.lanes import Lane, Model
from l4pack.stream.layer import LayerPass
from l4pack.stream.modules import Skeleton
from l4pack.stream.sides import Stream
from l4pack.stream.supply import Supply
from l4pack.stream.units import Part, Unit, UnitWeights, module_names
from l4pack.stream.visitor import Progress, Visit, Visitor
from l4pack.stream.walk import Walk
from l4pack.stream.weights import LinearWeight, Weights

if TYPE_CHECKING:
    from l4pack.plan.assign import Target
    from l4pack.plan.plan import Plan


class CalibrationRun(Visitor):
    """Solves and writes the calibrated matrices of a plan; every other matrix of a layer must be in the shards before it."""

    def __init__(
        self,
        plan: Plan,
        output: Output,
        folder: Path,
        stop: threading.Event,
        advance: Callable[[int], None],
        device: str = "cpu",
        supply: Supply | None = None,
    ) -> None:
        """`folder` takes the hidden states; `supply` gets the source's files, which else must all be there."""
        assert plan.text is not None
        assert plan.recipe.calibration is not None
        assert plan.needs is not None
        self._plan, self._output, self._folder = plan, output, folder
        self._progress, self._supply = Progress(advance=advance, stop=stop), supply
        self._options, self._ahead = plan.recipe.calibration, plan.needs.ahead
        self._config = plan.checkpoint.config
        self._targets = {target.module: target for target in plan.calibrated}
        self._inputs = InputScales(plan.observed)
        self._cache: CacheRange | None = None
        self._made = {linear.module: name for linear, name in plan.assigned if name is not None}
        self._packed = Packed(plan.text.sequences)
        self._device, dtype = torch.device(device), torch.float32
        self._skeleton = Skeleton(self._config, self._device, dtype)
        self._weights = Weights(plan.checkpoint, self._device, dtype)
        self._coverage = Coverage.of(self._config, self._options.max_cold_experts)
        for key, found in output.journal.results.items():
            if "tokens" in found:
                self._coverage.add(int(key), found["tokens"])

    def run(self) -> None:
        """Walk to the last layer. Raises StoppedError, QualityError when a gate is missed, SourceError, and BudgetError
        when the disk has no room for the hidden states."""
        model = Model("source", self._weights, self._skeleton)
        names = ["original", "quantized"] if asymmetric(self._plan.recipe, self._plan.calibrated) else ["quantized"]
        lanes = [Lane(name, model, self._packed) for name in names]
        job = self._output.journal.identity
        with (
            reproducible(),
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
        return sum(self._plan.target_bytes(target) for target in self._targets_of(unit).values())

    def experts(self, visit: Visit, used: Iterable[int]) -> Iterable[int]:
        """All of them: one without tokens is solved for borrowed ones."""
        del visit, used
        return range(self._config.text.num_local_experts)

    def visit(self, visit: Visit, unit: Unit, weights: UnitWeights) -> None:
        """Run a unit in both lanes, once it is solved."""
        *original, quantized = passes = list(visit.passes.values())
        targets = self._targets_of(unit)
        if targets and unit_key(unit) not in self._output.journal.finished:
            self._solve(unit, weights, targets, passes)
        for one in original:
            one.run(unit, weights)
        written = self._as_written(unit, weights)
        if unit.part is Part.ATTENTION:
            self._cache = self._cache_range()
            quantized.attention(written, self._cache)
        else:
            module = quantized.mlp(unit, written)
            self._inputs.watch(unit, module, module_names(self._config, unit))
            quantized.feed_forward(unit, module)

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
        self._write_input_scales(layer)
        if self._cache is not None:
            self._write_cache_scales(layer, self._cache)
        return {}

    def _write_input_scales(self, layer: int) -> None:
        found = self._inputs.finish()
        if not found:
            return
        matrices = {}
        with self._output.writer.watched() as written:
            for module, amax in sorted(found.items()):
                tensor = input_scale(self._plan.targets[module])
                self._output.writer.write(tensor.name, 0, stored_scale(amax, cast(FloatName, tensor.dtype)))
                matrices[module] = {"method": "rtn", "input_amax": float(f"{amax:.6g}")}
        self._finished(input_scales_key(layer), written, {"matrices": matrices})

    def _finished(self, key: str, written: Written, result: Mapping[str, Any]) -> None:
        """Note what came of a piece of work, once its bytes are on disk."""
        self._output.writer.sync()
        tensors = written.tensors(self._plan.places)
        self._output.journal.record(finished={key: written.digest}, digests=tensors, results={key: result})

    def _cache_range(self) -> CacheRange | None:
        wanted = self._plan.recipe.kv_cache
        return None if wanted is None else CacheRange(wanted.strategy, self._config.text.num_key_value_heads)

    def _write_cache_scales(self, layer: int, cache: CacheRange) -> None:
        tensors = [tensor for tensor in self._plan.kv_scales if tensor.layer == layer]
        with self._output.writer.watched() as written:
            for tensor, scale in zip(tensors, cache.scales(), strict=True):
                self._output.writer.write(tensor.name, 0, scale)
        self._finished(cache_key(layer), written, {"kv_cache": {str(layer): cache.record()}})

    def _targets_of(self, unit: Unit) -> dict[str, Target]:
        """The unit's matrices to solve, by their names in it."""
        names = module_names(self._config, unit)
        return {local: self._targets[name] for local, name in names.items() if name in self._targets}

    @torch.inference_mode()
    def _solve(self, unit: Unit, weights: UnitWeights, targets: Mapping[str, Target], passes: list[LayerPass]) -> None:
        taken = self._rows_of(unit, passes)
        matrices = Matrices(
            {name: weights.linears[name].weight for name in MLP_MATRICES},
            ACT2FN[self._skeleton.text.hidden_act],
            DTYPES[self._config.dtype or "bfloat16"],
        )
        scheme = self._plan.recipe.schemes[targets[MLP_MATRICES[0]].scheme]
        dtypes = {name: self._plan.checkpoint.float_names[target.linear.tensor] for name, target in targets.items()}
        original = passes[0] if len(passes) > 1 else None
        try:
            inputs = partial(blocks, taken, passes[-1], original)
            solved = solve_mlp(matrices, inputs, scheme, dtypes)
        except NonFiniteError as error:
            raise SourceError(
                f"{unit}: a weight at output {error.row}, input {error.column} is infinite or NaN",
                hint="the checkpoint is damaged: download it again",
            ) from error
        with self._output.writer.watched() as written:
            for name, target in targets.items():
                self._output.executor.write_quantized(target, 0, stored(solved[name], scheme.num_bits))
        found = {targets[name].module: result_of(solved[name], taken.own, taken.borrowed) for name in targets}
        self._finished(unit_key(unit), written, {"matrices": found})
        self._check_fallbacks()

    def _rows_of(self, unit: Unit, passes: list[LayerPass]) -> UnitRows:
        routing, original = passes[-1].routing, passes[0].routing if len(passes) > 1 else None
        if unit.part is not Part.EXPERT or unit.expert is None or routing is None:
            return UnitRows(self._packed.rows)
        return expert_rows(unit.expert, routing, original, self._options.min_tokens)

    def _as_written(self, unit: Unit, weights: UnitWeights) -> UnitWeights:
        """The unit with the matrices that are quantized as a runtime will see them."""
        linears = dict(weights.linears)
        for local, module in module_names(self._config, unit).items():
            if module in self._made:
                linears[local] = LinearWeight(self._read_back(module))
        return UnitWeights(linears, weights.tensors)

    def _read_back(self, module: str) -> torch.Tensor:
        target = self._plan.targets[module]
        values = written_weights(self._output.writer, target, self._plan.recipe.schemes[target.scheme])
        return torch.from_numpy(values).to(DTYPES[self._config.dtype or "bfloat16"]).to(self._device, torch.float32)

    def _check_fallbacks(self) -> None:
        results = [
            found for unit in self._output.journal.results.values() for found in unit.get("matrices", {}).values()
        ]
        rounded = sum(found["method"] == "rtn" for found in results if "reason" in found)
        allowed = self._options.max_fallbacks * len(self._targets)
        if rounded > allowed:
            last = next(found["reason"] for found in reversed(results) if found.get("reason"))
            raise QualityError(
                f"{rounded} of {len(results)} matrices could only be rounded to nearest ({last}); "
                f"the gate is {self._options.max_fallbacks:.1%} of all {len(self._targets)}",
                hint="give more --calibration-samples or a broader --calibration, or raise calibration.max_fallbacks in the recipe",
            )
