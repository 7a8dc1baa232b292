"""Which layer and which expert hurt: every unit of the artifact run on the original's own inputs.

Errors of the residual stream grow from layer to layer whoever made them. So each unit of the artifact also gets a sample
of the inputs that the original's unit saw, and ||artifact's output - original's|| / ||original's|| is that unit's own.
The original's outputs are those of its own walk, and of few rows a quarter is sampled: what this takes is at most an eighth
of what the two walks take.

The standard error of such a ratio of sums is the delta method's, with sampled rows taken as independent (Cochran, "Sampling
techniques", 1977, section 6.3); rows of one text are not quite, so it is a little too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l4pack.model.config import Llama4Config
from l4pack.stream.layer import LayerPass, Routing
from l4pack.stream.sides import Stream
from l4pack.stream.units import Part, Unit, UnitWeights
from l4pack.stream.visitor import Visit, Visitor

SAMPLE_ROWS = 2048  # of one layer, shared out among its experts
LEAST_ROWS = 16
SAMPLED_SHARE = 4  # of so many rows, one is in the sample
ATTENTION_ROWS = 1024
SAMPLED_ROWS = 2 * SAMPLE_ROWS + ATTENTION_ROWS  # of one layer: of its experts, the MLP of all tokens, and attention
DIFFERENCE_ROWS = 4096  # of two streams, compared at once
WORST = 5
ARTIFACTS = "artifacts"  # the key of what a layer's record has a part a model of
# A product rounds otherwise when other rows stand beside it: about 3e-7 of it in float32. FP8 and int8 weights err by 1e-2.
ROUNDING = 1e-5


class Squares(NamedTuple):
    """Sums over rows of d = ||artifact's - original's||^2, of s = ||original's||^2, and of their products."""

    difference: float
    size: float
    differences_squared: float
    difference_by_size: float
    sizes_squared: float
    rows: int

    @classmethod
    def of(cls, difference: Tensor, original: Tensor) -> Squares:
        """Of a block of rows [..., width]."""
        d, s = (one.double().square().sum(dim=-1).flatten() for one in (difference, original))
        sums = torch.stack([d, s, d * d, d * s, s * s]).sum(dim=1).tolist()
        difference_sum, size, differences_squared, difference_by_size, sizes_squared = sums
        return cls(difference_sum, size, differences_squared, difference_by_size, sizes_squared, len(d))


class Samples:
    """What units of the original made of some of their inputs, for artifacts' units to be given the same."""

    def __init__(self, config: Llama4Config) -> None:
        self._config = config
        self._kept: dict[Unit, list[tuple[Tensor, Tensor]]] = {}

    @torch.inference_mode()
    def run(self, unit: Unit, layer_pass: LayerPass, weights: UnitWeights, before: int = 0) -> None:
        """Run the original's unit, and keep some of its inputs and what it makes of them; so many of an MLP's rows are run
        `before` by others."""
        if unit.part is Part.ATTENTION:
            forward = layer_pass.run(unit, weights)
            if not before:
                inputs = layer_pass.attention_sample(ATTENTION_ROWS)
                self._kept[unit] = [(inputs, forward(inputs))]
            return
        kept: list[tuple[Tensor, Tensor]] = []
        left = max(0, self._most(unit, layer_pass.count(unit)) - before)

        def keep(inputs: Tensor, outputs: Tensor) -> None:
            nonlocal left
            if left:
                kept.append((inputs[:left].clone(), outputs[:left].clone()))
                left = max(0, left - len(inputs))

        layer_pass.run(unit, weights, keep)
        self._kept[unit] = kept

    @torch.inference_mode()
    def compare(self, unit: Unit, forward: Callable[[Tensor], Tensor]) -> list[Squares]:
        """How far an artifact's unit is from the original's, by blocks of the sample."""
        sample = self._kept.get(unit, ())
        return [Squares.of(forward(inputs) - wanted, wanted) for inputs, wanted in sample]

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    def _most(self, unit: Unit, count: int) -> int:
        """How many of the rows that go through an MLP are in its sample."""
        most = SAMPLE_ROWS
        if unit.part is Part.EXPERT:
            most = max(LEAST_ROWS, SAMPLE_ROWS // self._config.text.num_local_experts)
        return min(most, max(LEAST_ROWS, count // SAMPLED_SHARE))


class LayerErrors(Visitor):
    """Looks on as the original and artifacts walk, one lane each (or an artifact alone)."""

    def __init__(self, config: Llama4Config, *, paired: bool) -> None:
        """`paired`: whether the original walks too, before the others."""
        self._paired, self._samples = paired, Samples(config)
        self._errors: dict[int, dict[Unit, Squares]] = {}
        self._routing: dict[int, Routing] = {}

    def visit(self, visit: Visit, unit: Unit, weights: UnitWeights) -> None:
        """Run a unit; keep the original's outputs on a sample, or compare an artifact's with them."""
        for one in visit.passes.values():
            if not self._paired:
                one.run(unit, weights)
            elif visit.model == 0:
                self._samples.run(unit, one, weights)
            else:
                self._note(visit.model, unit, self._samples.compare(unit, one.run(unit, weights)))

    def _note(self, model: int, unit: Unit, squares: Sequence[Squares]) -> None:
        """Keep the error of a model's unit, where it had a sample."""
        if squares:
            self._errors.setdefault(model, {})[unit] = _summed(squares)

    def routed(self, visit: Visit) -> None:
        """Keep where the router sent every token."""
        for one in visit.passes.values():
            assert one.routing is not None
            self._routing[visit.model] = one.routing

    def leave(self, layer: int, streams: Mapping[str, Stream]) -> dict[str, Any]:
        """Everything known of a layer, of every artifact in the order they walk."""
        records = []
        for model in range(1 if self._paired else 0, len(streams)):
            record: dict[str, Any] = {"layer": layer}
            if self._paired:
                record |= _errors("residual", _summed(self._residual(streams, model)))
            records.append(record | self._units(model))
        self._samples.clear()
        self._errors.clear()
        self._routing.clear()
        return {ARTIFACTS: records}

    def _residual(self, streams: Mapping[str, Stream], model: int) -> Sequence[Squares]:
        """How far a model's outputs are from the original's, by blocks of rows."""
        original, *artifacts = (stream.following.data for stream in streams.values())
        return [
            block_difference(original, artifacts[model - 1], number)
            for number in range(difference_blocks(len(original)))
        ]

    def _units(self, model: int) -> dict[str, Any]:
        """The errors of an artifact's units, and what its router did."""
        record: dict[str, Any] = {}
        for unit, squares in self._errors.get(model, {}).items():
            if unit.part is not Part.EXPERT:
                record |= _errors(unit.part.value, squares)
        return record | self._experts(model) if self._routing else record

    def _experts(self, model: int) -> dict[str, Any]:
        record: dict[str, Any] = {}
        squares = {unit.expert: one for unit, one in self._errors.get(model, {}).items() if unit.part is Part.EXPERT}
        by_expert = {expert: _ratio(one) for expert, one in squares.items()}
        if self._paired:
            first, second = (self._routing[one].experts.sort(dim=1).values for one in (0, model))
            moved = int((first != second).any(dim=1).sum())
            record |= {"routing_moved": moved, "routing_agreement": 1 - moved / len(first)}
            record |= _errors("routed_expert", _summed(list(squares.values())))
        record["experts"] = [
            {"expert": expert, "tokens": count, **({"error": by_expert[expert]} if expert in by_expert else {})}
            for expert, count in enumerate(self._routing[0].counts())
        ]
        return record


def _errors(key: str, squares: Squares) -> dict[str, float | None]:
    """The relative error and its standard error, None where one row or no difference leaves none."""
    return {f"{key}_error": _ratio(squares), f"{key}_standard_error": _ratio_error(squares)}


def _ratio(squares: Squares) -> float:
    """The relative error; one that rounding alone may make is none."""
    ratio = math.sqrt(squares.difference / squares.size) if squares.size > 0 else 0.0
    return ratio if ratio > ROUNDING else 0.0


def _ratio_error(squares: Squares) -> float | None:
    ratio, rows = _ratio(squares), squares.rows
    if not ratio or rows < 2:
        return None
    share = squares.difference / squares.size
    rest = squares.differences_squared - 2 * share * squares.difference_by_size + share**2 * squares.sizes_squared
    return math.sqrt(rows / (rows - 1) * max(0.0, rest)) / squares.size / (2 * ratio)


def _summed(squares: Sequence[Squares]) -> Squares:
    """Of all blocks, in their order: sums of another order would be others in the last bits."""
    zero = Squares(0.0, 0.0, 0.0, 0.0, 0.0, 0)
    return Squares(*map(sum, zip(zero, *squares, strict=True)))


def difference_blocks(rows: int) -> int:
    """How many blocks two streams of so many rows are compared in."""
    return math.ceil(rows / DIFFERENCE_ROWS)


def block_difference(reference: Tensor, artifact: Tensor, number: int) -> Squares:
    """How far one block of rows [rows, width] is from the reference."""
    rows = slice(number * DIFFERENCE_ROWS, (number + 1) * DIFFERENCE_ROWS)
    expected = reference[rows].double()
    return Squares.of(artifact[rows].double() - expected, expected)


def worst_units(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The units with the largest errors of their own, worst first."""
    found = [unit for record in layers for unit in (*_shared_units(record), *_expert_units(record))]
    return sorted(found, key=lambda item: -item["error"])[:WORST]


def _shared_units(record: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [part.value for part in (Part.ATTENTION, Part.SHARED, Part.DENSE) if f"{part.value}_error" in record]
    return [{"layer": record["layer"], "block": part, "error": record[f"{part}_error"]} for part in parts]


def _expert_units(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"layer": record["layer"], "block": Part.EXPERT.value, "expert": item["expert"], "error": item["error"]}
        for item in record.get("experts", ())
        if "error" in item
    ]
