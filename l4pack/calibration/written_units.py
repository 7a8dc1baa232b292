"""Units as an artifact holds them: writing what was solved, and running what was written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l4pack.calibration.mlp import solved_weights, stored
from l4pack.calibration.written import written_weights
from l4pack.quant import torch_ops
from l4pack.stream.units import LoadedUnit, Part, UnitWeights, module_names
from l4pack.stream.weights import LinearWeight

if TYPE_CHECKING:
    from l4pack.calibration.inputs import InputScales
    from l4pack.calibration.kv_cache import CacheRange
    from l4pack.calibration.output import MatrixWriter
    from l4pack.calibration.solver import SolvedUnit
    from l4pack.checkpoint.writer import ShardWriter, Written
    from l4pack.plan.plan import Plan
    from l4pack.stream.layer import LayerPass


class WrittenUnits:
    """The quantized matrices of a plan in the shards that are being written."""

    def __init__(self, plan: Plan, writer: ShardWriter, executor: MatrixWriter, device: torch.device) -> None:
        self._plan, self._writer, self._executor, self._device = plan, writer, executor, device
        self._config = plan.checkpoint.config
        self._dtype = torch_ops.DTYPES[self._config.dtype or "bfloat16"]
        self._made = {linear.module for linear, name in plan.assigned if name is not None}

    def write(self, solved: SolvedUnit) -> Written:
        """Put a solved unit's matrices into the shards; they are on disk once the writer is in step with it."""
        names = module_names(self._config, solved.unit)
        with self._writer.watched() as written:
            for local, solution in solved.solutions.items():
                target = self._plan.targets[names[local]]
                scheme = self._plan.recipe.schemes[target.scheme]
                self._executor.write_quantized(target, 0, stored(solution, scheme))
        return written

    def run(
        self,
        loaded: LoadedUnit,
        passes: Sequence[LayerPass],
        inputs: InputScales,
        cache: CacheRange | None = None,
        solved: SolvedUnit | None = None,
    ) -> None:
        """Run a unit: as the source has it in all passes but the last, there as it was `solved`, or else as it was
        written.

        `inputs` see what enters the latter's matrices, and `cache` its keys and values.
        """
        *original, quantized = passes
        unit = loaded.unit
        for one in original:
            one.run(unit, loaded.weights)
        weights = self.as_written(loaded, solved)
        if unit.part is Part.ATTENTION:
            quantized.attention(weights, cache)
            return
        module = quantized.mlp(unit, weights)
        inputs.watch(unit, module, module_names(self._config, unit))
        quantized.feed_forward(unit, module)

    def as_written(self, loaded: LoadedUnit, solved: SolvedUnit | None = None) -> UnitWeights:
        """A unit with the matrices that are quantized as a runtime will see them: of what was `solved`, without reading
        it back."""
        linears, solutions = dict(loaded.weights.linears), solved.solutions if solved else {}
        for local, module in module_names(self._config, loaded.unit).items():
            if local in solutions:
                linears[local] = LinearWeight(solved_weights(solutions[local], self._dtype))
            elif module in self._made:
                linears[local] = LinearWeight(self._read_back(module))
        return UnitWeights(linears, loaded.weights.tensors)

    def _read_back(self, module: str) -> Tensor:
        target = self._plan.targets[module]
        values = written_weights(self._writer, target, self._plan.recipe.schemes[target.scheme])
        return torch.from_numpy(values).to(self._dtype).to(self._device, torch.float32)
