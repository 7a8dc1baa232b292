"""Which layer and which expert hurt: every unit of the artifact run on the original's own inputs.

Errors of the residual stream grow from layer to layer whoever made them. So each unit of the artifact also gets a sample
of the inputs that the original's unit saw, and ||artifact's output - original's|| / ||original's|| is that unit's own.
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
ATTENTION_ROWS = 1024
SAMPLED_ROWS = 2 * SAMPLE_ROWS + ATTENTION_ROWS  # of one layer: of its experts, the MLP of all tokens, and attention
WORST = 5


class LayerErrors(Visitor):
    """Looks on as the original and the artifact walk, one lane each (or the artifact alone)."""

    def __init__(self, config: Llama4Config) -> None:
        self._config = config
        self._samples: dict[Unit, list[tuple[Tensor, Tensor]]] = {}
        self._errors: dict[Unit, tuple[float, float]] = {}
        self._routing: dict[int, Routing] = {}

    def visit(self, visit: Visit, unit: Unit, weights: UnitWeights) -> None:
        """Run a unit; keep the original's outputs on a sample, or compare the artifact's with them."""
        for one in visit.passes.values():
            self._compare(visit.model, unit, one, one.run(unit, weights))

    @torch.inference_mode()
    def _compare(self, model: int, unit: Unit, layer_pass: LayerPass, forward: Callable[[Tensor], Tensor]) -> None:
        if model == 0:
            self._samples[unit] = [(inputs, forward(inputs)) for inputs in self._sample(unit, layer_pass)]
        elif sample := self._samples.pop(unit, None):
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

    def _sample(self, unit: Unit, layer_pass: LayerPass) -> list[Tensor]:
        """Some inputs of a unit, block by block."""
        if unit.part is Part.ATTENTION:
            return [layer_pass.attention_sample(ATTENTION_ROWS)]
        most = SAMPLE_ROWS
        if unit.part is Part.EXPERT:
            most = max(LEAST_ROWS, SAMPLE_ROWS // self._config.text.num_local_experts)
        return [inputs for _, inputs in layer_pass.inputs(unit, most)]


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())


def _ratio(difference: float, size: float) -> float:
    return math.sqrt(difference / size) if size > 0 else 0.0


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
