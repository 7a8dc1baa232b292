"""Scales of an FP8 KV cache: found as transformers' own cache holds keys and values, written, checked, and simulated."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_model
from card_facts import facts
from conftest import file_digests
from killing import TEXT, Killed, killed_after
from models import build
from safetensors.torch import load_file, save_file
from streaming import assert_close, streamed_logits, token_rows
from transformers import AutoModelForImageTextToText, DynamicCache
from whole_model import one_thread  # noqa: F401

from l4pack.artifact.calibration_record import RECORD_NAME
from l4pack.budget.named import open_subject, planned
from l4pack.calibration.kv_cache import CacheRange
from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.errors import L4packError
from l4pack.plan.plan import Plan, make_plan
from l4pack.publish.card import render_card
from l4pack.quantize.run import run_plan
from l4pack.recipe import KVStrategy, Recipe, load_recipe
from l4pack.stream.kv import BlockCache, PassingCache, RoundedCache
from l4pack.verify.verify import verify_artifact

LENGTH = 80  # two and a half attention chunks of 32
HEADS = 2


def recipe(base: str, strategy: str = "tensor", **calibration: Any) -> Recipe:
    values = load_recipe(base).model_dump()
    options = {"samples": 3, "sequence_length": LENGTH, "max_cold_experts": 1.0, "max_fallbacks": 1.0, **calibration}
    values |= {"name": f"{base}-kv", "kv_cache": {"dtype": "fp8", "strategy": strategy}}
    return Recipe.model_validate({**values, "calibration": {**(values["calibration"] or {}), **options}})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scout normalizes queries and keys, Maverick does not; both have chunked layers and one without positions."""
    root = tmp_path_factory.mktemp("sources")
    return {kind: build(root / f"tiny-{kind}", kind) for kind in ("scout", "maverick")}  # type: ignore[arg-type]


def plan_for(source: Path, text: Path, base: str = "int4-rtn", strategy: str = "tensor", **options: Any) -> Plan:
    return with_text(make_plan(open_source(str(source)), recipe(base, strategy, **options)), str(text))


@pytest.fixture(scope="module")
def made(
    sources: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, Path]]:
    """Rounded artifacts with scales, a plan and a folder for each kind and strategy."""
    root, found = tmp_path_factory.mktemp("made"), {}
    for kind, source in sources.items():
        for strategy in KVStrategy:
            plan = plan_for(source, text, strategy=strategy.value)
            found[f"{kind}-{strategy}"] = plan, run_plan(plan, root / f"{kind}-{strategy}").out
    return found


def scales_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name[-7:] in
            ("k_scale", "v_scale")}  # fmt: skip


def without_cache_scheme(folder: Path, copy: Path) -> Path:
    """The artifact as one that never had scales, for transformers, which would give the vision tower some."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_bytes())
    config["quantization_config"]["kv_cache_scheme"] = None
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    kept = {name: tensor for name, tensor in tensors.items() if name not in scales_of(folder)}
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    return copy


# Finding them.


@pytest.mark.parametrize("strategy", KVStrategy)
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_scales_are_those_of_transformers_own_cache(made, tmp_path, kind, strategy):
    """All keys and values of the whole quantized model, as its cache holds them: chunked layers, and one without rope."""
    plan, folder = made[f"{kind}-{strategy}"]
    model = whole_model.load(without_cache_scheme(folder, tmp_path / "plain"), quantized=True, dtype=torch.bfloat16)
    largest: dict[str, torch.Tensor] = {}
    for sequence in plan.text.sequences:
        cache = DynamicCache()  # keeps everything, whatever the layer's kind
        with torch.no_grad():
            model(input_ids=torch.tensor([sequence.tokens]), past_key_values=cache, use_cache=True)
        for layer, one in enumerate(cache.layers):
            assert one.keys.shape == (1, HEADS, LENGTH, 32)
            for suffix, values in (("k_scale", one.keys), ("v_scale", one.values)):
                by_head = values.abs().amax((0, 2, 3))
                amax = by_head.reshape(HEADS, 1, 1) if strategy is KVStrategy.HEAD else by_head.max().reshape(1)
                name = f"language_model.model.layers.{layer}.self_attn.{suffix}"
                largest[name] = torch.maximum(largest.get(name, amax), amax)
    found = scales_of(folder)
    assert found.keys() == largest.keys()
    for name, amax in largest.items():
        assert found[name].dtype is torch.float32
        torch.testing.assert_close(found[name], amax / 448, rtol=2e-5, atol=0, msg=name)
    key_scales = {float(found[name].max()) for name in found if name.endswith("k_scale")}
    assert len(key_scales) == 4  # each layer its own


def test_blocks_of_a_long_sequence_make_no_difference(sources, text, tmp_path, monkeypatch):
    whole = run_plan(plan_for(sources["scout"], text), tmp_path / "whole").out
    monkeypatch.setattr("l4pack.stream.layer.rows_at_once", lambda *_: 24)
    cut = run_plan(plan_for(sources["scout"], text), tmp_path / "cut").out
    for name, scale in scales_of(whole).items():
        torch.testing.assert_close(scales_of(cut)[name], scale, rtol=2e-5, atol=0)


@pytest.mark.parametrize(("strategy", "shape"), [(KVStrategy.TENSOR, (1,)), (KVStrategy.HEAD, (3, 1, 1))])
def test_what_fills_up_a_batch_does_not_count(strategy, shape):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2))
    keys[1, :, 2:], values[1, :, 2:] = 100.0, -200.0
    seen = CacheRange(strategy, 3)
    out = PassingCache(seen, [5, 2]).update(keys, values, 0)
    assert out[0] is keys
    assert out[1] is values
    for found, entered in zip(seen.scales(), (keys, values), strict=True):
        assert found.shape == shape
        amax = torch.cat([entered[0], entered[1, :, :2]], 1).abs().amax((1, 2))
        wanted = amax if strategy is KVStrategy.HEAD else amax.max()[None]
        torch.testing.assert_close(torch.from_numpy(found).reshape(-1), wanted / 448)


def test_a_head_that_is_always_zero_gets_the_scale_of_one_that_has_none():
    keys = torch.ones(1, 2, 3, 4) * torch.tensor([0.0, 4.48]).reshape(1, 2, 1, 1)
    seen = CacheRange(KVStrategy.HEAD, 2)
    seen(keys, keys, [3])
    torch.testing.assert_close(torch.from_numpy(seen.scales()[0]).reshape(-1), torch.tensor([1.0, 0.01]))


# The artifact.


@pytest.mark.parametrize("name", ["scout-tensor", "scout-head", "maverick-tensor", "maverick-head"])
def test_an_artifact_has_the_planned_bytes_its_scheme_and_a_record(made, sources, name):
    plan, folder = made[name]
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == plan.files
    scheme = json.loads((folder / "config.json").read_bytes())["quantization_config"]["kv_cache_scheme"]
    strategy = "attn_head" if name.endswith("head") else "tensor"
    assert scheme.items() >= {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}.items()
    assert scheme["dynamic"] is False
    recorded = json.loads((folder / RECORD_NAME).read_bytes())["kv_cache"]
    assert list(recorded) == ["0", "1", "2", "3"]
    for layer, found in recorded.items():
        scale = scales_of(folder)[f"language_model.model.layers.{layer}.self_attn.v_scale"]
        torch.testing.assert_close(torch.tensor(found["value_amax"]) / 448, scale.reshape(-1), rtol=1e-5, atol=0)
    found = verify_artifact(folder, open_source(str(sources[name.partition("-")[0]])))
    assert found.ok, found.findings
    warnings = {finding.message for finding in found.findings}
    assert any("sglang" in message and "drops the KV-cache scales" in message for message in warnings)
    assert any("FlashAttention 3" in message for message in warnings) is name.endswith("head")
    assert set(plan.warnings()) >= {message for message in warnings if "KV-cache" in message}


def test_scales_change_nothing_else(made, sources, tmp_path):
    """Weights rounded to nearest are the same bytes with and without."""
    plain = run_plan(make_plan(open_source(str(sources["scout"])), load_recipe("int4-rtn")), tmp_path / "plain").out
    _, folder = made["scout-tensor"]
    with_scales, without = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    assert with_scales.keys() - without.keys() == scales_of(folder).keys()
    assert all(torch.equal(with_scales[name], tensor) for name, tensor in without.items())


def test_a_record_never_outgrows_its_room(made):
    for name in ("scout-tensor", "scout-head"):
        plan, _ = made[name]
        longest = [1.23457e-38] * (HEADS if name.endswith("head") else 1)
        results = {f"KV {n}": {"kv_cache": {str(n): {"key_amax": longest, "value_amax": longest}}} for n in range(4)}
        results |= {str(layer): {"tokens": [10**9] * 4} for layer in range(4)}
        assert len(plan.calibration_json(results)) == plan.calibration_bytes


@pytest.mark.parametrize("base", ["int4", "fp8-static"])
def test_a_calibrated_recipe_finds_them_in_the_same_walk(sources, text, tmp_path, base):
    plan = plan_for(sources["maverick"], text, base)
    folder = run_plan(plan, tmp_path / "out").out
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == plan.files
    assert len(scales_of(folder)) == 8
    assert verify_artifact(folder, open_source(str(sources["maverick"]))).ok


@pytest.mark.parametrize("records", [2, 4, 6])
def test_killed_anywhere_it_ends_in_the_same_bytes(sources, text, made, tmp_path, monkeypatch, records):
    plan = plan_for(sources["maverick"], text)
    with monkeypatch.context() as context:
        killed_after(context, records)
        with pytest.raises(Killed):
            run_plan(plan, tmp_path / "out")
    assert file_digests(run_plan(plan, tmp_path / "out").out) == file_digests(made["maverick-tensor"][1])


def test_cold_experts_don_t_matter_to_a_cache(sources, text, tmp_path):
    plan = plan_for(sources["maverick"], text, samples=1, sequence_length=4, max_cold_experts=0.0)
    assert run_plan(plan, tmp_path / "out").out.is_dir()


# What it is judged by.


def rounding(folder: Path) -> type[DynamicCache]:
    """A cache that stores E4M3 codes of keys and values divided by the file's scales."""
    scales = scales_of(folder)

    class Rounding(DynamicCache):
        def update(self, keys, values, layer_idx, *rest, **more):
            entering = []
            for suffix, value in (("k_scale", keys), ("v_scale", values)):
                scale = scales[f"language_model.model.layers.{layer_idx}.self_attn.{suffix}"]
                codes = (value / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                entering.append(codes.float() * scale)
            return super().update(*entering, layer_idx, *rest, **more)

    return Rounding


@pytest.mark.parametrize("name", ["scout-tensor", "scout-head", "maverick-tensor"])
def test_evaluation_rounds_keys_and_values_as_the_cache_does(made, tmp_path, name):
    _, folder = made[name]
    plain = without_cache_scheme(folder, tmp_path / "plain")
    sequences = token_rows()
    model, cache = whole_model.load(plain, quantized=True, dtype=torch.bfloat16), rounding(folder)
    wanted = [whole_model.logits(model, [ids], past_key_values=cache(), use_cache=True)[0] for ids in sequences]
    found = streamed_logits(folder, sequences, tmp_path / "work")
    assert_close(found, wanted, 1e-4)
    without = streamed_logits(folder, sequences, tmp_path / "weights", round_activations=False)
    assert_close(without, whole_model.logits(model, sequences))
    assert max(float((one - two).abs().max()) for one, two in zip(found, without, strict=True)) > 1e-2


def test_evaluate_says_whether_the_cache_was_rounded(made, sources, text, tmp_path, l4pack):
    folder = shutil.copytree(made["scout-tensor"][1], tmp_path / "artifact")
    command = ["evaluate", folder, "--against", sources["scout"], "--text", text, "--samples", 3, "--json"]
    rounded, plain = (json.loads(l4pack(*command, *more).out) for more in ((), ("--weights-only",)))
    assert rounded["run"]["kv_cache"] == "FP8, keys and values rounded as vLLM stores them; queries are not"
    assert plain["run"]["kv_cache"] == "as computed"
    assert rounded["kl_mean"] != plain["kl_mean"]


def test_a_cache_that_is_kept_by_blocks_rounds_each():
    cache = BlockCache(5, RoundedCache(torch.tensor([0.5]), torch.tensor([0.25])))
    values = torch.arange(20.0).reshape(1, 1, 5, 4) / 7
    cache.update(values[:, :, :3], values[:, :, :3], 0)
    keys, kept = cache.update(values[:, :, 3:], values[:, :, 3:], 0)
    assert torch.equal(keys, (values / 0.5).to(torch.float8_e4m3fn).float() * 0.5)
    assert torch.equal(kept, (values / 0.25).to(torch.float8_e4m3fn).float() * 0.25)


def test_a_scheme_that_no_runtime_takes_is_not_simulated(made, tmp_path):
    folder = shutil.copytree(made["scout-tensor"][1], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"]["kv_cache_scheme"]["type"] = "int"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(L4packError, match="kv_cache_scheme is not one that runtimes take"):
        streamed_logits(folder, token_rows(), tmp_path / "work")


# Plans, budgets, recipes.


def test_budgets_take_the_cache_for_fp8_before_and_after(made, sources, tmp_path):
    file = tmp_path / "kv.yaml"
    file.write_text("extends: int4-rtn\nname: kv\ntitle: with scales\nkv_cache: {dtype: fp8}\ncalibration: {}\n")
    assert planned(open_source(str(sources["scout"])), str(file)).kv_dtype == "fp8"
    assert planned(open_source(str(sources["scout"])), "int4-rtn").kv_dtype == "bfloat16"
    assert open_subject(str(made["scout-tensor"][1])).kv_dtype == "fp8"


def test_a_full_model_gets_two_scales_a_layer_and_nothing_for_its_vision():
    plan = make_plan(open_source("llama-4-scout"), recipe("int4", "head"))
    assert len(plan.kv_scales) == 2 * 48
    assert {(tensor.dtype, tensor.shape) for tensor in plan.kv_scales} == {("F32", (8, 1, 1))}
    assert not any("vision" in tensor.name for tensor in plan.kv_scales)
    without = make_plan(open_source("llama-4-scout"), load_recipe("int4"))
    assert plan.weight_bytes - without.weight_bytes == 2 * 48 * 8 * 4
    assert plan.bits_per_weight == without.bits_per_weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": None}, "calibration: missing, and kv_cache needs one"),
        ({"kv_cache": None}, "calibration: no scheme needs one, and neither does a kv_cache"),
        ({"kv_cache": {"dtype": "fp8", "strategy": "channel"}}, "'tensor' or 'head'"),
        ({"kv_cache": {"dtype": "int8"}}, "'fp8'"),
        ({"kv_cache": {}}, "Field required"),
        ({"rules": [{"roles": "all", "scheme": "keep"}]}, "no rule uses it"),
    ],
)
def test_recipes_that_ask_the_impossible(change, message):
    values = {**recipe("int4-rtn").model_dump(), **change}
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(values)


@pytest.mark.parametrize(
    ("value", "rule"),
    [(torch.tensor([0.0]), "kv-scale"), (torch.tensor([float("nan")]), "kv-scale"), (torch.ones(2, 1, 1), "shape"),
     (torch.tensor([0.02]), "kv-scale"),
     (torch.ones(1, dtype=torch.int32), "dtype")],
)  # fmt: skip
def test_verify_finds_a_scale_that_is_wrong(made, tmp_path, value, rule):
    folder = shutil.copytree(made["scout-tensor"][1], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "language_model.model.layers.2.self_attn.k_scale"
    save_file({**tensors, name: value}, folder / "model.safetensors", {"format": "pt"})
    (folder / "l4pack-manifest.json").unlink()
    found = verify_artifact(folder)
    errors = [(finding.rule, finding.where) for finding in found.findings if finding.level == "error"]
    assert [error for error in errors if error[0] != "companion"] == [(rule, name)]


def test_transformers_loads_the_scales_and_misses_those_of_the_vision_tower(made):
    """What the formats warn of: everything else arrives."""
    _, folder = made["scout-head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"k_scale", "v_scale"}
    assert all("vision_model" in name for name in info["missing_keys"])
    assert not info["unexpected_keys"] | info["mismatched_keys"]
    for name, scale in scales_of(folder).items():
        torch.testing.assert_close(model.get_parameter(name), scale, check_dtype=False, rtol=4e-3, atol=0)


@pytest.mark.parametrize(("strategy", "each"), [("tensor", "layer"), ("head", "KV head of a layer")])
def test_the_card_says_that_the_cache_has_scales(strategy, each):
    row = f"| KV cache | FP8, with a scale of keys and one of values for each {each} |"
    plain = facts("int4-rtn")
    assert "KV cache |" not in render_card(plain)
    manifest = {**plain.manifest, "recipe": recipe("int4-rtn", strategy).model_dump(mode="json")}
    card = render_card(replace(plain, manifest=manifest, calibration={"matrices": {}, "routed_tokens": {}}))
    assert row in card
    assert "none: rounding has nothing to fall back to" in card
