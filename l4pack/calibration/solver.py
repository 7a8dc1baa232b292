"""Solving units of a plan for the inputs that passes give them: nothing is written, nobody is asked what is finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.activations import ACT2FN

from l4pack.calibration.mlp import Matrices, result_of, solve_mlp, stored
from l4pack.calibration.rows import UnitRows, blocks, expert_rows
from l4pack.errors import SourceError
from l4pack.model.parts import MLP_MATRICES
from l4pack.quant.quantize import NonFiniteError
from l4pack.quant.quantized import Quantized
from l4pack.quant.torch_ops import DTYPES
from l4pack.stream.units import LoadedUnit, Part, Unit, module_names

if TYPE_CHECKING:
    from l4pack.plan.assign import Target
    from l4pack.plan.plan import Plan
    from l4pack.stream.layer import LayerPass
    from l4pack.stream.modules import Skeleton


@dataclass(frozen=True)
class SolvedUnit:
    """What an artifact holds of a unit's matrices, and what is recorded of each, both by runtime module."""

    unit: Unit
    quantized: Mapping[str, Quantized]
    results: Mapping[str, dict[str, Any]]


class UnitSolver:
    """Solves MLPs as the recipe of a plan says."""

    def __init__(self, plan: Plan, skeleton: Skeleton) -> None:
        assert plan.recipe.calibration is not None
        self._plan, self._config = plan, plan.checkpoint.config
        self._activation = ACT2FN[skeleton.text.hidden_act]
        self._min_tokens = plan.recipe.calibration.min_tokens
        self._targets = {target.module: target for target in plan.calibrated}
        self._dtype = DTYPES[self._config.dtype or "bfloat16"]

    def targets(self, unit: Unit) -> dict[str, Target]:
        """The unit's matrices to solve, by their names in it."""
        names = module_names(self._config, unit)
        return {local: self._targets[name] for local, name in names.items() if name in self._targets}

    def solve(self, loaded: Sequence[LoadedUnit], passes: Sequence[LayerPass]) -> list[SolvedUnit]:
        """Solve MLPs for the last pass's inputs, aiming at the first one's outputs if there are two.

        Raises SourceError for a weight that is not finite.
        """
        return [self._solve(one, passes) for one in loaded]

    @torch.inference_mode()
    def _solve(self, loaded: LoadedUnit, passes: Sequence[LayerPass]) -> SolvedUnit:
        targets, taken = self.targets(loaded.unit), self._rows_of(loaded.unit, passes)
        scheme = self._plan.recipe.schemes[targets[MLP_MATRICES[0]].scheme]
        dtypes = {name: self._plan.checkpoint.float_names[target.linear.tensor] for name, target in targets.items()}
        original = passes[0] if len(passes) > 1 else None
        with _naming(loaded.unit):
            inputs = partial(blocks, taken, passes[-1], original)
            solved = solve_mlp(self._matrices(loaded), inputs, scheme, dtypes)
        modules = {name: target.module for name, target in targets.items()}
        return SolvedUnit(
            loaded.unit,
            {module: stored(solved[name], scheme.num_bits) for name, module in modules.items()},
            {module: result_of(solved[name], taken.own, taken.borrowed) for name, module in modules.items()},
        )

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
