"""The walk through a model that solves it: each layer's real inputs, the solved layer's outputs, nothing kept but those.

Up to two streams of hidden states go through every layer: the model as quantized so far, whose inputs the matrices are
solved for, and the original, whose outputs they aim at. What is finished is in the journal: a layer once its outputs
are on disk, a unit once its matrices are. A run that goes on repeats the layer it was killed in, reading the finished
matrices back from the shards, so it computes the same numbers and ends in the same bytes: on one machine with as many
threads, torch's products of the same shapes are the same bit by bit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.activations import ACT2FN

from l4pack.artifact.quantized import dequantized
from l4pack.calibration.coverage import Coverage
from l4pack.calibration.inputs import InputScales, stored_scale
from l4pack.calibration.kept import KeptStates
from l4pack.calibration.kv_cache import CacheRange
from l4pack.calibration.mlp import Matrices, result_of, solve_mlp, stored
from l4pack.calibration.output import Output
from l4pack.calibration.rows import UnitRows, blocks, expert_rows
from l4pack.calibration.supply import Supply
from l4pack.calibration.written import cache_key, input_scale, input_scales_key, unit_key
from l4pack.checkpoint.reader import NUMPY_TYPES
from l4pack.checkpoint.writer import Written
from l4pack.errors import QualityError, SourceError, StoppedError
from l4pack.model.parts import MLP_MATRICES
from l4pack.plan.extents import INPUT_SCALE
from l4pack.plan.needs import asymmetric
from l4pack.quant.dtypes import FloatName
from l4pack.quant.quantize import NonFiniteError
from l4pack.quant.torch_ops import DTYPES
from l4pack.stream.embed import embed
from l4pack.stream.hidden import Packed
from l4pack.stream.layer import Blocks, LayerPass, Stream
from l4pack.stream.modules import Skeleton
from l4pack.stream.prefetch import Prefetch
from l4pack.stream.units import (
    Part,
    Unit,
    UnitWeights,
    expert_unit,
    feed_forward_unit,
    load_unit,
    module_names,
)
from l4pack.stream.weights import LinearWeight, Weights
from l4pack.work.seal import Seal

if TYPE_CHECKING:
    from l4pack.plan.assign import Target
    from l4pack.plan.plan import Plan

# Without it torch refuses every matrix product on CUDA that is to be deterministic; cuBLAS reads it when it starts.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class CalibrationRun:
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
        """`folder` takes the hidden states; `supply` gets the source's files, which else must all be there.

        Raises BudgetError when the disk has no room for the hidden states.
        """
        assert plan.text is not None
        assert plan.recipe.calibration is not None
        assert plan.needs is not None
        self._plan, self._output, self._stop, self._advance = plan, output, stop, advance
        self._supply = supply
        self._options = plan.recipe.calibration
        self._config = plan.checkpoint.config
        self._targets = {target.module: target for target in plan.calibrated}
        self._inputs = InputScales(plan.observed)
        self._made = {linear.module: name for linear, name in plan.assigned if name is not None}
        self._packed = Packed(plan.text.sequences)
        self._device = torch.device(device)
        dtype = torch.float32
        self._skeleton = Skeleton(self._config, self._device, dtype)
        self._weights = Weights(plan.checkpoint, self._device, dtype)
        names = ["original", "quantized"] if asymmetric(plan.recipe, plan.calibrated) else ["quantized"]
        folder.mkdir(exist_ok=True)
        width = self._config.text.hidden_size
        layers = self._config.text.num_hidden_layers
        self._kept = KeptStates(output.journal, folder, names, self._packed.rows, width, dtype, layers)
        self._done = self._kept.done()
        side = self._done % 2 if 0 < self._done < layers else None
        self._streams = [Stream(folder, name, self._packed.rows, width, dtype, side) for name in names]
        self._coverage = Coverage.of(self._config, self._options.max_cold_experts)
        for key, found in output.journal.results.items():
            if "tokens" in found:
                self._coverage.add(int(key), found["tokens"])
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: tuple[int, Future[list[Seal]]] | None = None

    def run(self) -> None:
        """Walk to the last layer. Raises StoppedError, QualityError when a gate is missed, SourceError."""
        done = self._done
        finished = {module for found in self._output.journal.results.values() for module in found.get("matrices", ())}
        done_before = [target for module, target in self._targets.items() if module in finished]
        self._advance(sum(map(self._plan.target_bytes, done_before)))
        try:
            with reproducible(), self._weights, Prefetch(self._load) as ready:
                if done == 0:
                    with self._supplied(0):
                        for stream in self._streams:
                            embed(self._weights, self._skeleton, self._packed, stream.current)
                for layer in range(done, self._config.text.num_hidden_layers):
                    with self._supplied(layer + 1):
                        self._layer(layer, ready)
                self._settle()
        finally:
            self._saver.shutdown(wait=True)
            for stream in self._streams:
                stream.close()

    @contextmanager
    def _supplied(self, step: int) -> Iterator[None]:
        """A step of the walk, with its files there."""
        if self._supply is None:
            yield
            return
        self._supply.arrive(step)
        yield
        self._weights.close_files()
        self._supply.leave(step)

    def _load(self, unit: Unit) -> UnitWeights:
        return load_unit(self._weights, unit)

    def _layer(self, layer: int, ready: Prefetch[Unit, UnitWeights]) -> None:
        attention, shared = Unit(layer, Part.ATTENTION), feed_forward_unit(self._config, layer)
        moe = layer in self._config.text.moe_layers
        experts = [expert_unit(layer, expert) for expert in range(self._config.text.num_local_experts if moe else 0)]
        ready.plan([attention, shared, *experts])
        blocks_of = Blocks.on(self._device, self._config.text.hidden_size)
        passes = [
            LayerPass(self._skeleton, layer, self._packed, stream, blocks_of, release=True) for stream in self._streams
        ]
        weights = ready.take(attention)
        for one in passes[:-1]:
            one.attention(weights)
        cache = self._cache_range()
        passes[-1].attention(self._as_written(attention, weights), cache)
        for one in passes:
            one.route()
        self._record_coverage(layer, passes[0])
        self._settle()  # from here on the files are written that a killed run would go on from
        for unit in (shared, *experts):
            self._unit(unit, ready.take(unit), passes)
        for one, stream in zip(passes, self._streams, strict=True):
            one.finish()
            stream.release()
        self._write_input_scales(layer)
        if cache is not None:
            self._write_cache_scales(layer, cache)
        self._save(layer)

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

    def _record_coverage(self, layer: int, one: LayerPass) -> None:
        if one.routing is None:
            return
        tokens = one.routing.counts()
        self._coverage.add(layer, tokens)
        if self._plan.calibrated or self._plan.observed:  # what enters the KV cache, no expert decides
            self._coverage.check()
        self._output.journal.record(results={str(layer): {"tokens": tokens}})

    def _unit(self, unit: Unit, weights: UnitWeights, passes: list[LayerPass]) -> None:
        if self._stop.is_set():
            raise StoppedError("stopped; what is finished is kept", hint="run the same command again to go on")
        names = module_names(self._config, unit)
        targets = {local: self._targets[name] for local, name in names.items() if name in self._targets}
        if targets and unit_key(unit) not in self._output.journal.finished:
            self._solve(unit, weights, targets, passes)
        for one in passes[:-1]:
            one.feed_forward(unit, one.mlp(unit, weights))
        module = passes[-1].mlp(unit, self._as_written(unit, weights))
        self._inputs.watch(unit, module, names)
        passes[-1].feed_forward(unit, module)

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
        self._advance(sum(self._plan.target_bytes(target) for target in targets.values()))

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
        arrays = {}
        for tensor in target.tensors:
            if tensor.name.endswith(f".{INPUT_SCALE}"):
                continue
            raw = self._output.writer.read(tensor.name)
            arrays[tensor.name.removeprefix(f"{module}.")] = raw.view(NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape)
        scheme, linear = self._plan.recipe.schemes[target.scheme], target.linear
        values = torch.from_numpy(dequantized(arrays, scheme, linear.out_features, linear.in_features, module))
        return values.to(DTYPES[self._config.dtype or "bfloat16"]).to(self._device, torch.float32)

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
                hint="give more --samples or a broader --text, or raise calibration.max_fallbacks in the recipe",
            )

    def _save(self, layer: int) -> None:
        written = [stream.following for stream in self._streams]

        def save() -> list[Seal]:
            for buffer in written:
                buffer.flush()
                buffer.release()
            return self._kept.seal(layer)

        self._settle()
        self._saving = (layer, self._saver.submit(save))
        for stream in self._streams:
            stream.advance()

    def _settle(self) -> None:
        """Wait until the last complete layer is on disk, and note it."""
        if self._saving is not None:
            layer, future = self._saving
            self._kept.note(layer, future.result())
            self._saving = None


@contextmanager
def reproducible() -> Iterator[None]:
    """Only algorithms of torch that give the same bits every time."""
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
