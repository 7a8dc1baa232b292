"""Predictions from gradients are those of whole models' autograd, and what is fitted to them is the best there is."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradients
import pytest
import torch
import whole_model
from test_measure import SMALL, change_of, changed_whole_model, outputs, settings_for, text_file  # noqa: F401
from torch import Tensor
from whole_model import one_thread  # noqa: F401

from l4pack.checkpoint.open import open_source
from l4pack.fit.losses import losses_for
from l4pack.gradient.keep import GradientKeeper, LayerGradients
from l4pack.gradient.walk import BackwardWalk
from l4pack.measure.changes import few_of
from l4pack.measure.measure import measure
from l4pack.measure.options import OPTIONS, options_for
from l4pack.measure.prepare import Direct, prepare_measurement
from l4pack.measure.slopes import Point, cost_of_rerouting
from l4pack.measure.terms import row_clusters
from l4pack.measure.walk_back import SEED
from l4pack.stream.hidden import Packed
from l4pack.work.state import StateFile

INT8 = ("int8-g32", "int8-g64", "int8-g128")
PREDICTED = [
    ("scout", 0, "attention", "int8-g64"),
    ("scout", 1, "attention", "int8-g64"),
    ("scout", 0, "shared_expert", "int8-g64"),
    ("scout", 0, "routed_expert", "int8-g64"),
    ("scout", 1, "routed_expert", "int8-g64"),
    ("maverick", 0, "dense_mlp", "int8-g64"),
    ("maverick", 1, "shared_expert", "int8-g64"),
    ("dense", 1, "dense_mlp", "int8-g64"),
]
KINDS = {"dense": ("maverick", {"moe_layers": [], "interleave_moe_layer_step": 9})}


@pytest.fixture(scope="module")
def predicted(checkpoint, text_file, tmp_path_factory):  # noqa: F811
    """A measurement from gradients with nothing rounded to BF16, each made once."""
    made: dict[str, Any] = {}

    def run(kind: str) -> Any:
        if kind not in made:
            name, changes = KINDS.get(kind, (kind, {}))
            folder = checkpoint(name, **SMALL, **changes)
            out = tmp_path_factory.mktemp("out") / "sensitivity.json"
            prepared = prepare_measurement(
                open_source(str(folder)), settings_for(text_file, out, options=INT8, direct=Direct.FEW)
            )
            with pytest.MonkeyPatch.context() as patch:
                exact = functools.partial(BackwardWalk, kept=torch.float32)
                patch.setattr("l4pack.measure.walk_back.BackwardWalk", exact)
                patch.setattr("l4pack.gradient.keep.KEPT", torch.float32)
                made[kind] = folder, prepared, measure(prepared)
        return made[kind]

    return run


def slopes_of(folder: Path, packed: Packed) -> Any:
    config = open_source(str(folder)).config
    keeper = GradientKeeper(LayerGradients(folder, config, packed.rows), packed, SEED)
    scored = torch.zeros(packed.rows)
    scored[packed.scored_rows()] = 1
    signs = {layer: keeper.signs(layer) for layer in range(2)}
    return gradients.slopes(whole_model.load(folder), [one.tokens for one in packed.sequences], scored, SEED, signs)


def added(given: Tensor, tokens: int) -> Tensor:
    """What all experts that ran on the tokens of a sequence give together, [tokens, hidden]."""
    return given.reshape(-1, tokens, given.shape[-1]).sum(0)


@pytest.mark.parametrize(("kind", "layer", "role", "option"), PREDICTED)
def test_terms_are_a_whole_models(predicted: Any, kind: str, layer: int, role: str, option: str) -> None:
    folder, prepared, record = predicted(kind)
    sequences = prepared.texts.measured.sequences
    packed = Packed(sequences)
    original = outputs(whole_model.load(folder), layer, role, sequences)
    changed = outputs(changed_whole_model(folder, layer, role, OPTIONS[option]), layer, role, sequences)
    moved = torch.cat([added(b - a, len(one.tokens)) for a, b, one in zip(original, changed, sequences, strict=True)])
    ours, theirs = slopes_of(folder, packed)["middle" if role == "attention" else "outputs", layer]
    count = len(packed.scored_rows())
    smooth = float((ours * moved).sum(1).double().square().sum()) / 2 / count
    rerouting = record.gradients.rerouting * float((theirs * moved).sum(1).double().abs().sum()) / count
    found = change_of(record, layer, role, option)
    assert not found.measured
    assert found.kl == pytest.approx(smooth + rerouting, rel=5e-3)
    assert found.rerouting == pytest.approx(rerouting, rel=5e-3, abs=1e-12)
    assert found.kl_standard_error > record.gradients.spread * found.kl


def test_what_is_measured_stands_as_it_was(predicted: Any, checkpoint, text_file, tmp_path):  # noqa: F811
    folder, prepared, record = predicted("scout")
    every = settings_for(text_file, tmp_path / "s.json", options=INT8, direct=Direct.ALL)
    whole = measure(prepare_measurement(open_source(str(folder)), every))
    measured = [one for one in record.changes if one.measured]
    assert prepared.costs.direct == len(measured) == record.gradients.count
    for one in record.changes:
        other = change_of(whole, one.layer, one.role.value, one.option)
        assert one.error == other.error
        if one.measured:
            assert (one.kl, one.kl_standard_error) == (other.kl, other.kl_standard_error)
    assert {one.title for one in record.joint} < {one.title for one in whole.joint}
    assert (
        losses_for(open_source(str(folder)), record).kl.keys() == losses_for(open_source(str(folder)), whole).kl.keys()
    )


def test_few_stand_for_every_role_and_depth(checkpoint):
    for kind, roles in (("scout", 3), ("maverick", 4)):
        config = open_source(str(checkpoint(kind))).config
        options = options_for(config)
        found = few_of(config, options)
        assert {one.role for one in found} == set(options.by_role)
        assert len(found) == len(set(found)) <= roles * 2 * 2
        assert {one.layer for one in found} == set(range(4))


def test_the_cost_of_rerouting_is_that_of_least_squares_in_logs():
    points = [Point(1.0, 4.0, 3.0), Point(0.0, 2.0, 0.9), Point(5.0, 0.0, 4.0), Point(0.1, 1.0, 0.9)]

    def squares(each: float) -> float:
        return sum(math.log((one.smooth + each * one.rerouting) / one.kl) ** 2 for one in points)

    best = cost_of_rerouting(points)
    assert all(squares(best) <= squares(best * factor) for factor in (0.5, 0.99, 1.01, 2))
    assert cost_of_rerouting([Point(1.0, 2.0, 5.0)]) == pytest.approx(2.0)
    assert cost_of_rerouting([Point(5.0, 0.0, 4.0)]) == 0
    assert cost_of_rerouting([]) == 0


def test_rows_between_scored_ones_count_with_the_next():
    scored, cluster = torch.tensor([1, 2, 5, 6]), torch.tensor([0, 0, 1, 2])
    assert row_clusters(scored, cluster, 8).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


class DeathError(Exception):
    """In place of a kill."""


def test_whatever_it_dies_beside_it_ends_in_the_same_bytes(checkpoint: Callable[..., Path], text_file, tmp_path):  # noqa: F811
    """Before and after each time a state is written, on the way up, down, and in two waves."""
    little = {**SMALL, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2}
    source = open_source(str(checkpoint("scout", **little)))
    usual = {"options": ("int8-g32",), "direct": Direct.FEW, "streams": 3}
    settings = settings_for(text_file, tmp_path / "s.json", **usual)
    measure(prepare_measurement(source, replace(settings, out=tmp_path / "whole.json")))
    write, count = StateFile.write, {"writes": 0, "alive": 1}

    def die(self: Any, *found: Any) -> None:
        count["writes"] += 1
        if count["writes"] == count["alive"]:
            if count["alive"] % 2:
                write(self, *found)
            raise DeathError
        write(self, *found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateFile, "write", die)
        for alive in range(1, 12):
            count |= {"writes": 0, "alive": alive}
            with contextlib.suppress(DeathError):
                measure(prepare_measurement(source, settings))
                break
    assert alive > 3
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_at_a_shell(l4pack, checkpoint, text_file, tmp_path):  # noqa: F811
    command = ["measure", checkpoint("scout", **SMALL), "--text", text_file, "--samples", 4, "--sequence-length", 96]
    command += ["--options", ",".join(INT8), "--direct", "few", "--compute", "cpu", "--out", tmp_path / "s.json"]
    planned = json.loads(l4pack(*command, "--dry-run", "--json").out)["plan"]
    assert "after one up and one down" in l4pack(*command, "--dry-run").out
    ended = l4pack(*command)
    assert ended.code == 0, ended.err
    assert "predicted from gradients: of" in ended.out
    record = json.loads((tmp_path / "s.json").read_text())
    assert planned["direct"] == record["gradients"]["count"]
    assert planned["walk_back_disk_bytes"] > 0
    assert not (tmp_path / "s.json.partial").exists()
    fitted = l4pack("fit", command[1], "--bits", 9, "--sensitivity", tmp_path / "s.json", "--out", tmp_path / "f.yaml")
    assert fitted.code == 0, fitted.err
