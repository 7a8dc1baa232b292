"""Sizes that runtimes have no kernels for are told at plan, verify and budget, with the degrees that do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import quick_recipe

from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.model import budget
from l4pack.budget.named import open_subject
from l4pack.budget.subject import Subject
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.source import open_folder
from l4pack.errors import RecipeError, UsageError
from l4pack.formats.limits import DEGREES, split_hindrances
from l4pack.plan.plan import Plan, make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, recipe_names
from l4pack.verify.verify import verify_artifact

Make = Callable[..., Path]


def to_come(plan: Plan) -> Subject:
    return Subject("to come", plan.checkpoint.config, plan.tensors, plan.recipe.name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"intermediate_size": 192}, "routed_expert"),
        ({"intermediate_size": 1600}, "1600 outputs"),
        ({"intermediate_size_mlp": 320}, "dense_mlp"),
    ],
)
def test_blocks_that_leave_a_remainder(checkpoint: Make, changes: dict, says: str) -> None:
    kind = "maverick" if "intermediate_size_mlp" in changes else "scout"
    plan = make_plan(open_folder(checkpoint(kind, **changes)), quick_recipe("fp8-block"))
    assert any(text.startswith("vllm") and says in text for text in plan.warnings())
    with pytest.raises(RecipeError, match="no runtime could serve this"):
        plan.check_servable()


def test_every_command_says_so(checkpoint: Make, tmp_path: Path, l4pack: Callable) -> None:
    source = checkpoint("scout", intermediate_size=192)
    for arguments in (("plan", source), ("quantize", source, "--out", tmp_path / "no")):
        ended = l4pack(*arguments, "--recipe", "fp8-block")
        assert ended.code == 2
        assert "no runtime could serve this: vllm" in ended.err
    made = run_plan(make_plan(open_folder(source), quick_recipe("fp8-block")), tmp_path / "artifact").out
    errors = [finding for finding in verify_artifact(made).findings if finding.level == "error"]
    errors = [finding for finding in errors if finding.rule != "companion"]  # the tiny model has no processor
    assert {finding.rule for finding in errors} == {"runtime"}
    assert any("vllm" in finding.message and "192" in finding.message for finding in errors)
    ended = l4pack("budget", made, "--device", "h100", "--context", 512)
    assert ended.code == 2
    assert "does not run at tp 1" in ended.err


def test_degrees_that_do_not_run_are_told_with_those_that_do(checkpoint: Make, tmp_path: Path) -> None:
    plan = make_plan(open_folder(checkpoint("scout", intermediate_size=256)), quick_recipe("fp8-block"))
    made = run_plan(plan, tmp_path / "artifact").out
    host = find_host("8xh100", load_devices())
    for subject in (to_come(plan), open_subject(str(made))):
        assert budget(subject, host, Load(context=512, tp=1)).setting.tp == 1
        with pytest.raises(UsageError, match=r"does not run at tp 4: vllm.* 64 ") as caught:
            budget(subject, host, Load(context=512, tp=4))
        assert caught.value.hint == "tp may be 1, 2"


def test_experts_kept_whole_are_not_split(checkpoint: Make) -> None:
    recipe = quick_recipe("fp8-block").model_dump(mode="json")
    recipe["rules"] = [
        {"roles": ["routed_expert"], "scheme": next(iter(recipe["schemes"]))},
        {"roles": "all", "scheme": "keep"},
    ]
    plan = make_plan(open_folder(checkpoint("scout")), Recipe.model_validate(recipe))
    host = find_host("4xh100", load_devices())
    with pytest.raises(UsageError, match="tp 4"):
        budget(to_come(plan), host, Load(context=512, tp=4))
    assert budget(to_come(plan), host, Load(context=512, tp=4, expert_parallel=True)).setting.tp == 4


SHIPPED = [*((name, "llama-4-scout") for name in recipe_names()), ("fp8-block", "llama-4-maverick")]


@pytest.mark.parametrize(("name", "model"), SHIPPED)
def test_the_shipped_recipes_run_at_every_degree(model: str, name: str) -> None:
    plan = make_plan(open_source(model), quick_recipe(name))
    for tp in DEGREES:
        assert not any(plan.hindrances(tp).values()), (tp, json.dumps(plan.hindrances(tp)))
    assert split_hindrances([], 8, 1) == {}
