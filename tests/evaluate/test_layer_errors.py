"""A unit's own error is what its weights make of the original's inputs, and costs no second run of the original."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from streaming import JOB, stream_model, token_rows

from l4pack.evaluate.layer_errors import ARTIFACTS, LEAST_ROWS, SAMPLED_SHARE, LayerErrors
from l4pack.stream.hidden import Packed, TokenSequence
from l4pack.stream.lanes import Lane
from l4pack.stream.layer import LayerPass
from l4pack.stream.units import Part, load_unit
from l4pack.stream.walk import Walk


@pytest.fixture
def seen(monkeypatch):
    """Inputs of every MLP that runs, by model and unit."""
    inputs, mlp = defaultdict(list), LayerPass.mlp

    def watched(self, unit, weights):
        module = mlp(self, unit, weights)

        def forward(rows):
            inputs[self._stream.name, unit].append(rows)
            return module(rows)

        return forward

    monkeypatch.setattr(LayerPass, "mlp", watched)
    return inputs


def _swiglu(weights, inputs):
    gate, up, down = (weights.linears[name].weight.double() for name in ("gate_proj", "up_proj", "down_proj"))
    return (torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T


def _jackknife(differences, sizes):
    """The standard error of sqrt(sum of differences / sum of sizes), leaving out one row at a time."""
    count = len(sizes)
    without = ((differences.sum() - differences) / (sizes.sum() - sizes)).sqrt()
    return float(((count - 1) / count * (without - without.mean()).square().sum()).sqrt())


def test_errors_are_those_of_a_sample_of_the_originals_rows(checkpoint, artifact, tmp_path, seen):
    packed = Packed([TokenSequence(tuple(ids)) for ids in token_rows()])
    models = [stream_model(checkpoint("scout")), stream_model(artifact("int4-rtn"), "artifact")]
    errors = LayerErrors(models[0].skeleton.config, paired=True)
    with Walk([Lane(model.name, model, packed) for model in models], tmp_path, JOB, errors) as walk:
        walk.run()
        records = [layer[ARTIFACTS][0] for layer in walk.records]
    shared = experts = 0
    for (name, unit), inputs in seen.items():
        rows = torch.cat(inputs)
        if name != "original":
            continue
        sample = rows[: max(LEAST_ROWS, len(rows) // SAMPLED_SHARE)].double()
        wanted, found = (_swiglu(load_unit(model.weights, unit), sample) for model in models)
        error = float((found - wanted).norm() / wanted.norm())
        if unit.part is Part.SHARED:
            assert records[unit.layer]["shared_expert_error"] == pytest.approx(error, rel=1e-4)
            assert records[unit.layer]["shared_expert_standard_error"] == pytest.approx(
                _jackknife((found - wanted).square().sum(dim=1), wanted.square().sum(dim=1)), rel=0.1
            )
            assert len(rows) == packed.rows
            assert sum(map(len, seen["artifact", unit])) == packed.rows + packed.rows // SAMPLED_SHARE
            shared += 1
        else:
            assert records[unit.layer]["experts"][unit.expert]["error"] == pytest.approx(error, rel=1e-4)
            assert len(rows) == records[unit.layer]["experts"][unit.expert]["tokens"]
            experts += 1
    assert shared == 4
    assert experts > 4
    for model in models:
        model.weights.close_files()


def test_an_artifact_alone_runs_every_row_once(artifact, tmp_path, seen):
    packed = Packed([TokenSequence(tuple(ids)) for ids in token_rows()])
    model = stream_model(artifact("int4-rtn"), "artifact")
    with Walk(
        [Lane(model.name, model, packed)], tmp_path, JOB, LayerErrors(model.skeleton.config, paired=False)
    ) as walk:
        walk.run()
    shared = [sum(map(len, inputs)) for (_, unit), inputs in seen.items() if unit.part is Part.SHARED]
    assert shared == [packed.rows] * 4
    model.weights.close_files()
