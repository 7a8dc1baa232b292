"""Artifacts that mix schemes by role and by layer, drawn with seeds: every reader gives each module its own scheme.

What vLLM's loader makes of such mixes is in test_vllm_loader.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quick_plan
from mixes import SCHEMES, WEIGHT_ONLY, draw_mix, matrix_layers
from publishing import policy_named
from upstream import decompressed, load, logits, reference

from l4pack.artifact.mixture import recipe_tag, scheme_layers, scheme_text
from l4pack.artifact.quantized import Quantization
from l4pack.budget.named import open_subject
from l4pack.checkpoint.open import open_source
from l4pack.model.config import known_config
from l4pack.model.tensors import Role
from l4pack.plan.plan import make_plan
from l4pack.publish.names import check_name, derive_name
from l4pack.quantize.run import run_plan
from l4pack.recipe import KEEP, Recipe
from l4pack.stream.weights import Weights
from l4pack.verify.verify import verify_artifact

KINDS = ["scout", "maverick", "text"]
CASES = [(kind, seed, only) for kind in KINDS for seed, only in ((0, None), (1, None), (2, WEIGHT_ONLY))]
IDS = [f"{kind}-{seed}" for kind, seed, _ in CASES]
SOURCE = {"dtype": "float32", "seed": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mixed(checkpoint, tmp_path_factory):
    """The plan and the artifact of a drawn mix, each made once."""
    made: dict[Any, Any] = {}

    def make(kind, seed, only):
        if (kind, seed) not in made:
            source = checkpoint(kind, **SOURCE)
            if kind != "text":
                (source / "preprocessor_config.json").write_text('{"image_processor_type": "Llama4ImageProcessorFast"}')
            opened = open_source(str(source))
            plan = make_plan(opened, draw_mix(seed, matrix_layers(opened.layout), only).keeping(float32=True))
            made[kind, seed] = plan, run_plan(plan, tmp_path_factory.mktemp("mixed") / f"{kind}-{seed}").out
        return made[kind, seed]

    return make


@pytest.mark.parametrize(("kind", "seed", "only"), CASES, ids=IDS)
def test_what_was_planned_is_written_verified_and_budgeted(mixed, kind, seed, only):
    plan, out = mixed(kind, seed, only)
    assert sum(path.stat().st_size for path in out.iterdir()) == plan.artifact_bytes
    assert open_subject(str(out)).weight_bytes == plan.weight_bytes
    for against in (None, plan.checkpoint):
        result = verify_artifact(out, against)
        assert result.ok, result.findings
    assert result.checked.tally.within_half_step == result.checked.tally.matrices_compared


@pytest.mark.parametrize(("kind", "seed", "only"), CASES, ids=IDS)
def test_transformers_gives_every_module_its_own_scheme(mixed, kind, seed, only):
    plan, out = mixed(kind, seed, only)
    dense = decompressed(out)
    assert set(dense) == {linear.module for linear, scheme in plan.assigned if scheme}
    model = load(out, kind)
    answers = logits(model)
    held = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(torch.equal(held[module], weight) for module, weight in dense.items())
    if only is WEIGHT_ONLY:  # otherwise transformers rounds activations too
        expected = logits(reference(Path(plan.checkpoint.name), kind, dense))
        torch.testing.assert_close(answers, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "seed", "only"), CASES, ids=IDS)
def test_evaluation_reads_what_compressed_tensors_reads(mixed, kind, seed, only):
    plan, out = mixed(kind, seed, only)
    dense = decompressed(out)
    schemes = {linear.module: plan.recipe.schemes[name] for linear, name in plan.assigned if name}
    with Weights(open_source(str(out)), torch.device("cpu"), torch.float32) as weights:
        for module, linear in weights.linears(dense).items():
            torch.testing.assert_close(linear.weight, dense[module], rtol=1e-6, atol=1e-7)
            assert (linear.activations is not None) is (schemes[module].activations != "none")


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_a_calibrated_mix_by_layer(checkpoint, kind):
    """GPTQ at two sizes, in some layers only, beside rounded and kept matrices and fixed activation scales."""
    gptq = {"method": "gptq", "gptq": {"sweeps": 1}}
    fixed = {"format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "tensor"}
    values = {
        "name": "calibrated-mix",
        "title": "t",
        "schemes": {
            "a": {**SCHEMES["int4-g128"], **gptq},
            "b": {**SCHEMES["int4-g32"], **gptq},
            "c": {**SCHEMES["int8-channel"], **gptq},
            "d": {**fixed, "activations": "static_tensor"},
            "e": SCHEMES["int8-g64"],
        },
        "rules": [
            {"roles": ["routed_expert"], "layers": [1], "scheme": "a"},
            {"roles": ["routed_expert"], "layers": [2], "scheme": KEEP},
            {"roles": ["routed_expert"], "scheme": "b"},
            {"roles": ["shared_expert"], "layers": [-1], "scheme": "c"},
            {"roles": ["shared_expert", "dense_mlp"], "scheme": "d"},
            {"roles": ["attention"], "layers": [0, 2], "scheme": "e"},
            {"roles": "all", "scheme": KEEP},
        ],
        "calibration": {"samples": 2, "sequence_length": 48, "max_cold_experts": 1.0, "max_fallbacks": 1.0},
    }
    if kind == "maverick":  # its routed experts are in layers 1 and 3
        del values["rules"][1]
    source = checkpoint(kind, **SOURCE)
    plan = quick_plan(source, Recipe.model_validate(values))
    out = run_plan(plan, source.parent / f"{kind}-calibrated").out
    result = verify_artifact(out, plan.checkpoint)
    assert [finding for finding in result.findings if finding.level == "error" and finding.rule != "companion"] == []
    model = load(out, kind)
    assert torch.isfinite(logits(model)).all()
    held = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(torch.equal(held[module], weight) for module, weight in decompressed(out).items())


def test_a_group_that_names_a_module_comes_before_one_for_the_class():
    numbers = {"type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {**numbers, "num_bits": 4, "group_size": 128}},
        "group_1": {"targets": [r"re:.*shared_expert\..*"], "weights": {**numbers, "num_bits": 8, "group_size": 32}},
    }
    stanza = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    read = Quantization(stanza)
    module = "model.layers.0.feed_forward.{}.gate_proj".format
    assert read.scheme(module("shared_expert")).scheme.weights.num_bits == 8
    assert read.scheme(module("experts.0")).scheme.weights.num_bits == 4


@pytest.mark.parametrize("model", ["llama-4-scout", "llama-4-maverick"])
def test_the_words_for_a_mix_say_what_the_plan_does(model):
    opened, config = open_source(model), known_config(model)
    for seed in range(5):
        recipe = draw_mix(seed, matrix_layers(opened.layout))
        said = scheme_layers(recipe, config)
        for linear, scheme in make_plan(opened, recipe).assigned:
            assert linear.layer in said[linear.role][scheme or KEEP]
        assert (Role.DENSE_MLP in said) is (model == "llama-4-maverick")
        check_name(derive_name("Llama-4-Scout-17B-16E-Instruct", recipe), policy_named("llama4").name)


def _recipe(*rules: dict[str, Any]) -> Recipe:
    used = {rule["scheme"] for rule in rules}
    values = {"name": "m", "title": "t", "schemes": {name: SCHEMES[name] for name in sorted(used)}}
    return Recipe.model_validate({**values, "rules": [*rules, {"roles": "all", "scheme": KEEP}]})


def test_layers_are_named_in_runs_of_those_that_the_role_has():
    recipe = _recipe(
        {"roles": ["routed_expert"], "layers": [1, 3, 5, 9, 47], "scheme": "int8-g32"},
        {"roles": ["routed_expert"], "scheme": "int4-g64"},
    )
    layers = scheme_layers(recipe, known_config("llama-4-maverick"))[Role.ROUTED_EXPERT]
    assert scheme_text(recipe, layers) == "W8A16-g32 in layers 1-5, 9, 47; W4A16-g64 in layers 7, 11-45"


def test_a_name_is_that_of_the_scheme_most_weights_have():
    few = {"roles": ["routed_expert"], "layers": [0], "scheme": "int8-g32"}
    most = {"roles": ["routed_expert"], "scheme": "int4-g64"}
    assert recipe_tag(_recipe(few, most)) == "W4A16-g64-mixed"
    assert recipe_tag(_recipe({"roles": ["attention"], "scheme": "fp8"}, most)) == "W4A16-g64-mixed"
    assert recipe_tag(_recipe({"roles": ["attention"], "scheme": "int4-g64"}, most)) == "W4A16-g64"


def test_the_manifest_holds_the_whole_mix(mixed):
    plan, out = mixed(*CASES[0])
    manifest = json.loads((out / "l4pack-manifest.json").read_text())
    assert Recipe.model_validate(manifest["recipe"]) == plan.recipe
