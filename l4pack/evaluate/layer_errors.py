"""Which layer and which expert hurt: every unit of the artifact run on the original's own inputs.

Errors of the residual stream grow from layer to layer whoever made them. So each unit of the artifact also gets a sample
of the inputs that the original's unit saw, and ||artifact's output - original's|| / ||original's|| is that unit's own.
The original's outputs are those of its own walk, and of few rows a quarter is sampled: what this takes is at most an eighth
of what the two walks take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
WORST = 5
# A product rounds otherwise when other rows stand beside it: about 3e-7 of it in float32. FP8 and int8 weights err by 1e-2.
ROUNDING = 1e-5


class LayerErrors(Visitor):
    """Looks on as the original and the artifact walk, one lane each (or the artifact alone)."""

    def __init__(self, config: Llama4Config, *, paired: bool) -> None:
        """`paired`: whether there are both."""
        self._config, self._paired = config, paired
        self._samples: dict[Unit, list[tuple[Tensor, Tensor]]] = {}
        self._errors: dict[Unit, tuple[float, float]] = {}
        self._routing: dict[int, Routing] = {}

    def visit(self, visit: Visit, unit: Unit, weights: UnitWeights) -> None:
        """Run a unit; keep the original's outputs on a sample, or compare the artifact's with them."""
        for one in visit.passes.values():
            if not self._paired:
                one.run(unit, weights)
            elif visit.model == 0:
                self._samples[unit] = self._sampled(unit, one, weights)
            else:
                self._compare(unit, one.run(unit, weights))

    @torch.inference_mode()
    def _sampled(self, unit: Unit, layer_pass: LayerPass, weights: UnitWeights) -> list[tuple[Tensor, Tensor]]:
        """Run the original's unit; returns some of its inputs and what it makes of them."""
        if unit.part is Part.ATTENTION:
            forward, inputs = layer_pass.run(unit, weights), layer_pass.attention_sample(ATTENTION_ROWS)
            return [(inputs, forward(inputs))]
        kept: list[tuple[Tensor, Tensor]] = []
        left = self._most(unit, layer_pass.count(unit))

        def keep(inputs: Tensor, outputs: Tensor) -> None:
            nonlocal left
            if left:
                kept.append((inputs[:left].clone(), outputs[:left].clone()))
                left = max(0, left - len(inputs))

        layer_pass.run(unit, weights, keep)
        return kept

    @torch.inference_mode()
    def _compare(self, unit: Unit, forward: Callable[[Tensor], Tensor]) -> None:
        if sample := self._samples.pop(unit, None):
            difference = sum(_energy(forward(inputs) - wanted) for inputs, wanted in sample)
            self._errors[unit] = (difference, sum(_energy(wanted) for _, wanted in sample))

    def routed(self, visit: Visit) -> None:
        """Keep where the router sent every token."""
        for one in visit.passes.values():
            assert one.routing is not None
            self._routing[visit.model] = one.routing

    def leave(self, layer: int, streams: Mapping[str, Stream]) -> dict[str, Any]:
        """Everything known of a layer."""
        record: dict[str, Any] = {"layer": layer}
        if len(streams) == 2:
            original, artifact = (stream.following.data for stream in streams.values())
            record["residual_error"] = _difference(original, artifact)
        errors = {unit: _ratio(*squares) for unit, squares in self._errors.items()}
        for unit, error in errors.items():
            if unit.part is not Part.EXPERT:
                record[f"{unit.part.value}_error"] = error
        if self._routing:
            record |= self._experts(errors)
        self._samples.clear()
        self._errors.clear()
        self._routing.clear()
        return record

    def _experts(self, errors: dict[Unit, float]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        by_expert = {unit.expert: error for unit, error in errors.items() if unit.part is Part.EXPERT}
        counts = [self._routing[model].counts() for model in sorted(self._routing)]
        if len(counts) == 2:
            first, second = (self._routing[model].experts.sort(dim=1).values for model in (0, 1))
            moved = int((first != second).any(dim=1).sum())
            record |= {"routing_moved": moved, "routing_agreement": 1 - moved / len(first)}
            squares = [values for unit, values in self._errors.items() if unit.part is Part.EXPERT]
            record["routed_expert_error"] = _ratio(sum(a for a, _ in squares), sum(b for _, b in squares))
        record["experts"] = [
            {"expert": expert, "tokens": count, **({"error": by_expert[expert]} if expert in by_expert else {})}
            for expert, count in enumerate(counts[0])
        ]
        return record

    def _most(self, unit: Unit, count: int) -> int:
        """How many of the rows that go through an MLP are in its sample."""
        most = SAMPLE_ROWS
        if unit.part is Part.EXPERT:
            most = max(LEAST_ROWS, SAMPLE_ROWS // self._config.text.num_local_experts)
        return min(most, max(LEAST_ROWS, count // SAMPLED_SHARE))


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())


def _ratio(difference: float, size: float) -> float:
    """The relative error; one that rounding alone may make is none."""
    ratio = math.sqrt(difference / size) if size > 0 else 0.0
    return ratio if ratio > ROUNDING else 0.0


def _difference(reference: Tensor, artifact: Tensor) -> float:
    difference = size = 0.0
    for start in range(0, len(reference), 4096):
        rows = slice(start, start + 4096)
        expected = reference[rows].double()
        difference += float((artifact[rows].double() - expected).square().sum())
        size += float(expected.square().sum())
    return _ratio(difference, size)


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
