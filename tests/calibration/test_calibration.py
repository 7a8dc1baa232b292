"""Calibration: the moments it gathers, the rows it lends to thin experts, and what an artifact records of it."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import build
from safetensors.torch import load_file
from spoil import SPOILS
from transformers import AutoModelForImageTextToText

from l4pack.artifact.calibration_record import RECORD_NAME
from l4pack.calibration.coverage import Coverage
from l4pack.calibration.moments import Moments
from l4pack.calibration.rows import BORROWED_WEIGHT, expert_rows
from l4pack.calibration.text import with_text
from l4pack.calibration.written_units import WrittenUnits
from l4pack.checkpoint.open import open_source
from l4pack.errors import BudgetError, QualityError, RecipeError, SourceError, UsageError
from l4pack.plan.plan import RunLimits, make_plan
from l4pack.quant import gptq
from l4pack.quant.two_sided_gptq import NOT_SOLVED
from l4pack.quantize.run import run_plan
from l4pack.recipe import GptqOptions, Recipe, load_recipe
from l4pack.stream.layer import LayerPass, Routing
from l4pack.stream.walk import Walk

SAMPLES, LENGTH = 6, 96
LITTLE = ("--calibration-samples", SAMPLES, "--sequence-length", LENGTH, "--json")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products are quicker with one thread, and the same bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(5)
    words = ["".join(chr(97 + int(c)) for c in torch.randint(0, 26, (5,), generator=generator)) for _ in range(400)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return path


def recipe(calibration: dict[str, object] | None = None, **options: object) -> Recipe:
    """Every MLP solved in Int4."""
    values = load_recipe("int4").model_dump()
    values["schemes"] = {"int4": values["schemes"]["int4"]}
    values["rules"] = [
        {"roles": ["routed_expert", "shared_expert", "dense_mlp"], "scheme": "int4"},
        {"roles": "all", "scheme": "keep"},
    ]
    values["schemes"]["int4"]["gptq"].update(options)
    values["calibration"].update(samples=SAMPLES, sequence_length=LENGTH, **(calibration or {}))
    return Recipe.model_validate(values)


def planned(source: Path, text: Path, **changes: object):
    return with_text(make_plan(open_source(str(source)), recipe(**changes)), str(text))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("calibrated") / "tiny-maverick", "maverick")


@pytest.fixture(scope="module")
def made(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory):
    """A plan and its artifact."""
    plan = planned(source, text)
    return plan, run_plan(plan, tmp_path_factory.mktemp("made") / "artifact").out


def record_of(folder: Path) -> dict:
    return json.loads((folder / RECORD_NAME).read_bytes())


# The numbers.


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_are_weighted_means_of_outer_products(monkeypatch):
    monkeypatch.setattr("l4pack.calibration.moments.COLUMNS", 24)  # tiles that don't divide the width
    x, original = random(300, 100), random(300, 100, seed=1)
    weight = random(300, seed=2).abs()
    moments = Moments(100, cross=True, device=torch.device("cpu"))
    for part in (slice(0, 17), slice(17, 200), slice(200, 300)):
        moments.add(x[part], original[part], weight[part])
    gathered = moments.finish()
    hessian, cross = gathered.hessian, gathered.cross
    exact, w = x.double(), weight.double() / weight.double().sum()
    torch.testing.assert_close(hessian.double(), (exact * w[:, None]).T @ exact, rtol=1e-5, atol=1e-6)
    difference = original.double() - exact
    torch.testing.assert_close(cross.double(), (difference * w[:, None]).T @ exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cross", [False, True])
def test_few_tokens_are_kept_so_that_their_products_are_the_moments(cross):
    x, original, weight = random(40, 100), random(40, 100, seed=1), random(40, seed=2).abs()
    few, summed = (Moments(100, cross=cross, device=torch.device("cpu")) for _ in range(2))
    for part in (slice(0, 17), slice(17, 40)):
        few.add(x[part], original[part] if cross else None, weight[part])
    for _ in range(2):
        summed.add(x, original if cross else None, weight)
    kept, sums = few.finish(), summed.finish()
    torch.testing.assert_close(kept.hessian, sums.hessian, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kept.inputs.T @ kept.inputs, sums.hessian, rtol=1e-4, atol=1e-6)
    assert kept.cross is None
    assert sums.inputs is None
    if cross:
        torch.testing.assert_close(kept.difference.T @ kept.inputs, sums.cross, rtol=1e-4, atol=1e-6)
    else:
        assert kept.difference is sums.cross is None


@pytest.mark.parametrize("asymmetric", [0.0, 1.0])
def test_hessians_are_those_of_the_inputs_that_transformers_gives_each_matrix(
    source, text, tmp_path, monkeypatch, asymmetric
):
    """The first MoE layer and the dense one before it, against hooks on the whole model with every expert run."""
    seen: list[torch.Tensor] = []
    solve = gptq.prepare_problem

    def spy(hessian: torch.Tensor, **options: object):
        seen.append(hessian.clone())
        return solve(hessian, **options)

    monkeypatch.setattr("l4pack.calibration.mlp.gptq.prepare_problem", spy)
    # Nothing is quantized visibly below, so that the second layer sees what the original model gives it.
    monkeypatch.setattr(WrittenUnits, "as_written", lambda self, loaded, solved: loaded.weights)
    plan = planned(source, text, calibration={"min_tokens": 1}, asymmetric=asymmetric)
    run_plan(plan, tmp_path / "out")
    tokens = torch.tensor([item.tokens for item in plan.text.sequences])
    expected = dense_and_expert_hessians(source, tokens)
    for found, (name, wanted) in zip(seen[::2], expected.items(), strict=False):
        torch.testing.assert_close(
            found.double(), wanted, rtol=2e-4, atol=1e-6 * wanted.diagonal().mean().item(), msg=name
        )


def dense_and_expert_hessians(source: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean outer products of inputs to gate_proj: layer 0's dense MLP, layer 1's shared expert and its experts."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    layers = model.language_model.model.layers
    inputs: dict[str, torch.Tensor] = {}
    hooks = {"dense": layers[0].feed_forward, "moe": layers[1].feed_forward}
    for name, module in hooks.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=tokens)
        logits = layers[1].feed_forward.router(inputs["moe"])[1]
    dense, moe = inputs["dense"].double(), inputs["moe"].double()
    result = {"dense": dense.T @ dense / len(dense), "shared": moe.T @ moe / len(moe)}
    top, chosen = logits.double().max(1)
    for expert in range(logits.shape[1]):
        rows = moe[chosen == expert] * top[chosen == expert, None].sigmoid()
        if len(rows) == 0:
            break
        result[f"expert {expert}"] = rows.T @ rows / len(rows)
    assert len(result) > 4
    return result


# Rows.


def routing(tokens: int = 200, experts: int = 6, seed: int = 0) -> Routing:
    logits = random(tokens, experts, seed=seed)
    logits[:, 3] -= 100  # an expert nobody gets
    top = logits.topk(1, dim=1)
    return Routing(logits, top.indices, top.values.sigmoid())


def test_an_expert_with_enough_tokens_takes_its_own_alone():
    found = expert_rows(1, routing(), None, min_tokens=5)
    rows, scores = routing().of(1)
    assert found.borrowed == 0
    assert found.weights is None
    assert found.own == len(rows) > 5
    torch.testing.assert_close(found.scores, scores)


@pytest.mark.parametrize("expert", [1, 3])
def test_a_thin_expert_borrows_the_tokens_it_most_nearly_got(expert):
    given = routing()
    own, _ = given.of(expert)
    found = expert_rows(expert, given, None, min_tokens=120)
    assert found.count == 120
    assert found.own == len(own)
    lent = found.rows[found.own :]
    assert set(lent.tolist()).isdisjoint(own.tolist())
    margin = given.logits.amax(1) - given.logits[:, expert]
    others = sorted(set(range(200)) - set(own.tolist()) - set(lent.tolist()))
    assert margin[lent].max() <= margin[others].min()
    assert found.weights.tolist() == [1.0] * found.own + [BORROWED_WEIGHT] * found.borrowed
    torch.testing.assert_close(found.scores[found.own :, 0], given.logits[lent, expert].sigmoid())


def test_a_text_shorter_than_an_expert_wants_lends_all_it_has():
    assert expert_rows(3, routing(), None, min_tokens=10**6).count == 200


def test_tokens_that_the_original_sends_elsewhere_are_not_compared():
    quantized, original = routing(), routing(seed=4)
    found = expert_rows(0, quantized, original, min_tokens=150)
    same = original.experts[found.rows[: found.own], 0] == 0
    assert torch.equal(found.kept[: found.own], same)
    assert not found.kept[found.own :].any()
    assert same.any()
    assert not same.all()
    torch.testing.assert_close(found.original_scores[: found.own][same], original.scores[found.rows[: found.own]][same])


# The artifact and its record.


def test_an_artifact_has_the_planned_bytes_and_a_record_of_every_matrix(made):
    plan, folder = made
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == plan.files
    assert sum(plan.files.values()) == plan.artifact_bytes
    record = record_of(folder)
    assert set(record["matrices"]) == {target.module for target in plan.calibrated}
    assert len(record["matrices"]) == 2 * 3 + 2 * 3 * (1 + 8)
    for name, found in record["matrices"].items():
        assert found["error"] <= found["rtn_error"], name
        assert found["tokens"] + found["borrowed_tokens"] >= 1, name
    assert {len(tokens) for tokens in record["routed_tokens"].values()} == {8}
    assert {sum(tokens) for tokens in record["routed_tokens"].values()} == {SAMPLES * LENGTH}
    manifest = json.loads((folder / "l4pack-manifest.json").read_bytes())
    assert manifest["calibration"] == {key: record["text"][other] for key, other in
                                       (("text_sha256", "sha256"), ("tokens_sha256", "tokens_sha256"))}  # fmt: skip


def test_what_is_written_is_better_than_rounding_and_loads(made, source, l4pack):
    _, folder = made
    record = record_of(folder)
    improved = [1 - found["error"] / found["rtn_error"] for found in record["matrices"].values()]
    assert sum(improved) / len(improved) > 0.3
    ended = l4pack("verify", folder, "--against", source, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["ok"] is True


def test_the_same_input_gives_the_same_bytes(made, text, source, tmp_path):
    plan, folder = made
    again = run_plan(planned(source, text), tmp_path / "again").out
    for name in plan.files:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("two_sided", [False, True])
def test_a_record_never_outgrows_its_room(made, two_sided):
    plan, _ = made
    longest = {
        "method": "gptq", "error": -1.23456e-123, "rtn_error": -1.23456e-123, "dampening": 0.01, "tokens": 10**9,
        "borrowed_tokens": 10**9, "rtn_rows": 65536, "dead_columns": 65536, "reason": gptq.NOT_DEFINITE,
    }  # fmt: skip
    if two_sided:
        schemes = {
            name: scheme.model_copy(update={"gptq": GptqOptions(two_sided=True)})
            for name, scheme in plan.recipe.schemes.items()
        }
        plan = replace(plan, recipe=plan.recipe.model_copy(update={"schemes": schemes}))
        losses = dict.fromkeys(("error", "gptq_error", "rtn_error"), -1.23456e-123)
        longest["two_sided"] = {"kept": "nested", **losses, "dampening": 0.05, "reason": NOT_SOLVED}
    results = {"unit": {"matrices": {target.module: longest for target in plan.calibrated}}}
    results |= {str(layer): {"tokens": [10**9] * 8} for layer in (1, 3)}
    assert len(plan.calibration_json(results)) == plan.calibration_bytes


# Gates and bad input.


def test_cold_experts_over_the_gate_stop_the_run(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(LayerPass, "route", no_token_for_expert_0(LayerPass.route))
    plan = planned(source, text, calibration={"max_cold_experts": 0.05})
    with pytest.raises(QualityError, match=r"1 of 16 experts saw no token \(the first: layer 1, expert 0\)") as caught:
        run_plan(plan, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert "--calibration-samples" in caught.value.hint


def no_token_for_expert_0(route):
    @torch.inference_mode()
    def changed(self):
        found = route(self)
        if found is not None:
            found.experts[found.experts == 0] = 1
        return found

    return changed


def test_a_cold_expert_is_solved_with_borrowed_tokens(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(LayerPass, "route", no_token_for_expert_0(LayerPass.route))
    plan = planned(source, text, calibration={"max_cold_experts": 1.0, "min_tokens": 300})
    record = record_of(run_plan(plan, tmp_path / "out").out)
    cold = [found for name, found in record["matrices"].items() if ".experts.0." in name]
    assert len(cold) == 6
    for found in cold:
        assert (found["tokens"], found["borrowed_tokens"], found["method"]) == (0, 300, "gptq")
        assert found["error"] < found["rtn_error"]


def test_fallbacks_over_the_gate_stop_the_run(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(gptq, "factorize", lambda *_, **__: None)
    with pytest.raises(QualityError, match=r"could only be rounded to nearest \(no dampening up to 1.0"):
        run_plan(planned(source, text), tmp_path / "out")


def test_fallbacks_within_the_gate_are_recorded(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(gptq, "factorize", lambda *_, **__: None)
    plan = planned(source, text, calibration={"max_fallbacks": 1.0})
    record = record_of(run_plan(plan, tmp_path / "out").out)
    assert {(found["method"], found["reason"]) for found in record["matrices"].values()} == {("rtn", gptq.NOT_DEFINITE)}


def test_coverage_counts():
    coverage = Coverage(experts=8, max_cold=0.25)
    coverage.add(1, [3, 0, 1, 5])
    coverage.add(3, [0, 4, 4, 1])
    coverage.check()
    assert coverage.cold == [(1, 1), (3, 0)]
    record = coverage.record()
    assert (record["cold_experts"], record["experts"]) == (2, 8)
    coverage.max_cold = 0.2
    with pytest.raises(QualityError, match="2 of 8 experts saw no token"):
        coverage.check()


def test_no_tokenizer(tmp_path, text):
    folder = build(tmp_path / "bare", "scout")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="calibration needs a tokenizer") as caught:
        planned(folder, text)
    assert "int4-rtn" in caught.value.hint


def test_a_text_shorter_than_a_sequence_is_one(source, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    plan = planned(source, short)
    assert plan.text.record["tokens"] == plan.needs.tokens == 1 + len("too short")
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(UsageError, match="holds no text"):
        planned(source, tmp_path / "none.txt")


def test_the_memory_that_calibration_takes_is_planned_and_refused_when_it_is_not_there():
    checkpoint, recipe = open_source("llama-4-scout"), load_recipe("int4-uniform")
    plan = make_plan(checkpoint, recipe)
    assert plan.peak_ram_bytes == plan.needs.ram_bytes > 3 * 10**9
    assert plan.disk_bytes > plan.artifact_bytes + 2 * 3 * plan.needs.tokens * 5120 * 4 - 1
    with pytest.raises(BudgetError, match=r"the job needs .* of memory"):
        make_plan(checkpoint, recipe, RunLimits(max_ram=2**30))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": None}, "calibration: missing, and schemes.int4 needs one"),
        ({"schemes": {"int4": {"gptq": {"act_order": True, "actorder": 1}}}}, "actorder"),
        ({"schemes": {"int4": {"method": "rtn", "gptq": {}}}}, "its options are for method gptq"),
        ({"schemes": {"int4": {"method": "rtn", "gptq": None}}}, "calibration: no scheme needs one"),
    ],
)
def test_recipes_that_ask_the_impossible(change, message):
    values = recipe().model_dump()
    for key, value in change.items():
        if key == "schemes":
            values["schemes"]["int4"].update(value["int4"])
        else:
            values[key] = value
    with pytest.raises((RecipeError, ValueError), match=message):
        Recipe.model_validate(values)


def test_options_of_calibration_are_refused_where_nothing_is_calibrated(l4pack, source, tmp_path):
    ended = l4pack("quantize", source, "--recipe", "int4-rtn", "--calibration-samples", 3, "--out", tmp_path / "out")
    assert ended.code == 2
    assert ended.err.startswith(
        "error: recipe int4-rtn needs no calibration, --calibration-samples means nothing to it\nhint: "
    )


# Fixed scales of FP8 activations.


def test_fp8_input_scales_are_the_largest_inputs_of_each_layer(source, text, tmp_path, l4pack):
    static = load_recipe("fp8-static").calibrating(samples=SAMPLES, sequence_length=LENGTH)
    plan = with_text(make_plan(open_source(str(source)), static), str(text))
    out = run_plan(plan, tmp_path / "out").out
    assert {path.name: path.stat().st_size for path in out.iterdir()} == plan.files
    ended = l4pack("verify", out, "--against", source, "--json")
    assert json.loads(ended.out)["ok"] is True
    prefix = "language_model.model.layers."
    scales = {name: value for name, value in load_file(out / "model.safetensors").items() if "input_scale" in name}
    assert len(scales) == len(plan.observed) == 60
    for layer in (1, 3):
        for projections in (("gate_proj", "up_proj"), ("down_proj",)):
            names = [
                f"{prefix}{layer}.feed_forward.experts.{expert}.{projection}.input_scale"
                for expert in range(8)
                for projection in projections
            ]
            assert len({scales[name].item() for name in names}) == 1
    tokens = torch.tensor([item.tokens for item in plan.text.sequences])
    largest = largest_inputs(source, tokens)
    for name, amax in largest.items():
        scale = scales[f"{prefix}0.feed_forward.{name}.input_scale"]
        assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (1,))
        # Down's inputs come from gate and up as quantized.
        assert scale.item() == pytest.approx(amax / 448, rel=2**-8 if name != "down_proj" else 0.1)
    config = json.loads((out / "config.json").read_bytes())["quantization_config"]["config_groups"]["group_0"]
    assert (config["input_activations"]["dynamic"], config["input_activations"]["strategy"]) == (False, "tensor")


def largest_inputs(source: Path, tokens: torch.Tensor) -> dict[str, float]:
    """Largest magnitudes that transformers gives the matrices of layer 0's dense MLP."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    dense = model.language_model.model.layers[0].feed_forward
    largest: dict[str, float] = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        hook = lambda _, args, name=name: largest.__setitem__(name, args[0].abs().max().item())  # noqa: E731
        dense.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=tokens)
    return largest


def test_static_activations_go_with_one_scale_a_matrix():
    values = load_recipe("fp8-static").model_dump()
    values["schemes"]["fp8"]["strategy"] = "channel"
    with pytest.raises(ValueError, match="static_tensor goes with strategy tensor"):
        Recipe.model_validate(values)


def test_coverage_command(source, text, l4pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["coverage", source, "--calibration", text, *LITTLE]
    ended = l4pack(*command)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["experts"] == 16
    assert [sum(layer["tokens"]) for layer in found["layers"]] == [SAMPLES * LENGTH] * 2
    assert found["cold_experts"] == sum(layer["tokens"].count(0) for layer in found["layers"]) == len(found["cold"])
    few = [*command[:4], "--calibration-samples", 1, "--sequence-length", 2, "--json"]
    assert l4pack(*few).code == 0
    ended = l4pack(*few, "--max-cold", 0.1)
    assert ended.code == 6
    assert "experts saw no token" in ended.err
    assert "--max-cold" in ended.err
    assert l4pack("coverage", "llama-4-scout").code == 4


@pytest.mark.parametrize("spoiled", [None, "model-1.hidden", "state.json"])
def test_coverage_goes_on_to_the_same_counts(source, text, l4pack, tmp_path, monkeypatch, spoiled):
    monkeypatch.chdir(tmp_path)
    command = ["coverage", source, "--calibration", text, *LITTLE]
    counts = {key: value for key, value in json.loads(l4pack(*command).out).items() if key != "seconds"}
    settle, work = Walk._settle, tmp_path / "work"

    def stop(self):
        settle(self)
        if len(self.records) == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "_settle", stop)
        assert l4pack(*command, "--work", work).code == 75
        ended = l4pack(*command)
        assert ended.code == 75
        assert ended.err.endswith(
            "error: stopped; what is finished is kept\nhint: run the same command again to go on\n"
        )
    if spoiled:
        SPOILS["flipped"](work / spoiled)
    ended = l4pack(*command, "--work", work)
    assert ended.code == 0, ended.err
    assert {key: value for key, value in json.loads(ended.out).items() if key != "seconds"} == counts
    assert not work.exists()
