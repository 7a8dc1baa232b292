"""A change's KL and error are those of whole models changed by hand; waves, kills and predictions change nothing."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import whole_model
from safetensors.torch import load_file, save_file
from spoil import SPOILS
from torch import Tensor
from whole_model import one_thread  # noqa: F401

from l4pack.artifact.original import weights_digest
from l4pack.calibration.mlp import solved_weights
from l4pack.checkpoint.open import open_source
from l4pack.errors import UsageError
from l4pack.evaluate.statistics import clusters, mean_and_error
from l4pack.measure.changes import Single
from l4pack.measure.identity import model_fingerprint
from l4pack.measure.measure import measure
from l4pack.measure.options import NAMED_ONLY, OPTIONS, bits, options_for
from l4pack.measure.predict import Clusters, Predictor
from l4pack.measure.prepare import Direct, MeasureSettings, prepare_measurement
from l4pack.measure.record import ChangeRecord, combined, read_sensitivity
from l4pack.measure.state import State
from l4pack.model.tensors import Role
from l4pack.quant import gptq
from l4pack.quant.dequantize import dequantize
from l4pack.quant.grid import E4M3
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import quantize_block
from l4pack.recipe import RecipeScheme
from l4pack.stream.activations import RoundedInputs
from l4pack.stream.kept import WalkState
from l4pack.stream.lanes import Lanes
from l4pack.stream.walk import Walk
from l4pack.text.choice import TextChoice
from l4pack.work.folder import WorkFolder
from l4pack.work.state import StateFile

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "sleeps", "under", "old", "apple", "tree")
LENGTH, SAMPLES = 96, 4
INT8 = ("int8-g32", "int8-g64", "int8-g128")
SMALL = {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    generator = torch.Generator().manual_seed(5)
    path.write_text(" ".join(WORDS[index] for index in torch.randint(0, len(WORDS), (1500,), generator=generator)))
    return path


@pytest.fixture(scope="session")
def measured(checkpoint, text_file, tmp_path_factory):
    """A measurement, each made once; keywords change its settings."""
    made = {}

    def run(kind="scout", layers=2, **changes):
        key = repr((kind, layers, sorted(changes.items())))
        if key not in made:
            settings = settings_for(text_file, tmp_path_factory.mktemp("out") / "sensitivity.json", **changes)
            prepared = prepare_measurement(
                open_source(str(checkpoint(kind, **(SMALL if layers == 2 else {})))), settings
            )
            made[key] = prepared, measure(prepared)
        return made[key]

    return run


def settings_for(text_file, out, **changes):
    usual = {"text": TextChoice(str(text_file), SAMPLES, LENGTH), "calibration_samples": 4, "compute": "cpu"}
    return MeasureSettings(out=out, **{**usual, **changes})


def change_of(record, layer, role, option):
    return next(one for one in record.changes if (one.layer, one.role.value, one.option) == (layer, role, option))


def by_hand(weight: Tensor, scheme: RecipeScheme) -> Tensor:
    """What a runtime multiplies with: [out, in] rounded to nearest, with BF16 scales."""
    stored = scheme.model_copy(update={"scale_dtype": "bfloat16"})
    quantized = quantize_block(weight.numpy().copy(), Layout.OUT_IN, "F32", stored)
    values = torch.from_numpy(dequantize(quantized, stored, *weight.shape))
    return values if scheme.type == "float" else values.bfloat16().float()


def modules_of(model, layer: int, role: str) -> list[torch.nn.Linear]:
    block = model.language_model.model.layers[layer]
    within = {
        "attention": block.self_attn,
        "shared_expert": getattr(block.feed_forward, "shared_expert", None),
        "dense_mlp": block.feed_forward,
    }[role]
    return [module for module in within.modules() if isinstance(module, torch.nn.Linear)]


def change_by_hand(model, layer, role, scheme, activations=None):
    """Replace one unit's weights in transformers' own model, and round its inputs if need be."""
    if role == "routed_expert":
        experts = model.language_model.model.layers[layer].feed_forward.experts
        for number in range(experts.gate_up_proj.shape[0]):
            for matrix in (*experts.gate_up_proj.data[number].chunk(2, dim=1), experts.down_proj.data[number]):
                matrix.copy_(by_hand(matrix.T.contiguous(), scheme).T)
        return
    for module in modules_of(model, layer, role):
        module.weight.data = by_hand(module.weight.data, scheme)
        if activations is not None:
            module.register_forward_pre_hook(lambda _, inputs: (activations(inputs[0]),))


def changed_whole_model(folder, *change):
    model = whole_model.load(folder)
    change_by_hand(model, *change)
    return model


def kl_by_hand(original, changed, sequences):
    """KL of every scored token, from all logits of two whole models."""
    ids = [list(sequence.tokens) for sequence in sequences]
    found = []
    for ours, theirs in zip(whole_model.logits(original, ids), whole_model.logits(changed, ids), strict=True):
        p, q = whole_model.log_probabilities(ours[:-1]), whole_model.log_probabilities(theirs[:-1])
        found.append((p.exp() * (p - q)).sum(1))
    return torch.cat(found)


CASES = [
    ("scout", 0, "attention", "int8-g32", None),
    ("scout", 1, "attention", "fp8", RoundedInputs(E4M3, "token")),
    ("scout", 0, "routed_expert", "int8-g128", None),
    ("scout", 1, "shared_expert", "fp8", RoundedInputs(E4M3, "token")),
    ("scout", 1, "shared_expert", "fp8-block", RoundedInputs(E4M3, "group", 128)),
    ("maverick", 0, "dense_mlp", "int8-g64", None),
    ("maverick", 1, "routed_expert", "int8-g32", None),
]


@pytest.mark.parametrize(("kind", "layer", "role", "option", "activations"), CASES)
def test_kl_is_that_of_a_whole_model_changed_by_hand(measured, checkpoint, kind, layer, role, option, activations):
    prepared, record = measured(kind)
    folder = checkpoint(kind, **SMALL)
    sequences = prepared.texts.measured.sequences
    changed = changed_whole_model(folder, layer, role, OPTIONS[option], activations)
    kl = kl_by_hand(whole_model.load(folder), changed, sequences)
    mean, error = mean_and_error(kl, clusters([LENGTH - 1] * len(sequences)))
    found = change_of(record, layer, role, option)
    assert found.measured
    assert found.kl == pytest.approx(mean, rel=2e-3)
    assert found.kl_standard_error == pytest.approx(error, rel=2e-3)
    assert mean > 0


def outputs(model, layer, role, sequences):
    """What a unit of a whole model gives, for every token."""
    block = model.language_model.model.layers[layer]
    unit = {"attention": lambda: block.self_attn, "shared_expert": lambda: block.feed_forward.shared_expert,
            "dense_mlp": lambda: block.feed_forward, "routed_expert": lambda: block.feed_forward.experts}[role]()  # fmt: skip
    seen = []
    # Cloned: the shared expert's output is what the routed experts' are added to in place.
    hook = unit.register_forward_hook(lambda _, __, output: seen.append(first(output).clone()))
    whole_model.logits(model, [sequence.tokens for sequence in sequences])
    hook.remove()
    return seen


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(("kind", "layer", "role", "option", "activations"), CASES)
def test_errors_are_those_of_the_units_outputs(measured, checkpoint, kind, layer, role, option, activations):
    prepared, record = measured(kind)
    folder = checkpoint(kind, **SMALL)
    sequences = prepared.texts.measured.sequences
    original = outputs(whole_model.load(folder), layer, role, sequences)
    changed = outputs(changed_whole_model(folder, layer, role, OPTIONS[option], activations), layer, role, sequences)
    moved = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(original, changed, strict=True))
    size = sum(float(one.double().square().sum()) for one in original)
    assert change_of(record, layer, role, option).error == pytest.approx(moved / size, rel=1e-3)


def seen_by(model, module, sequences):
    """Inputs [tokens, in] of a module of a whole model."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
    whole_model.logits(model, [sequence.tokens for sequence in sequences])
    hook.remove()
    return torch.cat(seen)


def solved_by_hand(mlp, inputs, scheme):
    """GPTQ of gate and up for the inputs, then of down for what they make of them, aiming at the original's output."""
    before = mlp.activation_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    for one in (mlp.gate_proj, mlp.up_proj):
        solve_by_hand(one, scheme, inputs)
    after = mlp.activation_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    solve_by_hand(mlp.down_proj, scheme, after, before)


def solve_by_hand(linear, scheme, seen, original=None):
    """GPTQ of one matrix for inputs [tokens, in]; `original` are those aimed at."""
    cross = None if original is None else (original - seen).T @ seen / len(seen)
    solution = gptq.solve(linear.weight.data, seen.T @ seen / len(seen), scheme, sweeps=4, cross=cross)
    linear.weight.data = solved_weights(solution).bfloat16().float()


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_is_solved_for_the_calibration_text(measured, checkpoint, layer):
    prepared, record = measured("scout")
    calibration, held_out = prepared.texts.calibration.sequences, prepared.texts.measured.sequences
    model = whole_model.load(checkpoint("scout", **SMALL))
    wanted = outputs(model, layer, "attention", held_out)
    attention = model.language_model.model.layers[layer].self_attn
    before = seen_by(model, attention.o_proj, calibration)
    inputs = seen_by(model, attention.q_proj, calibration)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        solve_by_hand(projection, OPTIONS["int4-g32"], inputs)
    solve_by_hand(attention.o_proj, OPTIONS["int4-g32"], seen_by(model, attention.o_proj, calibration), before)
    found = outputs(model, layer, "attention", held_out)
    moved = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    error = moved / sum(float(one.square().sum()) for one in wanted)
    assert change_of(record, layer, "attention", "int4-g32").error == pytest.approx(error, rel=0.02)


@torch.no_grad()
def test_calibrated_options_are_solved_for_the_calibration_text(measured, checkpoint):
    prepared, record = measured("scout")
    model = whole_model.load(checkpoint("scout", **SMALL))
    mlp = model.language_model.model.layers[1].feed_forward.shared_expert
    inputs, held_out = (
        seen_by(model, mlp, text.sequences) for text in (prepared.texts.calibration, prepared.texts.measured)
    )
    wanted = mlp(held_out)
    original = copy.deepcopy(mlp.state_dict())
    for option in ("int4-g32", "int4-g128"):
        mlp.load_state_dict(original)
        solved_by_hand(mlp, inputs, OPTIONS[option])
        error = float((mlp(held_out) - wanted).square().sum() / wanted.square().sum())
        assert change_of(record, 1, "shared_expert", option).error == pytest.approx(error, rel=0.02)


def test_every_unit_has_every_option_it_can_be_served_with(measured):
    _, record = measured("maverick")
    usual = {name for name in OPTIONS if name not in NAMED_ONLY}
    attention = usual - {"fp8-block"}
    for layer, roles in enumerate((("dense_mlp",), ("shared_expert", "routed_expert"))):
        for role, wanted in [("attention", attention), *((role, usual) for role in roles)]:
            found = {one.option for one in record.changes if (one.layer, one.role.value) == (layer, role)}
            assert found == wanted
    assert record.options.keys() == usual


def test_calibration_and_measured_text_share_nothing(measured):
    prepared, record = measured("scout")
    both = prepared.texts
    ours, theirs = ({one.tokens for one in text.sequences} for text in (both.measured, both.calibration))
    assert not ours & theirs
    assert (len(ours), len(theirs)) == (4, 4)
    assert record.text["tokens_sha256"] != record.calibration["tokens_sha256"]
    assert record.text["sha256"] == record.calibration["sha256"]


def test_waves_give_the_numbers_of_one_pass(measured):
    prepared, together = measured("scout")
    apart_prepared, apart = measured("scout", streams=17)
    assert prepared.costs.waves == 1
    assert apart_prepared.costs.waves > 3
    assert apart == together


def test_joint_changes_are_held_against_the_sum_of_singles(measured, checkpoint):
    prepared, record = measured("scout", options=("int4-g128-rtn", "int8-g128"))
    assert prepared.texts.calibration is None
    joint = next(one for one in record.joint if one.choice == {"attention": "int4-g128-rtn"})
    singles = [change_of(record, layer, "attention", "int4-g128-rtn") for layer in (0, 1)]
    assert joint.predicted == pytest.approx(sum(one.kl for one in singles), rel=1e-9)
    folder = checkpoint("scout", **SMALL)
    changed = whole_model.load(folder)
    for layer in (0, 1):
        change_by_hand(changed, layer, "attention", OPTIONS["int4-g128-rtn"])
    kl = kl_by_hand(whole_model.load(folder), changed, prepared.texts.measured.sequences)
    assert joint.measured == pytest.approx(float(kl.mean()), rel=2e-3)


def test_a_mixture_by_layer_is_held_against_a_whole_model(measured, checkpoint):
    prepared, record = measured("scout", options=INT8)
    joint = next(one for one in record.joint if "0.attention" in one.choice)
    changed = whole_model.load(checkpoint("scout", **SMALL))
    for layer, option in enumerate(("int8-g128", "int8-g32")):
        for role in ("attention", "shared_expert", "routed_expert"):
            assert joint.choice[f"{layer}.{role}"] == option
            change_by_hand(changed, layer, role, OPTIONS[option])
    kl = kl_by_hand(whole_model.load(checkpoint("scout", **SMALL)), changed, prepared.texts.measured.sequences)
    assert joint.measured == pytest.approx(float(kl.mean()), rel=5e-3)


def test_without_calibrated_options_no_text_is_kept_back(measured):
    prepared, record = measured("scout", options=INT8)
    assert prepared.texts.calibration is None
    assert record.calibration == {}


def test_a_copy_is_the_same_model_and_a_fine_tune_is_not(measured, checkpoint, tmp_path):
    _, record = measured("scout")
    folder = Path(shutil.copytree(checkpoint("scout", **SMALL), tmp_path / "copy"))
    same = open_source(str(folder))
    assert (model_fingerprint(same), weights_digest(same)) == (record.model.fingerprint, record.model.weights)
    state = load_file(folder / "model.safetensors")
    state["language_model.model.norm.weight"][0] += 1
    save_file(state, folder / "model.safetensors")
    tuned = open_source(str(folder))
    assert model_fingerprint(tuned) == record.model.fingerprint
    assert weights_digest(tuned) != record.model.weights


def test_totals_add_up(measured):
    _, record = measured("scout")
    for total in record.totals:
        changes = [one for one in record.changes if (one.role, one.option) == (total.role, total.option)]
        assert total.units == len(changes) == 2
        assert total.kl == pytest.approx(sum(one.kl for one in changes))
        assert total.kl_standard_error <= sum(one.kl_standard_error for one in changes) * (1 + 1e-9)


def test_errors_of_sums_are_those_of_the_tokens():
    cluster = clusters([40, 100, 70])
    kl = torch.rand(210, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = Clusters(cluster).mean_and_error(Clusters(cluster).sums(kl))
    assert (mean, error) == pytest.approx(mean_and_error(kl, cluster), rel=1e-12)


@pytest.fixture
def predictor(checkpoint, tmp_path):
    """A predictor with given errors and KL a token (the same in both of two clusters) of layer 0's attention."""

    def make(errors, kl):
        config = open_source(str(checkpoint("scout", **SMALL))).config
        options = options_for(config)
        singles = [Single(0, Role.ATTENTION, option) for option in errors]
        state = State(tmp_path, "job")
        state.errors = {single.key: errors[single.option] for single in singles}
        state.kl = {single.key: [kl[single.option] * 5] * 2 for single in singles if single.option in kl}
        return Predictor(singles, options, state, Clusters(clusters([5, 5])))

    return make


def mean_of(estimate):
    return sum(estimate.sums) / 10


def test_predictions_follow_the_law_of_both_anchors(predictor):
    """KL = 2 e + 0.1 sqrt(e): a smooth part, and one of rerouted tokens."""
    errors = {"int4-g128": 0.04, "int4-g64": 0.0225, "int8-g64": 0.0004, "int8-g32": 0.0001}
    law = {option: 2 * error + 0.1 * math.sqrt(error) for option, error in errors.items()}
    made = predictor(errors, {option: law[option] for option in ("int4-g128", "int8-g32")})
    for option in ("int4-g64", "int8-g64"):
        estimate = made.estimate(Single(0, Role.ATTENTION, option))
        assert mean_of(estimate) == pytest.approx(law[option], rel=1e-6)
        assert estimate.rerouting == pytest.approx(0.1 * math.sqrt(errors[option]), rel=1e-6)
        assert not estimate.measured
    assert made.linearity().count == 0
    assert made.off() == {"int4", "int8"}  # never put to the test
    assert made.estimate(Single(0, Role.ATTENTION, "int8-g64")).spread == 1


def test_without_rerouting_kl_is_in_proportion_to_the_error(predictor):
    errors = {"int4-g128": 0.04, "int4-g64": 0.02, "int8-g32": 0.0001}
    made = predictor(errors, {"int4-g128": 0.08, "int8-g32": 0.0002})
    estimate = made.estimate(Single(0, Role.ATTENTION, "int4-g64"))
    assert estimate.rerouting == pytest.approx(0, abs=1e-9)
    assert mean_of(estimate) == pytest.approx(0.04, rel=1e-6)
    # More than in proportion: no coefficient goes below zero to meet it.
    steeper = predictor(errors, {"int4-g128": 0.08, "int8-g32": 0.0001})
    assert steeper.estimate(Single(0, Role.ATTENTION, "int4-g64")).rerouting == 0


def test_a_family_that_is_predicted_well_is_not_measured(predictor):
    errors = {"int4-g128": 0.04, "int4-g64": 0.02, "int8-g32": 0.0001, "int8-g64": 0.0002, "fp8": 0.001}
    law = {option: 2 * error for option, error in errors.items()} | {"int4-g64": 0.042, "int8-g64": 0.0006}
    made = predictor(errors, {option: kl for option, kl in law.items() if option != "fp8"})
    fits = made.linearity().families
    assert fits["int4"].median == pytest.approx(math.log(0.042 / 0.04), rel=1e-3)
    assert fits["int8"].median == pytest.approx(math.log(3 / 2), rel=1e-3)
    assert made.linearity().proportional.p90 == pytest.approx(math.log(3 / 2), rel=1e-3)
    assert made.off() == {"int8", "fp8"}  # one predicted badly, one never put to the test
    assert made.estimate(Single(0, Role.ATTENTION, "fp8")).spread == pytest.approx(
        math.hypot(math.log(1.05), math.log(1.5)) / math.sqrt(2), rel=1e-3
    )


def test_joint_changes_combine_rerouting_as_squares():
    kinds = {"layer": 0, "role": Role.ATTENTION, "error": 0.1, "kl_standard_error": 0.0, "measured": True}
    ours = [
        ChangeRecord(option=option, kl=kl, rerouting=part, **kinds)
        for option, kl, part in (("a", 5.0, 3.0), ("b", 6.0, 4.0))
    ]
    assert combined(ours) == pytest.approx(2 + 2 + 5)


def test_anchors_measure_two_options_a_unit_and_predict_the_rest(measured):
    chosen = {"options": ("int4-g32", "int4-g128", "int8-g32", "fp8"), "layers": 4}
    _, everything = measured("scout", direct=Direct.ALL, **chosen)
    prepared, record = measured("scout", direct=Direct.ANCHORS, **chosen)
    assert prepared.costs.direct == 3 * (4 + 4 + 4) + 3 * 2  # all in three layers, the anchors in the other
    kept = {one.option for one in record.changes if one.layer == 2 and one.measured}
    assert kept == {"int4-g128", "int8-g32"}
    for ours, theirs in zip(record.changes, everything.changes, strict=True):
        assert (ours.error, ours.layer, ours.role) == (theirs.error, theirs.layer, theirs.role)
        assert ours.measured == (ours.layer != 2 or ours.option in kept)
        if ours.measured:
            assert (ours.kl, ours.kl_standard_error) == (theirs.kl, theirs.kl_standard_error)
        else:
            assert ours.kl == pytest.approx(theirs.kl, rel=0.6)
            assert ours.kl_standard_error > 0


def test_auto_measures_everything_where_that_is_cheap(measured):
    prepared, _ = measured("scout")
    assert prepared.settings.direct is Direct.AUTO
    assert prepared.direct is Direct.ALL


def test_auto_measures_the_families_it_predicts_badly(measured, monkeypatch):
    monkeypatch.setattr("l4pack.measure.prepare.CHEAP_FLOP", 0)
    monkeypatch.setattr("l4pack.measure.predict.TOLERANCE", -1)
    prepared, record = measured("scout", options=INT8, streams=9)
    assert prepared.direct is Direct.AUTO
    assert all(one.measured for one in record.changes)


@pytest.fixture
def command(checkpoint, text_file, tmp_path):
    """Arguments of a small measurement."""
    options = ["--text", text_file, "--samples", SAMPLES, "--sequence-length", LENGTH, "--calibration-samples", 4]
    source = checkpoint("scout", **SMALL)
    return lambda out="s.json": [source, "--out", tmp_path / out, *options, "--compute", "cpu"]


def test_the_file_and_what_is_printed(l4pack, command, tmp_path):
    arguments = [*command(), "--options", "int4-g64,fp8"]
    ended = l4pack("measure", *arguments, "--json")
    assert ended.code == 0, ended.err
    printed = json.loads(ended.out)
    record = read_sensitivity(tmp_path / "s.json")
    assert {key: printed[key] for key in record.model_dump()} == record.model_dump(mode="json")
    assert printed["plan"]["streams"] == len(record.changes) + len(record.joint)
    assert printed["run"]["seconds"] > 0
    assert set(record.options) == {"int4-g64", "fp8"}
    assert not (tmp_path / "s.json.partial").exists()
    again = l4pack("measure", *command("t.json"), "--options", "int4-g64,fp8")
    assert again.code == 0, again.err
    assert (tmp_path / "t.json").read_bytes() == (tmp_path / "s.json").read_bytes()
    assert "Measured / sum" in again.out
    assert "int4-g64 " in again.out


def test_a_plan_alone_measures_nothing(l4pack, command, tmp_path):
    ended = l4pack("measure", *command(), "--dry-run", "--streams", 10, "--json")
    plan = json.loads(ended.out)["plan"]
    assert (plan["streams"], plan["waves"]) == (10, math.ceil((plan["changes"] + plan["joint"]) / 10))
    assert plan["tokens"] == SAMPLES * LENGTH
    # Two for each weight a token meets: attention's four matrices, three of the shared and three of a routed expert.
    # The router's column of each of four experts, and scores with half of the keys and the sum of half of the values.
    layer = 2 * (128 * (2 * 128 + 2 * 64) + 2 * 3 * 128 * 128 + 128 * 4 + 128 * LENGTH)
    layers = 2 * (plan["tokens"] + plan["calibration_tokens"])  # the original, on both texts
    layers += plan["tokens"] * (2 * plan["joint"] + (2 + 1) * plan["changes"] // 2)
    assert plan["flop"] == pytest.approx(layer * layers)
    assert list(tmp_path.iterdir()) == []


def test_killed_in_the_second_wave_it_goes_on_to_the_same_bytes(l4pack, command, tmp_path):
    chosen = ["--options", "int4-g128,int8-g64", "--streams", "12"]
    arguments = [*map(str, command()), *chosen]
    script = Path(__file__).parents[1] / "support" / "killed_measurement.py"
    killed = subprocess.run(
        [sys.executable, script, "3", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert json.loads((tmp_path / "s.json.partial" / "state.json").read_text())["state"]["found"]["layers"] == 1
    assert not (tmp_path / "s.json").exists()
    assert l4pack("measure", *arguments).code == 0
    assert l4pack("measure", *command("whole.json"), *chosen).code == 0
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


class DeathError(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_whatever_it_dies_beside_it_ends_in_the_same_numbers(checkpoint, text_file, tmp_path, monkeypatch, before):
    """Every time a state is written, in four waves of which later ones begin at kept inputs of layer 1."""
    source = open_source(str(checkpoint("scout", **SMALL)))
    settings = settings_for(text_file, tmp_path / "s.json", options=("int8-g64", "fp8"), streams=6)
    whole = measure(prepare_measurement(source, replace(settings, out=tmp_path / "whole.json")))
    write, restored, count = StateFile.write, Lanes.restore, {"writes": 0, "restored": 0}

    def die(self, *found):
        count["writes"] += 1
        if not before:
            write(self, *found)
        if count["writes"] == count["alive"]:
            raise DeathError
        if before:
            write(self, *found)

    def note(self, step):
        count["restored"] += 1
        restored(self, step)

    monkeypatch.setattr(StateFile, "write", die)
    monkeypatch.setattr(Lanes, "restore", note)
    found = None
    for alive in range(2, 9):
        count |= {"writes": 0, "alive": alive}
        with contextlib.suppress(DeathError):
            found = measure(prepare_measurement(source, settings))
            break
    assert found == whole
    assert alive > 3
    assert count["restored"] > 0


@pytest.fixture(scope="module")
def half_done(checkpoint, text_file, tmp_path_factory):
    """A measurement that died once the next wave's inputs were kept, and one that nothing happened to."""
    folder = tmp_path_factory.mktemp("half-done")
    source = open_source(str(checkpoint("scout", **SMALL)))
    settings = settings_for(
        text_file, folder / "s.json", options=("int4-g128",), streams=4, text=TextChoice(str(text_file), 2, 48)
    )
    keep = WalkState.keep

    def die(self, *arguments):
        keep(self, *arguments)
        raise DeathError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WalkState, "keep", die)
        with pytest.raises(DeathError):
            measure(prepare_measurement(source, settings))
    return source, settings, measure(prepare_measurement(source, replace(settings, out=folder / "whole.json")))


LEFT = {
    "altered-1.hidden": ("flipped", "swapped"),
    "original-1.hidden": ("removed",),
    "calibration-1.hidden": ("zeroed",),
    "original-kept.hidden": ("halved",),
    "calibration-kept.hidden": ("flipped",),
    "state.json": ("flipped",),
}


@pytest.mark.parametrize(("file", "kind"), [(file, kind) for file, kinds in LEFT.items() for kind in kinds])
def test_whatever_became_of_its_files_it_ends_in_the_same_numbers(half_done, tmp_path, file, kind):
    source, settings, whole = half_done
    settings = replace(settings, out=tmp_path / "s.json")
    shutil.copytree(half_done[1].work, settings.work)
    SPOILS[kind](settings.work / file)
    assert measure(prepare_measurement(source, settings)) == whole
    assert not settings.work.exists()


def test_killed_while_clearing_up_it_ends_in_the_same_bytes(half_done, tmp_path, monkeypatch):
    source, settings, whole = half_done
    settings = replace(settings, out=tmp_path / "s.json")
    shutil.copytree(half_done[1].work, settings.work)

    def die(self):
        for path in self.path.glob("*.hidden"):
            path.unlink()
        raise DeathError

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", die)
        with pytest.raises(DeathError):
            measure(prepare_measurement(source, settings))
    settings.out.unlink()
    assert measure(prepare_measurement(source, settings)) == whole


def test_the_work_folder_is_its_own(half_done, tmp_path):
    source, settings, _ = half_done
    settings = replace(settings, out=tmp_path / "s.json")
    settings.work.mkdir()
    (settings.work / "state.json").write_text("a diary")
    for restart in (False, True):
        with pytest.raises(UsageError, match="is not l4pack's"):
            measure(prepare_measurement(source, replace(settings, restart=restart)))
    assert (settings.work / "state.json").read_text() == "a diary"
    with pytest.raises(UsageError, match="which is read"):
        measure(prepare_measurement(source, replace(settings, out=Path(source.name) / "s.json")))


@pytest.fixture
def stopped(l4pack, monkeypatch):
    """A measurement that is asked to stop when the first layer is done."""

    def run(*arguments):
        save = Walk._save

        def stop(self, *found):
            save(self, *found)
            self._settle()
            signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Walk, "_save", stop)
            return l4pack("measure", *arguments)

    return run


def test_stopped_it_says_so_and_goes_on_to_the_same_bytes(l4pack, stopped, command, tmp_path):
    ended = stopped(*command(), "--options", "int4-g128")
    assert (ended.code, "run the same command" in ended.err) == (75, True)
    assert json.loads((tmp_path / "s.json.partial" / "state.json").read_text())["state"]["found"]["layers"] == 1
    assert l4pack("measure", *command(), "--options", "int4-g128").code == 0
    assert l4pack("measure", *command("whole.json"), "--options", "int4-g128").code == 0
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_work_of_another_job_is_refused(l4pack, stopped, command):
    assert stopped(*command(), "--options", "int8-g64").code == 75
    ended = l4pack("measure", *command(), "--options", "int8-g32", "--seed", 1)
    assert (ended.code, "--restart" in ended.err) == (2, True)
    assert "s.json.partial was begun as another job: --seed was 0 and is 1" in ended.err
    assert "repeat the earlier command, l4pack measure " in ended.err
    assert l4pack("measure", *command(), "--options", "int8-g32", "--restart").code == 0


def test_bad_inputs_are_one_line_with_a_hint(l4pack, command, artifact, checkpoint, text_file, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox " * 3)
    source = str(checkpoint("scout", **SMALL))
    cases = [
        ([*command(), "--options", "int3"], 2, "'int3' is not an option"),
        ([*command(), "--direct", "some"], 2, "--direct some"),
        ([*command(), "--streams", 0], 2, "--streams 0"),
        ([*command(), "--calibration-samples", 0], 2, "--calibration-samples 0"),
        ([*command(), "--calibration", text_file, "--samples", 99], 2, "not measured on too"),
        ([*command(), "--max-ram", "900MB"], 3, "takes at least"),
        ([source, "--text", short, "--sequence-length", 96, "--out", tmp_path / "x.json"], 2, "too little to measure"),
        ([source, "--out", tmp_path], 2, "is a folder"),
        ([source, "--out", tmp_path / "no" / "x.json"], 2, "a folder that is not there"),
        ([artifact("int4-rtn"), "--text", text_file, "--out", tmp_path / "x.json"], 4, "quantized already"),
        (["llama-4-scout", "--out", tmp_path / "x.json"], 4, ""),
    ]
    for arguments, code, message in cases:
        ended = l4pack("measure", *arguments)
        assert (ended.code, ended.out) == (code, ""), (arguments, ended.err)
        assert message in ended.err, arguments
        assert "hint: " in ended.err, arguments
        assert len(ended.err.strip().splitlines()) == 2, ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


@pytest.mark.parametrize(("sizes", "role"), [
    ({"hidden_size": 192}, Role.ATTENTION),
    ({"hidden_size": 192}, Role.ROUTED_EXPERT),
    ({"intermediate_size": 192}, Role.SHARED_EXPERT),
])  # fmt: skip
def test_an_option_that_no_runtime_serves_at_these_sizes_is_not_measured(checkpoint, sizes, role):
    """Blocks of 128 divide neither 192 inputs nor 192 outputs; the groups of 128 of what comes in don't either."""
    whole, uneven = (open_source(str(checkpoint("scout", **{**SMALL, **text}))).config for text in ({}, sizes))
    assert "int4-g128" in options_for(whole).by_role[role]
    assert ("fp8-block" in options_for(whole).by_role[role]) is (role is not Role.ATTENTION)
    assert not {"fp8-block", "int4-g128"} & set(options_for(uneven).by_role[role])
    assert {"fp8", "int4-g64"} <= set(options_for(uneven).by_role[role])


def test_four_bit_floats_are_measured_where_they_are_named(checkpoint):
    config = open_source(str(checkpoint("maverick", **SMALL))).config
    assert not options_for(config).schemes.keys() & set(NAMED_ONLY)
    named = options_for(config, ("nvfp4", "mxfp4"))
    assert {bits(scheme) for scheme in named.schemes.values()} == {4.5, 4.25}
    assert named.by_role.keys() == {Role.ATTENTION, Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP}
