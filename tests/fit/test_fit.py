"""Fitting a model: bytes as counted, budgets kept to the byte, every constraint checked by other code, stand-ins, recipes."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_fit import broken_rules
from synthetic_sensitivity import OPTIONS, synthetic

from l4pack.artifact.original import weights_digest
from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.load import Load
from l4pack.budget.model import budget
from l4pack.budget.named import planned
from l4pack.checkpoint.open import open_source
from l4pack.errors import BudgetError, SourceError, UsageError
from l4pack.fit.budgets import Wish
from l4pack.fit.fit import fit
from l4pack.fit.losses import _spread, losses_for
from l4pack.fit.recipe import recipe_name
from l4pack.fit.record import fit_record
from l4pack.fit.solve import CostLimit, select, total
from l4pack.formats.known import load_format
from l4pack.formats.limits import LocalMatrix, hindrances
from l4pack.measure.record import ChangeRecord, ModelId
from l4pack.model.tensors import Role
from l4pack.plan.plan import make_plan
from l4pack.recipe import KEEP, RecipeScheme, load_recipe

RUNTIMES = ["vllm", "sglang", "transformers", "any"]
KNOWN = ["llama-4-scout", "llama-4-maverick"]


@pytest.fixture(scope="module")
def scout(checkpoint):
    return open_source(str(checkpoint("scout")))


@pytest.fixture(scope="module")
def maverick(checkpoint):
    return open_source(str(checkpoint("maverick")))


def plan_of(fitted, source, tmp_path):
    """The plan of the recipe as `quantize` would read it from its file."""
    file = tmp_path / "fit.yaml"
    file.write_text(fitted.recipe_text)
    recipe = load_recipe(str(file))
    assert recipe == fitted.recipe
    return make_plan(source, recipe)


def sizes_of(source, sensitivity, runtime="vllm"):
    """Artifact bytes of the smallest artifact and of a rather large one."""
    with pytest.raises(BudgetError) as caught:
        fit(source, sensitivity, Wish(max_bytes=1, runtime=runtime))
    least = int(caught.value.hint.split()[1])
    return least, fit(source, sensitivity, Wish(bits=15.9, runtime=runtime)).artifact_bytes


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["scout", "maverick", "text"])
def test_every_solution_satisfies_every_constraint(checkpoint, kind, runtime, tmp_path):
    source = open_source(str(checkpoint(kind)))
    for seed, bits in enumerate((6.2, 8.5, 11.0)):
        fitted = fit(source, synthetic(source, seed=seed, noise=1e-5), Wish(bits=bits, runtime=runtime))
        plan = plan_of(fitted, source, tmp_path)
        assert broken_rules(plan, runtime) == []
        assert plan.weight_bytes == fitted.weight_bytes
        assert plan.artifact_bytes == fitted.artifact_bytes
        quantizable = sum(linear.numel for linear, _ in plan.assigned)
        stored = sum(
            tensor.nbytes
            for tensor in plan.tensors
            if tensor.role in (Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP, Role.ATTENTION)
        )
        assert 8 * stored / quantizable == pytest.approx(fitted.bits)
        assert fitted.bits <= bits


def test_the_reference_checker_sees_what_it_should(scout):
    recipe = load_recipe("int4-rtn")
    kinds = {
        "int8": ("sglang", "permute"),
        "int4-asym": ("vllm", "zero points"),
        "fp8-block": ("vllm", "blocks"),
    }
    for name, (runtime, says) in kinds.items():
        changed = recipe.model_validate(
            {
                "name": "x", "title": "x", "schemes": {name: OPTIONS[name]},
                "rules": [{"roles": ["attention"], "scheme": name}, {"roles": "all", "scheme": KEEP}],
            }
        )  # fmt: skip
        assert any(says in text for text in broken_rules(make_plan(scout, changed), runtime)), name
    assert broken_rules(make_plan(scout, recipe), "any") == []


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 5))
def test_all_files_are_within_max_bytes(checkpoint, share, seed):
    source = open_source(str(checkpoint("maverick")))
    sensitivity = synthetic(source, seed=seed)
    least, most = sizes_of(source, sensitivity)
    bound = least + int(share * (most - least))
    fitted = fit(source, sensitivity, Wish(max_bytes=bound))
    plan = make_plan(source, fitted.recipe)
    assert plan.artifact_bytes == fitted.artifact_bytes <= bound
    assert plan.weight_bytes == fitted.weight_bytes


def test_more_bytes_never_predict_worse(scout):
    """At steps finer than what headers say of one tensor, too."""
    sensitivity = synthetic(scout, seed=3)
    least, most = sizes_of(scout, sensitivity)
    bounds = [least + step * 97 for step in range(8)] + [least + (most - least) * step // 6 for step in range(7)]
    found = [fit(scout, sensitivity, Wish(max_bytes=bound)) for bound in sorted(bounds)]
    worth = 1e-6 * sum(max(choice.kl for choice in unit.choices) for unit in found[0].units)
    for smaller, larger in pairwise(found):
        assert larger.solution.loss <= smaller.solution.loss + worth
    assert found[0].solution.loss > 2 * found[-1].solution.loss


def test_the_smallest_budget_named_can_be_met_and_one_byte_less_cannot(maverick):
    sensitivity = synthetic(maverick)
    least, _ = sizes_of(maverick, sensitivity)
    assert fit(maverick, sensitivity, Wish(max_bytes=least)).artifact_bytes <= least
    with pytest.raises(BudgetError, match="the smallest artifact that the runtime can load is"):
        fit(maverick, sensitivity, Wish(max_bytes=least - 1))
    with pytest.raises(BudgetError, match="bits a weight; the budget is 2") as caught:
        fit(maverick, sensitivity, Wish(bits=2))
    assert fit(maverick, sensitivity, Wish(bits=float(caught.value.hint.split()[1]))).bits <= 6


def test_the_frontier_beats_every_uniform_recipe_at_its_size(scout):
    for seed in range(3):
        fitted = fit(scout, synthetic(scout, seed=seed, noise=1e-5), Wish(bits=6))
        losses = [[choice.kl for choice in unit.choices] for unit in fitted.units]
        sizes = [[choice.nbytes for choice in unit.choices] for unit in fitted.units]
        fixed = fitted.weight_bytes - total(sizes, fitted.solution.picks)
        assert {point.name for point in fitted.uniform} >= {"int4", "fp8", "int8", KEEP}
        for point in fitted.uniform:
            best = select(losses, sizes, [CostLimit(sizes, point.nbytes - fixed)])
            assert best.loss <= point.kl + 1e-6 * sum(map(max, losses))
            drawn = min(one.kl for one in fitted.frontier if one.nbytes <= point.nbytes)
            assert drawn <= point.kl
        for smaller, larger in pairwise(fitted.frontier):
            assert smaller.nbytes < larger.nbytes
            assert smaller.kl > larger.kl
        assert fitted.frontier[-1].kl == 0
        assert len(fitted.frontier) >= 12


def test_steps_say_what_bytes_buy(scout):
    fitted = fit(scout, synthetic(scout), Wish(bits=7))
    kl = {point.name: point.kl for point in fitted.steps}
    assert set(kl) == {"-1 %", "+1 %", "+2 %", "+4 %"}
    assert kl["-1 %"] >= fitted.solution.loss >= kl["+1 %"] >= kl["+2 %"] >= kl["+4 %"]
    assert kl["-1 %"] > kl["+4 %"]


@pytest.mark.parametrize(
    ("name", "wish"),
    [
        ("llama-4-scout", Wish(max_bytes=66 * 10**9)),
        ("llama-4-scout", Wish(device="h100", context=32768, kv_dtype="fp8")),
        ("llama-4-maverick", Wish(max_bytes=250 * 10**9)),
        ("llama-4-maverick", Wish(device="4xh100", context=131072)),
    ],
    ids=["scout", "scout-h100", "maverick", "maverick-4xh100"],
)
def test_real_shapes_take_seconds(name, wish, tmp_path):
    source = open_source(name)
    sensitivity = synthetic(source)
    started = time.process_time()
    fitted = fit(source, sensitivity, wish)
    assert time.process_time() - started < 30  # seconds of the processor: about 4 on a quiet machine
    assert fitted.solution.optimal
    plan = plan_of(fitted, source, tmp_path)
    assert plan.weight_bytes == fitted.weight_bytes
    assert broken_rules(plan, "vllm", tp=int(wish.device[0]) if wish.device and wish.device[0].isdigit() else 1) == []
    if wish.max_bytes:
        assert 0.995 * wish.max_bytes < plan.artifact_bytes <= wish.max_bytes
    else:
        load = Load(context=wish.context, kv_dtype=wish.kv_dtype or "auto")
        subject = planned(source, str(tmp_path / "fit.yaml"))
        found = budget(subject, find_host(wish.device, load_devices()), load)
        assert 0 <= found.headroom_bytes == fitted.memory.headroom_bytes < 2**30
        assert fitted.recipe.promise.device == wish.device
        assert fitted.recipe.promise.context == wish.context


def test_a_device_that_is_too_small_says_what_would_do():
    source = open_source("llama-4-scout")
    sensitivity = synthetic(source)
    with pytest.raises(BudgetError, match=r"of each h100; 1 x 10,000,000 tokens leave nothing for weights") as caught:
        fit(source, sensitivity, Wish(device="h100", context=10_000_000))
    context = int(caught.value.hint.partition("--context ")[2].split()[0])
    assert fit(source, sensitivity, Wish(device="h100", context=context)).memory.fits
    with pytest.raises(BudgetError, match=r"takes .* GiB of each l40s; .* leave"):
        fit(source, sensitivity, Wish(device="l40s", context=1024))


def test_pipeline_stages_and_runtimes_that_unpack():
    """transformers spreads layers over GPUs and unpacks weights: quantizing does not make the model smaller there."""
    source = open_source("llama-4-scout")
    with pytest.raises(UsageError, match="meets the budget as it is"):
        fit(source, synthetic(source), Wish(device="8xh200", context=1024, runtime="transformers"))
    with pytest.raises(BudgetError, match="leave"):
        fit(source, synthetic(source), Wish(device="h100", context=1024, runtime="transformers"))


def test_what_needs_no_quantizing_is_said(scout):
    with pytest.raises(UsageError, match="meets the budget as it is"):
        fit(scout, synthetic(scout), Wish(bits=16.5))


def test_quantized_sources_are_refused(artifact):
    source = open_source(str(artifact("int4-rtn")))
    with pytest.raises(SourceError, match="quantized already"):
        fit(source, synthetic(open_source("demo")), Wish(bits=5))


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (Wish(), "one budget: none is given"),
        (Wish(bits=4, max_bytes=5), "--max-bytes and --bits"),
        (Wish(bits=4, runtime="ollama"), "no runtime is named 'ollama'"),
        (Wish(bits=4, by="expert"), "nothing can be fitted by expert"),
        (Wish(bits=0), "0 bits a weight is no budget"),
        (Wish(bits=float("nan")), "nan bits a weight is no budget"),
        (Wish(bits=4, context=5), "--context goes with --device"),
        (Wish(device="h1000"), "no device is named 'h1000'"),
        (Wish(device="h100", context=10**9), "beyond the model's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wishes_that_make_no_sense(scout, wish, says):
    with pytest.raises(UsageError, match=says):
        fit(scout, synthetic(scout), wish)


def test_a_record_of_nothing_usable(scout):
    record = synthetic(scout, options=("int4-asym",))
    with pytest.raises(UsageError, match=r"no option is left for any part of .*: [a-z]+ [0-9.]+ "):
        fit(scout, record, Wish(bits=5, runtime="any"))


def test_runtimes_leave_out_what_they_can_not_load(scout):
    left_out = {
        runtime: set(fit(scout, synthetic(scout), Wish(bits=8, runtime=runtime)).left_out) for runtime in RUNTIMES
    }
    attention = {(name, Role.ATTENTION) for name in OPTIONS}
    assert left_out["sglang"] >= attention
    assert left_out["vllm"] >= {("int4-asym", Role.ATTENTION), ("fp8-block", Role.ATTENTION)}
    assert ("fp8-plain", Role.ROUTED_EXPERT) in left_out["vllm"]
    assert ("int8", Role.ATTENTION) not in left_out["vllm"]
    asymmetric = {("int4-asym", role) for role in (Role.ATTENTION, Role.SHARED_EXPERT, Role.ROUTED_EXPERT)}
    assert left_out["transformers"] == asymmetric
    assert left_out["any"] == left_out["vllm"] | left_out["sglang"] | left_out["transformers"]


@pytest.mark.parametrize(
    ("name", "columns", "rows", "projection", "says"),
    [
        ("int4", 1024, 5120, "down_proj", None),
        ("int4", 64, 5120, "down_proj", "whole groups"),
        ("int4-g32", 64, 5120, "down_proj", None),
        ("int4-asym", 1024, 12, "down_proj", "zero points on each GPU"),
        ("int4-asym", 1024, 16, "down_proj", None),
        ("int4-g32", 96, 1024, "gate_proj", "hidden size"),
        ("fp8-block", 5120, 192, "gate_proj", "output rows"),
        ("fp8-block", 192, 5120, "down_proj", "input columns"),
        ("fp8", 192, 200, "down_proj", None),
    ],
)
def test_sizes_on_each_gpu(name, columns, rows, projection, says):
    scheme = RecipeScheme.model_validate(OPTIONS[name])
    spec = load_format(scheme.format)
    found = hindrances(
        spec, scheme, Role.ROUTED_EXPERT, [LocalMatrix(projection, rows, columns)], ["vllm"], weight_only=False
    )
    assert [says in text for text in found] == ([True] if says else [])


def test_a_runtime_that_does_not_read_a_format():
    scheme = RecipeScheme.model_validate(OPTIONS["fp8"])
    found = hindrances(load_format(scheme.format), scheme, Role.DENSE_MLP, [], ["mlx"], weight_only=True)
    assert found == ["mlx does not read float-quantized"]


def test_noise_buys_nothing(scout):
    """Equal losses take the fewest bytes; a loss that falls as the error grows is pooled; below nothing is nothing."""
    record = synthetic(scout, options=("int4", "fp8", "int8"))

    def change(one, option, error, kl):
        return one.model_copy(update={"option": option, "error": error, "kl": kl, "kl_standard_error": 1e-3})

    firsts = [one for one in record.changes if one.option == "int4"]
    changes = [
        change(one, option, error, kl)
        for one in firsts
        for option, error, kl in (("int4", 0.02, 3e-4), ("fp8", 0.001, 5e-4), ("int8", 1e-5, -2e-4))
    ]
    losses = losses_for(scout, record.model_copy(update={"changes": changes}))
    for found in losses.kl.values():
        assert found == pytest.approx({"int8": 0.0, "fp8": 4e-4, "int4": 4e-4})
    fitted = fit(scout, record.model_copy(update={"changes": changes}), Wish(bits=15))
    chosen = {unit.choices[pick].option for unit, pick in zip(fitted.units, fitted.solution.picks, strict=True)}
    assert chosen == {"int8"}  # never keep, which loses as little and takes more
    assert fitted.solution.loss == 0


def test_a_stand_in_is_carried_over_by_depth_and_keeps_its_sums(scout, maverick):
    record = synthetic(maverick, options=("int4", "int8"))
    own, carried = losses_for(maverick, record), losses_for(scout, record)
    assert (own.stand_in, carried.stand_in) == (False, True)
    for role in (Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.ATTENTION):
        for option in ("int4", "int8"):
            sums = [sum(kl[option] for key, kl in found.kl.items() if key[1] is role) for found in (own, carried)]
            assert sums[0] == pytest.approx(sums[1])
    assert {role for _, role in carried.kl} == {Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.ATTENTION}
    fitted = fit(scout, record, Wish(bits=7))
    assert "stand-in" in fitted.recipe.title
    assert "stand-in" in fitted.recipe_text


def test_what_a_stand_in_did_not_measure_is_kept(scout, maverick):
    fitted = fit(maverick, synthetic(scout), Wish(bits=9))
    dense = {unit.choices[pick].option for unit, pick in zip(fitted.units, fitted.solution.picks, strict=True)
             if unit.role is Role.DENSE_MLP}  # fmt: skip
    assert dense == {KEEP}
    assert fitted.left_out["every option", Role.DENSE_MLP] == ("not measured",)


def test_with_a_stand_in_all_layers_of_a_role_get_the_same(scout, maverick):
    record = synthetic(maverick, seed=3, noise=1e-4)
    fitted = fit(scout, record, Wish(bits=7))
    assert fitted.by == "role"
    assert len({unit.role for unit in fitted.units}) == len(fitted.units) == 3
    assert all("layers" not in rule for rule in fitted.recipe.model_dump(exclude_none=True)["rules"])
    freer = fit(scout, record, Wish(bits=7, by="layer"))
    assert freer.by == "layer"
    assert freer.solution.loss <= fitted.solution.loss


@pytest.mark.parametrize("wish", [Wish(bits=7), Wish(max_bytes=1_500_000), Wish(device="h100", context=1024)])
def test_roles_as_one_are_counted_as_their_layers_are(maverick, wish, tmp_path):
    record = synthetic(maverick, seed=5, noise=1e-4)
    wish = replace(wish, by="role")
    fitted = fit(maverick, record, wish)
    plan = plan_of(fitted, maverick, tmp_path)
    assert plan.weight_bytes == fitted.weight_bytes
    layered = fit_record(fitted).choice
    assert sum(one.kl for one in layered) == pytest.approx(fitted.solution.loss)
    assert {(one.layer, one.role) for one in layered} == {(key[0], key[1].value) for key in fitted.losses.kl}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=9), st.integers(1, 60))
def test_spreading_keeps_the_sum_and_the_order(values, count):
    found = _spread(values, count)
    assert len(found) == count
    assert sum(found) == pytest.approx(sum(values), abs=1e-9)
    assert min(found) >= 0
    larger = _spread([2 * value for value in values], count)
    assert larger == pytest.approx([2 * value for value in found], abs=1e-9)


def test_spreading_over_as_many_layers_changes_nothing():
    assert _spread([3.0, 1.0, 2.0], 3) == pytest.approx([3.0, 1.0, 2.0])
    assert _spread([3.0, 1.0], 4) == pytest.approx([1.5, 1.5, 0.5, 0.5])
    assert _spread([4.0, 2.0, 2.0, 4.0], 2) == pytest.approx([6.0, 6.0])


def test_other_weights_of_the_same_shape_are_a_stand_in(checkpoint):
    first, second = (open_source(str(checkpoint("scout", seed=seed))) for seed in (0, 1))
    record = synthetic(first)
    known = record.model_copy(update={"model": record.model.model_copy(update={"weights": weights_digest(first)})})
    assert weights_digest(first) != weights_digest(second)
    assert [losses_for(source, known).stand_in for source in (first, second)] == [False, True]
    assert [losses_for(source, record).stand_in for source in (first, second)] == [False, False]


def test_a_source_on_the_hub_is_not_fetched_to_be_told_from_another(scout):
    class Untouched:
        def path(self, file):
            raise AssertionError(f"{file} was asked for")

    record = synthetic(scout)
    named = record.model_copy(update={"model": record.model.model_copy(update={"weights": "another's"})})
    assert losses_for(scout, named).stand_in
    assert not losses_for(replace(scout, store=Untouched()), named).stand_in


def test_the_same_question_gets_the_same_bytes(scout):
    texts = {fit(scout, synthetic(scout), Wish(bits=6.5)).recipe_text for _ in range(3)}
    assert len(texts) == 1


def test_recipes_name_layers_only_where_they_differ(scout):
    record = synthetic(scout, options=("int4", "int8"))
    flat = [one.model_copy(update={"kl": 0.1 if one.option == "int4" else 0.0}) for one in record.changes]
    recipe = fit(scout, record.model_copy(update={"changes": flat}), Wish(bits=9)).recipe
    assert [(rule.roles, rule.layers, rule.scheme) for rule in recipe.rules] == [
        ([Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.ATTENTION], None, "int8"),
        ("all", None, KEEP),
    ]
    assert recipe.calibration is None


@pytest.mark.parametrize(("stem", "name"), [("fit", "fit"), ("My Fit!", "my-fit"), ("..", "fit"), ("a" * 99, "a" * 64)])
def test_names_of_recipes(stem, name):
    assert recipe_name(stem) == name


def test_names_from_outside_stay_in_their_comment(scout):
    record = synthetic(scout, model=ModelId(name="x\nname: evil\x1b[31m", fingerprint="0", layers=4))
    text = fit(scout, record, Wish(bits=6)).recipe_text
    assert "\nname: evil" not in text
    assert "\x1b" not in text


def test_changes_of_layers_that_are_not_there(scout):
    record = synthetic(scout)
    extra = ChangeRecord(layer=9, role=Role.ATTENTION, option="int8", error=0, kl=0, kl_standard_error=0, measured=True)
    more = record.model_copy(update={"changes": [*record.changes, extra]})
    assert (9, Role.ATTENTION) not in losses_for(scout, more).kl


def test_a_wish_is_told_in_words():
    assert Wish(max_bytes=65 * 10**9).words() == "65,000,000,000 bytes"
    assert Wish(bits=4.5).words() == "4.5 bits a weight"
    assert replace(Wish(device="h100"), context=4096, sequences=2).words() == "h100, 2 x 4,096 tokens"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda record: {"options": {**record.options, "int4": RecipeScheme.model_construct(**{
            **dict(record.options["int4"]), "group_size": 16})}}, r"options\.int4\.group_size: .* can't hold 16"),
        (lambda record: {"options": {**record.options, "int4": record.options["int4"].model_copy(
            update={"format": "gguf"})}}, "no format is named 'gguf'"),
        (lambda record: {"options": {**record.options, KEEP: record.options["int8"]}}, "'keep' names the original"),
        (lambda record: {"changes": [record.changes[0].model_copy(update={"kl": 1e300})]}, "1e\\+300 nats is no measurement"),
    ],
    ids=["group", "format", "keep", "kl"],
)  # fmt: skip
def test_records_that_no_measurement_writes(scout, change, says):
    record = synthetic(scout)
    with pytest.raises(UsageError, match=says):
        fit(scout, record.model_copy(update=change(record)), Wish(bits=6))
