"""The plan: predicted sizes, memory limits kept or refused, and all of it from headers alone."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from l4pack.checkpoint.open import open_source
from l4pack.errors import BudgetError, SourceError
from l4pack.plan import plan as planning
from l4pack.plan.assign import ROW_STEP, Action
from l4pack.plan.memory import KERNELS_LOADED
from l4pack.plan.plan import RunLimits, make_plan
from l4pack.plan.summary import plan_classes, plan_record
from l4pack.quant.scheme import Strategy
from l4pack.recipe import Recipe, load_recipe, recipe_names
from l4pack.units import GIB, MIB

GB = 10**9


def planned(source, recipe="int4-rtn", **limits):
    return make_plan(open_source(str(source)), load_recipe(recipe), RunLimits(**limits))


@pytest.mark.parametrize(
    ("model", "recipe", "gigabytes"),
    [
        ("llama-4-scout", "int4-rtn", 64.87), ("llama-4-maverick", "int4-rtn", 215.94),
        ("llama-4-scout", "meta-int4", 66.48), ("llama-4-maverick", "meta-int4", 230.99),
        ("llama-4-scout", "meta-fp8", 124.67), ("llama-4-maverick", "meta-fp8", 432.73),
    ],
)  # fmt: skip
def test_predicted_sizes(model, recipe, gigabytes):
    # the prediction for meta-fp8 leaves its scales out
    plan = planned(model, recipe)
    scales = sum(t.nbytes for t in plan.tensors if t.name.endswith("_scale")) if recipe == "meta-fp8" else 0
    assert round((plan.weight_bytes - scales) / GB, 2) == gigabytes


def test_scouts_int4_weights_to_the_byte():
    assert planned("llama-4-scout", "int4-uniform").weight_bytes == 64_873_104_640
    eight_bits_more = 48 * 3 * 5120 * 8192 // 2  # for the shared experts
    assert planned("llama-4-scout", "int4").weight_bytes == 64_873_104_640 + eight_bits_more


def test_bits_per_weight_are_levels_and_scales():
    assert planned("llama-4-scout", "fp8").bits_per_weight == pytest.approx(8 + 16 / 5120, rel=1e-3)
    shape_words = 2 * 64 / (5120 * 8192)
    assert planned("llama-4-scout", "int4-uniform").bits_per_weight == pytest.approx(
        4 + 16 / 128 + shape_words, rel=1e-9
    )


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_byte_is_read_once_and_every_artifact_byte_has_one_place(recipe, checkpoint):
    wide = {"hidden_size": 256, "intermediate_size": 256} if recipe.startswith("gguf-") else {}
    plan = planned(checkpoint("maverick", shards=3, **wide), recipe)
    assert plan.read_bytes - plan.back_bytes == plan.checkpoint.weight_bytes
    assert len({task.key for task in plan.tasks}) == len(plan.tasks)
    for shard in plan.shards:
        places = sorted((plan.places[name].start, plan.places[name].nbytes) for name in shard.tensors)
        end = len(shard.prefix)
        for start, nbytes in places:
            assert start == end
            end += nbytes
        assert end == shard.nbytes
    assert {tensor.name for tensor in plan.tensors} == set(plan.places)
    assert plan.artifact_bytes == sum(plan.files.values())


def test_a_bare_configuration_plans_what_its_checkpoint_plans(checkpoint):
    folder = checkpoint("scout")
    bare, full = planned(folder / "config.json"), planned(folder)
    assert [(t.name, t.dtype, t.shape) for t in bare.tensors] == [(t.name, t.dtype, t.shape) for t in full.tensors]
    assert bare.weight_bytes == full.weight_bytes
    assert bare.config_json == full.config_json


def test_a_plan_reads_no_weight(checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoint("scout", shards=3), tmp_path / "tiny-scout")
    expected = plan_record(planned(folder))
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        os.truncate(path, header)
        os.truncate(path, size)  # the same size again, and nothing in it
    read = []
    monkeypatch.setattr("os.preadv", lambda *arguments: read.append(arguments))
    assert plan_record(planned(folder)) == expected
    assert not read


def test_classes_add_up(checkpoint):
    plan = planned(checkpoint("maverick"))
    rows = plan_classes(plan)
    assert sum(row.artifact_bytes for row in rows) == plan.weight_bytes
    assert sum(row.source_bytes for row in rows) == plan.checkpoint.weight_bytes
    routed = next(row for row in rows if row.role == "routed_expert")
    assert (routed.matrices, routed.scheme) == (2 * 8 * 3, "int4")


@pytest.mark.parametrize(
    ("model", "max_ram"),
    [("llama-4-scout", 8 * GIB), ("llama-4-scout", GIB), ("llama-4-scout", 600 * MIB), ("llama-4-maverick", GIB)],
)
def test_memory_limits_are_kept(model, max_ram):
    plan = planned(model, "int4-rtn", max_ram=max_ram, workers=4)
    assert plan.peak_ram_bytes <= max_ram
    assert max(task.ram_bytes for task in plan.tasks) * plan.workers + KERNELS_LOADED >= plan.peak_ram_bytes


def test_less_memory_means_smaller_slabs_then_fewer_workers():
    roomy, tight, tightest = (
        planned("llama-4-scout", max_ram=room, workers=4) for room in (8 * GIB, 600 * MIB, KERNELS_LOADED + 40 * MIB)
    )
    assert roomy.workers == tight.workers == 4
    assert tightest.workers < 4
    assert len(roomy.tasks) < len(tight.tasks)


@pytest.mark.parametrize("max_ram", [0, 1, KERNELS_LOADED])
def test_a_limit_below_the_smallest_job_is_refused(max_ram):
    with pytest.raises(BudgetError, match=r"the job needs .* of memory, the limit is") as caught:
        planned("llama-4-scout", max_ram=max_ram)
    assert "--max-ram" in caught.value.hint


def test_slices_are_cut_where_blocks_and_words_stay_whole(checkpoint, monkeypatch):
    monkeypatch.setattr(planning, "SLAB_LIMITS", (1,))
    plan = planned(checkpoint("maverick", intermediate_size=384), "fp8-block")
    cut = [task for task in plan.tasks if task.action is Action.QUANTIZE]
    assert all(task.rows[0] % ROW_STEP == 0 for task in cut)
    assert {task.rows for task in cut} == {(0, 128), (128, 256), (256, 384)}
    assert plan.read_bytes - plan.back_bytes == plan.checkpoint.weight_bytes


def test_a_tensor_wide_scale_is_never_cut(checkpoint, monkeypatch):
    monkeypatch.setattr(planning, "SLAB_LIMITS", (1,))
    recipe = load_recipe("fp8").model_dump()
    recipe["schemes"]["fp8"]["strategy"] = Strategy.TENSOR
    plan = make_plan(open_source(str(checkpoint("scout", intermediate_size=384))), Recipe.model_validate(recipe))
    assert all(
        task.rows[1] - task.rows[0] == task.targets[0].linear.out_features for task in plan.tasks if task.targets
    )


def test_the_identity_follows_what_decides_bytes_and_nothing_else(checkpoint, monkeypatch):
    source = checkpoint("scout")
    first = planned(source).identity().digest
    assert planned(source, max_ram=GIB, workers=1).identity().digest == first
    different = [
        planned(source, "int4").identity().digest,
        planned(source, shard_bytes=100_000).identity().digest,
        planned(checkpoint("scout", seed=1)).identity().digest,
    ]
    monkeypatch.setattr(planning, "__version__", "0.0.0")
    different.append(planned(source).identity().digest)
    assert len({first, *different}) == 5


def test_a_quantized_source_is_refused(artifact):
    with pytest.raises(SourceError, match="is quantized already"):
        planned(artifact("int4-rtn"))


def test_what_runtimes_cannot_do_is_said(checkpoint):
    recipe = load_recipe("int4-rtn").model_dump()
    recipe["schemes"]["int4"]["symmetric"] = False
    recipe["rules"][0]["roles"].append("attention")
    notes = make_plan(open_source(str(checkpoint())), Recipe.model_validate(recipe)).warnings()
    assert any("asymmetric" in note for note in notes)
    assert any("q_proj and k_proj" in note for note in notes)
    assert planned(checkpoint()).warnings() == []


def test_the_configuration_keeps_every_section(checkpoint):
    plan = planned(checkpoint("scout"))
    written, source = json.loads(plan.config_json), plan.checkpoint.config.raw
    assert written.pop("quantization_config")
    assert written == source
