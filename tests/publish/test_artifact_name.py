"""Names of artifacts: derived ones, good ones, and the tricks that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from publishing import policy_named

from l4pack.errors import LicenceError
from l4pack.publish.names import check_name, derive_name, hub_name_findings, name_findings, suggestion
from l4pack.recipe import load_recipe, recipe_names

RULE = policy_named("llama4").name
SCOUT = "Llama-4-Scout-17B-16E-Instruct"
DERIVED = {
    "int4": "W4A16-g128-mixed",
    "int4-g32": "W4A16-g32-mixed",
    "int4-uniform": "W4A16-g128",
    "int4-rtn": "W4A16-g128",
    "fp8": "FP8-dynamic",
    "fp8-block": "FP8-block",
    "fp8-best": "FP8-dynamic",
    "meta-int4": "W4A16-g128",
    "meta-fp8": "FP8-dynamic",
    "scout-int4-1xh100": "W4A16-g128-mixed",
}


@pytest.mark.parametrize(("recipe", "tag"), DERIVED.items())
def test_names_follow_from_source_and_recipe(recipe, tag):
    assert derive_name(SCOUT, load_recipe(recipe)) == f"{SCOUT}-{tag}"


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_shipped_recipe_gives_a_good_name(recipe):
    for source in (SCOUT, "Llama-4-Maverick-17B-128E-Instruct"):
        check_name(derive_name(source, load_recipe(recipe)), RULE)


@pytest.mark.parametrize("name", ["Llama-4-Scout-W4A16", "Llama4-mine", "Llama", "Llama_4.x", "Llama-4-my-Metal-tuned"])
def test_good_names(name):
    check_name(name, RULE)


BAD = {
    "lower case": ("llama4-scout", "1.b.i"),
    "upper case": ("LLAMA-4-Scout", "1.b.i"),
    "mixed case": ("LLaMA-4", "1.b.i"),
    "another word first": ("My-Llama-4-Scout", "1.b.i"),
    "the company first": ("Meta-Llama-4-Scout", "1.b.i"),
    "the company inside": ("Llama-4-by-Meta", "5.a"),
    "the company in camel case": ("Llama-4-MetaScout", "5.a"),
    "no Llama": ("Scout-W4A16", "1.b.i"),
    "a longer word": ("Llamafied-4", "1.b.i"),
    "a longer word in camel case": ("LlamaX", "1.b.i"),
    "a capital I for the l": ("LIama-4", "1.b.i"),
    "a one for the l": ("L1ama-4", "1.b.i"),
    "a Cyrillic a": ("Ll\u0430ma-4", "1.b.i"),
    "a Cyrillic a behind": ("Llama-4-Sc\u043eut", "1.b.i"),
    "full width": ("\uff2clama-4", "1.b.i"),
    "a zero width space": ("Llama\u200b-4", "1.b.i"),
    "a zero width joiner before": ("\u200dLlama-4", "1.b.i"),
    "right to left": ("\u202eLlama-4", "1.b.i"),
    "an accent": ("Llam\u00e1-4", "1.b.i"),
    "space before": (" Llama-4", "1.b.i"),
    "a folder": ("../Llama-4", "1.b.i"),
    "a slash": ("Llama-4/x", "Hub"),
    "two dashes": ("Llama--4", "Hub"),
    "a dot at the end": ("Llama-4.", "Hub"),
    "a space": ("Llama 4", "Hub"),
    "git": ("Llama-4.git", "Hub"),
    "too long": ("Llama-4-" + "x" * 96, "Hub"),
    "a line break": ("Llama-4\n", "Hub"),
    "nothing": ("", "1.b.i"),
}


@pytest.mark.parametrize(("name", "cited"), BAD.values(), ids=BAD)
def test_bad_names_are_refused_with_the_rule(name, cited):
    with pytest.raises(LicenceError) as caught:
        check_name(name, RULE)
    error = caught.value
    assert error.exit_code == 7
    assert cited in error.message
    assert "--name Llama" in error.hint
    assert error.message.isprintable()


def test_without_a_licence_rule_only_the_hub_has_a_say():
    check_name("tiny-int4", None)
    with pytest.raises(LicenceError, match="no '--'"):
        check_name("tiny--int4", None)


@given(st.text(max_size=120))
def test_a_suggestion_always_meets_the_rules(name):
    proposed = suggestion(name, RULE)
    assert not name_findings(proposed, RULE)
    assert not hub_name_findings(proposed)
