"""Solving units of a plan for the inputs that passes give them: nothing is written, nobody is asked what is finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from l4pack.calibration import batch
from l4pack.calibration.attention import Attention, solve_attention
from l4pack.calibration.batch_units import Batch, Stacked
from l4pack.calibration.mlp import Matrices, result_of, solve_mlp
from l4pack.calibration.rows import UnitRows, blocks, expert_rows
from l4pack.errors import SourceError
from l4pack.model.parts import GATE, MLP_MATRICES
from l4pack.quant.quantize import NonFiniteError
from l4pack.quant.solution import Solution
from l4pack.quant.torch_ops import DTYPES, refuse_non_finite
from l4pack.stream.units import LoadedUnit, Part, Unit, module_names
from l4pack.work.device import CPU

if TYPE_CHECKING:
    from l4pack.gradient.moments import GradientMoments
    from l4pack.plan.assign import Target
    from l4pack.plan.plan import Plan
    from l4pack.quant.dtypes import FloatName
    from l4pack.recipe import RecipeScheme
    from l4pack.stream.layer import LayerPass
    from l4pack.stream.modules import Skeleton


@dataclass(frozen=True)
class SolvedUnit:
    """A unit's solved matrices by their names in it, and what is recorded of each by runtime module."""

    unit: Unit
    solutions: Mapping[str, Solution]
    results: Mapping[str, dict[str, Any]]

    @property
    def on_device(self) -> bool:
        """Whether the solutions lie where the unit is run next."""
        return any(solution.levels.device.type != CPU for solution in self.solutions.values())


class UnitSolver:
    """Solves attention and MLPs as the recipe of a plan says."""

    def __init__(self, plan: Plan, skeleton: Skeleton, moments: GradientMoments | None = None) -> None:
        """`moments` are there where a scheme is two-sided."""
        self._moments, self._device = moments, skeleton.device
        assert plan.recipe.calibration is not None
        assert plan.needs is not None
        self._plan, self._config, self._batched = plan, plan.checkpoint.config, plan.needs.together > 0
        self._activation = ACT2FN[skeleton.text.hidden_act]
        self._min_tokens = plan.recipe.calibration.min_tokens
        self._targets = {target.module: target for target in plan.calibrated}
        self._dtype = DTYPES[self._config.dtype or "bfloat16"]

    def targets(self, unit: Unit) -> dict[str, Target]:
        """The unit's matrices to solve, by their names in it."""
        names = module_names(self._config, unit)
        return {local: self._targets[name] for local, name in names.items() if name in self._targets}

    def solve(self, loaded: Sequence[LoadedUnit], passes: Sequence[LayerPass]) -> list[SolvedUnit]:
        """Solve a layer's attention, or MLPs, for the last pass's inputs, aiming at the first one's outputs if there are two.

        Raises SourceError for a weight that is not finite.
        """
        original = passes[0] if len(passes) > 1 else None
        if loaded[0].unit.part is Part.ATTENTION:
            return [self._attention(one, passes[-1], original) for one in loaded]
        taken = [self._rows_of(one.unit, passes) for one in loaded]
        if self._batched and self._stackable(loaded):
            return self._together(loaded, taken, passes[-1], original)
        return [self._one(*each, passes[-1], original) for each in zip(loaded, taken, strict=True)]

    def _stackable(self, loaded: Sequence[LoadedUnit]) -> bool:
        """Whether units can be solved together: all matrices alike, and no block of scales in both gate and up, one of which lies
        over the other."""
        alike = len({scheme for one in loaded for scheme in self._schemes(one).values()}) == 1
        whole = len(self._matrices(loaded[0]).weights[GATE]) % self._scheme(loaded[0]).block_rows == 0
        return alike and whole

    def _two_sided(self, loaded: LoadedUnit) -> bool:
        options = self._scheme(loaded).gptq
        return options is not None and options.two_sided

    @torch.inference_mode()
    def _attention(self, loaded: LoadedUnit, quantized: LayerPass, original: LayerPass | None) -> SolvedUnit:
        attention = Attention(loaded.weights, quantized, original, self._dtype)
        with _naming(loaded.unit):
            solved = solve_attention(attention, self._scheme(loaded), self._dtypes(loaded))
        return self._solved(loaded, UnitRows(quantized.tokens), solved)

    @torch.inference_mode()
    def _one(self, loaded: LoadedUnit, taken: UnitRows, quantized: LayerPass, original: LayerPass | None) -> SolvedUnit:
        with _naming(loaded.unit):
            inputs = partial(blocks, taken, quantized, original)
            outputs = self._outputs(loaded)
            solved = solve_mlp(self._matrices(loaded), inputs, self._scheme(loaded), self._dtypes(loaded), outputs)
        return self._solved(loaded, taken, solved)

    def _outputs(self, loaded: LoadedUnit) -> Tensor | None:
        """The moments of gradients that a two-sided scheme weighs outputs by."""
        if not self._two_sided(loaded):
            return None
        assert self._moments is not None
        return self._moments.of(loaded.unit.layer).to(self._device)

    @torch.inference_mode()
    def _together(
        self,
        loaded: Sequence[LoadedUnit],
        taken: Sequence[UnitRows],
        quantized: LayerPass,
        original: LayerPass | None,
    ) -> list[SolvedUnit]:
        order = sorted(range(len(loaded)), key=lambda number: -taken[number].count)
        loaded, taken = [loaded[number] for number in order], [taken[number] for number in order]
        weights = torch.tensor([one.weight for one in taken]).to(quantized.device)
        stacked = Stacked.of([self._matrices(one).weights for one in loaded])
        inputs = partial(batch.blocks, taken, quantized, original)
        given = Batch(stacked, inputs, weights, self._activation, self._dtype, self._outputs(loaded[0]))
        try:
            found = batch.solve(given, self._scheme(loaded[0]), next(iter(self._dtypes(loaded[0]).values())))
        except batch.UnitNotFiniteError as error:
            self._refuse(loaded[error.unit])
            raise
        solved = [self._solved(*each) for each in zip(loaded, taken, found, strict=True)]
        return [solved[order.index(number)] for number in range(len(loaded))]

    def _refuse(self, loaded: LoadedUnit) -> None:
        """Raise SourceError that says where a weight is not finite."""
        with _naming(loaded.unit):
            for weight in self._matrices(loaded).weights.values():
                refuse_non_finite(weight)

    def _solved(self, loaded: LoadedUnit, taken: UnitRows, solutions: Mapping[str, Solution]) -> SolvedUnit:
        results = {
            target.module: result_of(solutions[name], taken.own, taken.borrowed)
            for name, target in self.targets(loaded.unit).items()
        }
        return SolvedUnit(loaded.unit, solutions, results)

    def _scheme(self, loaded: LoadedUnit) -> RecipeScheme:
        """All matrices of a unit have the same: rules are by role and layer."""
        return self._plan.recipe.schemes[next(iter(self.targets(loaded.unit).values())).scheme]

    def _dtypes(self, loaded: LoadedUnit) -> dict[str, FloatName]:
        return {name: dtype for name, (_, dtype) in self._schemes(loaded).items()}

    def _schemes(self, loaded: LoadedUnit) -> dict[str, tuple[str, FloatName]]:
        """The scheme, and the dtype in the source, of each matrix."""
        names = self._plan.checkpoint.float_names
        return {name: (one.scheme, names[one.linear.tensor]) for name, one in self.targets(loaded.unit).items()}

    def _matrices(self, loaded: LoadedUnit) -> Matrices:
        weights = {name: loaded.weights.linears[name].weight for name in MLP_MATRICES}
        return Matrices(weights, self._activation, self._dtype)

    def _rows_of(self, unit: Unit, passes: Sequence[LayerPass]) -> UnitRows:
        routing, original = passes[-1].routing, passes[0].routing if len(passes) > 1 else None
        if unit.part is not Part.EXPERT or unit.expert is None or routing is None:
            return UnitRows(passes[-1].tokens)
        return expert_rows(unit.expert, routing, original, self._min_tokens)


@contextmanager
def _naming(unit: Unit) -> Iterator[None]:
    """Say which unit's weight it is that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        raise SourceError(
            f"{unit}: a weight at output {error.row}, input {error.column} is infinite or NaN",
            hint="the checkpoint is damaged: download it again",
        ) from error
