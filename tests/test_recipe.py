"""Recipes: the shipped ones mean what their names say, and every mistake in one is named by its key."""

from __future__ import annotations

import re
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from l4pack.checkpoint.open import open_source
from l4pack.datafile import read_yaml
from l4pack.errors import RecipeError
from l4pack.model.tensors import Role
from l4pack.plan.plan import make_plan
from l4pack.recipe import Recipe, Rule, load_recipe, recipe_names

NAMED_IN_THE_DESIGN = {
    "int4", "int4-best", "int4-uniform", "int4-uniform-best", "int4-rtn", "fp8", "fp8-block", "fp8-gptq", "fp8-best", "meta-int4", "meta-fp8", "nvfp4", "nvfp4-w4a4", "mxfp4",
    "scout-int4-1xh100", "scout-fp8-2xh100", "maverick-fp8-8xh100", "maverick-int4-4xh100",
    "scout-nvfp4-1xb200", "maverick-nvfp4-4xb200",
}  # fmt: skip


def test_the_named_recipes_are_shipped():
    assert set(recipe_names()) >= NAMED_IN_THE_DESIGN


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_under_its_own_name_and_plans(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    model = recipe.promise.model if recipe.promise else "llama-4-scout"
    assert make_plan(open_source(model), recipe).artifact_bytes > 10**9


MLP = {Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP}
MEANT = {
    "int4": (MLP, set()), "int4-best": (MLP, set()), "int4-uniform": (MLP, set()), "int4-uniform-best": (MLP, set()), "int4-rtn": (MLP, set()), "fp8": (MLP, set()), "fp8-block": (MLP, set()), "fp8-gptq": (MLP, set()), "fp8-best": (MLP, set()),
    "nvfp4": (MLP, set()), "nvfp4-w4a4": (MLP, set()), "mxfp4": (MLP, set()),
    "meta-int4": ({Role.ROUTED_EXPERT, Role.SHARED_EXPERT}, set()), "meta-fp8": ({Role.ROUTED_EXPERT}, {0, 47}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "meant"), MEANT.items(), ids=MEANT)
@pytest.mark.parametrize("model", ["llama-4-scout", "llama-4-maverick"])
def test_what_the_generic_recipes_quantize(name, meant, model):
    roles, spared = meant
    plan = make_plan(open_source(model), load_recipe(name))
    for linear, scheme in plan.assigned:
        assert (scheme is not None) == (linear.role in roles and linear.layer not in spared), linear.module


BITS = {
    "gguf-q4_k-best": {Role.ROUTED_EXPERT: 4, Role.SHARED_EXPERT: 8, Role.DENSE_MLP: 8, Role.ATTENTION: None},
    "gguf-q4_k": {Role.ROUTED_EXPERT: 4, Role.SHARED_EXPERT: 8, Role.DENSE_MLP: 8, Role.ATTENTION: None},
    "int4-g32": {Role.ROUTED_EXPERT: 4, Role.SHARED_EXPERT: 8, Role.DENSE_MLP: 8, Role.ATTENTION: None},
    "int4": {Role.ROUTED_EXPERT: 4, Role.SHARED_EXPERT: 8, Role.DENSE_MLP: 8, Role.ATTENTION: None},
    "int4-best": {Role.ROUTED_EXPERT: 4, Role.SHARED_EXPERT: 8, Role.DENSE_MLP: 8, Role.ATTENTION: None},
    "int4-uniform": {Role.ROUTED_EXPERT: 4, Role.SHARED_EXPERT: 4, Role.DENSE_MLP: 4, Role.ATTENTION: None},
    "scout-int4-1xh100": {Role.ROUTED_EXPERT: 4, Role.SHARED_EXPERT: 8, Role.DENSE_MLP: 8, Role.ATTENTION: 8},
    "maverick-int4-4xh100": {
        Role.ROUTED_EXPERT: 4,
        Role.SHARED_EXPERT: None,
        Role.DENSE_MLP: None,
        Role.ATTENTION: None,
    },
}


@pytest.mark.parametrize(("name", "bits"), BITS.items(), ids=BITS)
@pytest.mark.parametrize("model", ["llama-4-scout", "llama-4-maverick"])
def test_the_bits_that_int4_recipes_give_each_role(name, bits, model):
    recipe = load_recipe(name)
    for linear, scheme in make_plan(open_source(model), recipe).assigned:
        assert (recipe.schemes[scheme].num_bits if scheme else None) == bits[linear.role], linear.module


def test_promise_recipes_are_their_parent_and_a_promise():
    for name, parent in (("scout-fp8-2xh100", "fp8"), ("maverick-fp8-8xh100", "fp8")):
        own, inherited = load_recipe(name), load_recipe(parent)
        assert own.schemes == inherited.schemes
        assert own.rules == inherited.rules
        assert own.promise is not None
        assert inherited.promise is None


@pytest.mark.parametrize(
    ("layers", "expected"),
    [([0], {0}), ([-1], {3}), ([0, -1], {0, 3}), ([4], set()), ([-4], {0}), ([-5], set()), (None, {0, 1, 2, 3})],
)
def test_layers_count_from_either_end_and_not_around(layers, expected):
    rule = Rule(roles=[Role.ATTENTION], layers=layers, scheme="keep")
    assert {layer for layer in range(4) if rule.matches(Role.ATTENTION, layer, 4)} == expected
    assert not rule.matches(Role.NORM, 0, 4)
    assert rule.matches(Role.ATTENTION, None, 4) is (layers is None)


BASE: dict[str, object] = {
    "name": "mine", "title": "t",
    "schemes": {"a": {"format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 64}},
    "rules": [{"roles": ["routed_expert"], "scheme": "a"}, {"roles": "all", "scheme": "keep"}],
}  # fmt: skip


def scheme(**changes):
    numbers = {**BASE["schemes"]["a"], **changes}
    return {"schemes": {"a": {key: value for key, value in numbers.items() if value is not None}}}


def rules(*values):
    return {"rules": [*values]}


FP8 = {"format": "float-quantized", "num_bits": 8, "type": "float", "group_size": None}
MISTAKES = {
    "unknown key": ({"method": "rtn"}, "method: Extra inputs", "known keys: name, title, schemes"),
    "unknown key in a scheme": (scheme(groupsize=128), r"schemes\.a\.groupsize: Extra inputs", ""),
    "unknown key in a rule": (rules({"role": "all", "scheme": "keep"}), r"rules\.0\.", ""),
    "unknown role": (rules({"roles": ["routed_experts"], "scheme": "a"}), r"rules\.0\.roles", ""),
    "unknown scheme": (rules({"roles": ["routed_expert"], "scheme": "b"}), r"rules\.0\.scheme: 'b' is not one of", ""),
    "unused scheme": (rules({"roles": "all", "scheme": "keep"}), r"schemes\.a: no rule uses it", ""),
    "scheme named keep": ({"schemes": {"keep": BASE["schemes"]["a"]}}, "'keep' is the name for leaving", ""),
    "all quantized": (rules({"roles": "all", "scheme": "a"}), r"rules\.0\.roles: 'all' takes scheme 'keep' only", ""),
    "router quantized": (rules({"roles": ["router"], "scheme": "a"}), "no runtime reads a quantized router", ""),
    "vision quantized": (rules({"roles": ["vision"], "scheme": "a"}), "no runtime reads a quantized vision", ""),
    "empty layers": (rules({"roles": ["routed_expert"], "layers": [], "scheme": "a"}), r"rules\.0\.layers", ""),
    "no rules": ({"rules": []}, "rules: List should have at least 1", ""),
    "no schemes": ({"schemes": {}}, "schemes: Dictionary should have at least 1", ""),
    "no name": ({"name": None}, "name: ", ""),
    "name is a path": ({"name": "../x"}, "name: ", ""),
    "3 bits": (scheme(num_bits=3), r"schemes\.a\.num_bits: Input should be 4 or 8", ""),
    "no bits": (scheme(num_bits=None), r"schemes\.a\.num_bits: Field required", ""),
    "odd group": (scheme(group_size=100), r"schemes\.a\.group_size: Input should be a multiple of 8", ""),
    "huge group": (scheme(group_size=2048), r"schemes\.a\.group_size", ""),
    "negative group": (scheme(group_size=-128), r"schemes\.a\.group_size", ""),
    "group no format holds": (scheme(group_size=256), r"schemes\.a\.group_size: format pack-quantized can't hold 256", r"it takes \[32, 64, 128\]"),
    "group without size": (scheme(group_size=None), r"schemes\.a: strategy 'group' needs a group_size", ""),
    "size without group": (scheme(strategy="channel"), r"schemes\.a: group_size is for 'group'", ""),
    "int4 by tensor": (scheme(strategy="tensor", group_size=None), "integers take strategy group or channel", ""),
    "unknown format": (scheme(format="gguf"), "no format is named 'gguf'", "formats: float-quantized"),
    "fp8 in the int format": (scheme(**{**FP8, "format": "pack-quantized", "strategy": "channel"}), r"schemes\.a\.type: format pack-quantized can't hold float", ""),
    "fp8 in groups": (scheme(**{**FP8, "group_size": 128}), "FP8 takes strategy tensor, channel or block", ""),
    "fp4 by channel": (scheme(**{**FP8, "num_bits": 4, "strategy": "channel"}), r"FP4 takes strategy group \(MXFP4\) or tensor_group \(NVFP4\)", ""),
    "asymmetric fp8": (scheme(**FP8, strategy="channel", symmetric=False), "FP8 is symmetric", ""),
    "block without structure": (scheme(**FP8, strategy="block"), "needs block_structure", ""),
    "block of nothing": (scheme(**FP8, strategy="block", block_structure=[0, 128]), r"schemes\.a\.block_structure", ""),
    "block that slices would cut": (scheme(**FP8, strategy="block", block_structure=[256, 128]), r"block_structure: format float-quantized can't hold \[256, 128\]", ""),
    "block of three": (scheme(**FP8, strategy="block", block_structure=[1, 2, 3]), r"schemes\.a\.block_structure", ""),
    "mse of a tensor": (scheme(**FP8, strategy="tensor", observer="mse"), "observer 'mse' is for finer strategies", ""),
    "int4 with activations": (scheme(activations="dynamic_token"), r"schemes\.a\.activations: format", ""),
    "solving for one scale a matrix": (scheme(**FP8, strategy="tensor", method="gptq"), r"gptq solves no scheme with one scale a matrix.*strategy channel or block", ""),
    "unknown method": (scheme(method="magic"), r"schemes\.a\.method", ""),
    "outputs damped that are not weighed": (scheme(method="gptq", gptq={"output_dampening": 0.1}), r"schemes\.a\.gptq: output_dampening: .*two_sided: true", ""),
    "outputs damped by nothing": (scheme(method="gptq", gptq={"two_sided": True, "output_dampening": 0}), r"schemes\.a\.gptq\.output_dampening", ""),
    "two sides of what is not solved": (scheme(gptq={"two_sided": True}), r"gptq: its options are for method gptq", ""),
    "unknown observer": (scheme(observer="median"), r"schemes\.a\.observer", ""),
    "unknown parent": ({"extends": "int5"}, "extends: no shipped recipe is named 'int5'", "shipped recipes: fp8"),
    "parent is a list": ({"extends": ["int4"]}, "extends: no shipped recipe", ""),
    "promise of nothing": ({"promise": {"model": "x"}}, r"promise\.device: Field required", ""),
    "context of none": ({"promise": {"model": "x", "device": "h100", "context": 0}}, r"promise\.context", ""),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message", "hint"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_by_its_key(tmp_path, change, message, hint):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**BASE, **change}))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(path))
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    if "format is named" not in message:
        assert caught.value.message.startswith("mine.yaml: ")
    assert caught.value.hint
    assert re.search(hint, caught.value.hint)


def test_the_base_of_the_mistakes_is_right(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(BASE))
    assert load_recipe(str(path)).schemes["a"].group_size == 64


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"
NOT_YAML = {
    "alias bomb": (BOMB, "line 2: aliases are not allowed"),
    "repeated key": ("name: a\nname: b\n", "key 'name' appears twice"),
    "repeated key inside": ("schemes:\n  a: {num_bits: 4, num_bits: 8}\n", "line 2: key 'num_bits' appears twice"),
    "code": ("name: !!python/object/apply:os.system [id]\n", "line 1: could not determine a constructor"),
    "half a list": ("rules: [\n", "line 2"),
    "tab": ("a:\n\t- b\n", "line 2"),
    "a list": ("- a\n", "does not hold keys and values"),
    "nothing": ("", "does not hold keys and values"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2|line 3"),
    "deep": ("a: " + "[" * 5_000, "not readable|line"),
    "no truth": ("a: !!bool maybe\n", "not readable as YAML"),
    "no number": ("a: !!int ''\n", "not readable as YAML"),
    "no time": ("a: !!timestamp x\n", "not readable as YAML"),
    "endless number": ("a: " + "9" * 5_000 + "\n", "not readable as YAML"),
    "list as key": ("? [a]\n: b\n", "line 1"),
    "binary": ("\x00", "not readable as YAML|line 1"),
}


@pytest.mark.parametrize(("text", "message"), NOT_YAML.values(), ids=NOT_YAML)
def test_text_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(path))
    assert caught.value.message.startswith(str(path))


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "mine.yaml"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(RecipeError, match="larger than 1,000,000 bytes"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", ["int-4", "scout-int4", "INT4", "no.yaml", "/etc/passwd", ""])
def test_unknown_names_get_a_suggestion(name):
    with pytest.raises(RecipeError, match="no recipe is named") as caught:
        load_recipe(name)
    assert "did you mean" in caught.value.hint


def test_int4_is_suggested_for_a_slip():
    with pytest.raises(RecipeError) as caught:
        load_recipe("int4-rnt")
    assert "did you mean int4-rtn" in caught.value.hint


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_and_nothing_else(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        with suppress(RecipeError):
            assert isinstance(read_yaml(path), dict)


NOTHING_LEFT = {
    "no such layer": rules({"roles": ["routed_expert"], "layers": [90], "scheme": "a"}, *BASE["rules"][1:]),
    "role of another model": rules({"roles": ["dense_mlp"], "scheme": "a"}, *BASE["rules"][1:]),
    "taken by the rule before": rules(
        BASE["rules"][0], {"roles": ["routed_expert"], "layers": [1], "scheme": "keep"}, BASE["rules"][1]
    ),
    "taken by all": rules({"roles": "all", "scheme": "keep"}, BASE["rules"][0]),
}


@pytest.mark.parametrize("change", NOTHING_LEFT.values(), ids=NOTHING_LEFT)
def test_a_rule_that_decides_nothing_is_an_error(change):
    recipe = Recipe.model_validate({**BASE, **change})
    with pytest.raises(RecipeError, match=r"rules\.[01] matches no tensor of this model"):
        make_plan(open_source("llama-4-scout"), recipe)


def test_a_role_that_the_model_lacks_may_stand_beside_one_that_it_has():
    alone = Recipe.model_validate({**BASE, **NOTHING_LEFT["role of another model"]})
    with pytest.raises(RecipeError) as caught:
        make_plan(open_source("llama-4-scout"), alone)
    assert caught.value.hint.startswith("this model has no dense_mlp: name it in one rule with another role")
    beside = rules({"roles": ["shared_expert", "dense_mlp"], "scheme": "a"}, *BASE["rules"][1:])
    make_plan(open_source("llama-4-scout"), Recipe.model_validate({**BASE, **beside}))


def test_every_tensor_needs_a_rule():
    recipe = Recipe.model_validate({**BASE, **rules(BASE["rules"][0])})
    with pytest.raises(RecipeError, match=r"no rule speaks of language_model\.model\.embed_tokens\.weight"):
        make_plan(open_source("llama-4-scout"), recipe)


def test_a_group_that_does_not_divide(checkpoint):
    source = open_source(str(checkpoint("scout", intermediate_size=96)))
    with pytest.raises(RecipeError, match=r"schemes\.int4\.group_size 128 does not divide the 96 input features of "):
        make_plan(source, load_recipe("int4-rtn"))


def test_the_digest_follows_the_meaning_and_not_the_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(BASE))
    first = load_recipe(str(path)).digest()
    path.write_text("# a note\n" + yaml.safe_dump({**BASE, **scheme(symmetric=True)}, sort_keys=False))
    assert load_recipe(str(path)).digest() == first
    path.write_text(yaml.safe_dump({**BASE, **scheme(observer="mse")}))
    assert load_recipe(str(path)).digest() != first
