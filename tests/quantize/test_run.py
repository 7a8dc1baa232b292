"""Running a plan: written bytes equal planned bytes, and the same bytes whatever the layout, memory or threads."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import file_digests, quick_plan
from models import unfuse
from safetensors.torch import load_file

from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.checkpoint.header import read_header
from l4pack.checkpoint.open import open_source
from l4pack.checkpoint.writer import ShardWriter
from l4pack.plan import plan as planning
from l4pack.plan.plan import RunLimits, make_plan
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import quantize_block
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe, load_recipe, recipe_names
from l4pack.work.progress import Shown

ROUNDING = [
    name for name in recipe_names() if load_recipe(name).calibration is None and load_recipe(name).promise is None
]
FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def weights(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def run(source, recipe, out, **limits):
    plan = quick_plan(source, recipe, RunLimits(**limits))
    return plan, run_plan(plan, out)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


KINDS = ["scout", "maverick", "text"]
PROMISES = {name: load_recipe(name).promise for name in recipe_names()}
EACH = [(name, kind) for name, promise in PROMISES.items() for kind in KINDS if not promise or kind in promise.model]
SLOW = [name for name in PROMISES if "fp4" in name or name.endswith("-best")]  # solving takes a while
EACH = [(name, kind) for name, kind in EACH if name not in SLOW or kind == "maverick"]
EACH = [(name, kind) for name, kind in EACH if not name.startswith("gguf-")]  # super-blocks are wider than these models


@pytest.mark.parametrize(("recipe", "kind"), EACH)
def test_written_bytes_are_planned_bytes(checkpoint, artifact, recipe, kind):
    plan = quick_plan(checkpoint(kind), recipe)
    sizes = {path.name: path.stat().st_size for path in artifact(recipe, kind).iterdir()}
    assert sizes == plan.files
    assert sum(sizes.values()) == plan.artifact_bytes
    written = weights(artifact(recipe, kind))
    assert {(n, tuple(t.shape)) for n, t in written.items()} == {(t.name, t.shape) for t in plan.tensors}
    assert sum(tensor.nbytes for tensor in written.values()) == plan.weight_bytes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("recipe", ROUNDING)
def test_every_tensor_is_made_from_its_own_weights(checkpoint, artifact, recipe, dtype):
    source = checkpoint("maverick", dtype=dtype, intermediate_size=384)
    made = weights(artifact(recipe, "maverick", dtype=dtype, intermediate_size=384))
    plan = make_plan(open_source(str(source)), load_recipe(recipe))
    original = unfuse(weights(source))
    expected = {}
    for linear, scheme in plan.assigned:
        weight = original.pop(f"{linear.module}.weight")
        if scheme is None:
            expected[f"{linear.module}.weight"] = bits(weight)
            continue
        block = weight.view(torch.uint16).numpy() if dtype == "bfloat16" else weight.numpy()
        whole = quantize_block(block, Layout.OUT_IN, FLOATS[dtype], plan.recipe.schemes[scheme])
        packed = plan.recipe.schemes[scheme].type == "int"
        expected[f"{linear.module}.weight{'_packed' if packed else ''}"] = whole.values.tobytes()
        expected[f"{linear.module}.weight_scale"] = whole.scale.tobytes()
        if packed:
            shape = np.array(weight.shape, np.int64)
            expected[f"{linear.module}.weight_shape"] = shape.tobytes()
    expected |= {name: bits(tensor) for name, tensor in original.items()}
    assert {name: bits(tensor) for name, tensor in made.items()} == expected


ASYMMETRIC = load_recipe("int4-rtn").model_dump()
ASYMMETRIC["schemes"]["int4"] |= {"symmetric": False}
TENSOR = load_recipe("fp8").model_dump()
TENSOR["schemes"]["fp8"] |= {"strategy": "tensor"}
TWO = load_recipe("int4-rtn").model_dump()
TWO["schemes"]["fp8"] = load_recipe("fp8").model_dump()["schemes"]["fp8"]
TWO["rules"] = [
    {"roles": ["routed_expert"], "layers": [1], "scheme": "keep"},
    {"roles": ["routed_expert"], "scheme": "int4"},
    {"roles": ["shared_expert", "attention"], "scheme": "fp8"},
    {"roles": "all", "scheme": "keep"},
]
MSE = load_recipe("int4-rtn").model_dump()
MSE["schemes"]["int4"] |= {"observer": "mse"}
RECIPES = {
    **{name: load_recipe(name) for name in ("int4-rtn", "fp8-block", "meta-fp8")},
    **{
        n: Recipe.model_validate(v)
        for n, v in (("asymmetric", ASYMMETRIC), ("tensor", TENSOR), ("two", TWO), ("mse", MSE))
    },
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_memory_and_threads_do_not_change_a_byte(checkpoint, tmp_path, recipe, monkeypatch):
    source = checkpoint("maverick", intermediate_size=384, shards=3)
    run(source, recipe, tmp_path / "plain")
    expected = file_digests(tmp_path / "plain")
    run(source, recipe, tmp_path / "alone", workers=1)
    run(source, recipe, tmp_path / "many", workers=7)
    monkeypatch.setattr(planning, "SLAB_LIMITS", (1,))
    plan, _ = run(source, recipe, tmp_path / "slices", workers=3)
    assert any(task.rows[0] for task in plan.tasks) or recipe is RECIPES["tensor"]
    for folder in ("alone", "many", "slices"):
        assert file_digests(tmp_path / folder) == expected, folder


@pytest.mark.parametrize("rows", [200, 328])
def test_slices_of_ragged_matrices_land_where_they_belong(checkpoint, tmp_path, monkeypatch, rows):
    """200 and 328 output rows are no multiple of a block of 128 rows."""
    source = checkpoint("scout", intermediate_size=rows)
    for name in ("fp8-block", "asymmetric"):
        recipe = load_recipe(name) if name == "fp8-block" else _channelwise()
        run(source, recipe, tmp_path / f"{name}-whole")
        with monkeypatch.context() as patch:
            patch.setattr(planning, "SLAB_LIMITS", (1,))
            run(source, recipe, tmp_path / f"{name}-slices")
        assert file_digests(tmp_path / f"{name}-whole") == file_digests(tmp_path / f"{name}-slices")


def _channelwise():
    values = load_recipe("int4-rtn").model_dump()
    values["schemes"]["int4"] |= {"symmetric": False, "strategy": "channel", "group_size": None}
    return Recipe.model_validate(values)


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8", "meta-fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_and_unfused_sources_give_the_same_weights(artifact, recipe, kind):
    fused = weights(artifact(recipe, kind))
    unfused = weights(artifact(recipe, kind, layout="unfused", shards=2))
    assert fused.keys() == unfused.keys()
    assert all(bits(fused[name]) == bits(unfused[name]) for name in fused)


def test_running_again_elsewhere_gives_the_same_bytes(checkpoint, artifact, tmp_path):
    run(checkpoint("scout"), "int4-rtn", tmp_path / "again")
    assert file_digests(tmp_path / "again") == file_digests(artifact("int4-rtn", "scout"))


def test_small_shards_hold_the_same_tensors(checkpoint, artifact, tmp_path):
    plan, result = run(checkpoint("scout"), "int4-rtn", tmp_path / "small", shard_bytes=200_000)
    assert len(plan.shards) > 3
    index = json.loads((result.out / "model.safetensors.index.json").read_text())
    one = weights(artifact("int4-rtn", "scout"))
    assert set(index["weight_map"]) == set(one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for file in set(index["weight_map"].values()):
        for name, tensor in load_file(result.out / file).items():
            assert index["weight_map"][name] == file
            assert bits(tensor) == bits(one[name])


def test_the_other_files_come_along_and_the_card_does_not(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("scout"), tmp_path / "source")
    (source / "LICENSE").write_text("licence text")
    (source / "README.md").write_text("card of the original")
    (source / "preprocessor_config.json").write_bytes(b"\x00\xff")
    _, result = run(source, "int4-rtn", tmp_path / "out")
    carried = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors", "README.md"}
    assert "LICENSE" in carried
    for name in carried:
        assert (result.out / name).read_bytes() == (source / name).read_bytes()
    assert {path.name for path in result.out.iterdir()} - carried == {"config.json", "model.safetensors", MANIFEST_NAME}


def test_the_manifest_holds_every_other_file(artifact):
    made = artifact("int4")
    manifest = json.loads((made / MANIFEST_NAME).read_text())
    shards = {name: entry["bytes"] for name, entry in manifest["shards"].items()}
    files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    sizes = {path.name: path.stat().st_size for path in made.iterdir()}
    assert sizes.keys() == {*files, *shards, MANIFEST_NAME}
    assert {name: (sizes[name], digest) for name, digest in file_digests(made).items() if name in files} == files
    assert shards == {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    for name, entry in manifest["shards"].items():
        raw = (made / name).read_bytes()
        prefix = raw[: 8 + int.from_bytes(raw[:8], "little")]
        assert entry["header_sha256"] == hashlib.sha256(prefix).hexdigest()
    headers = {n: e for name in shards for n, e in read_header(made / name, name).items()}
    assert {n: (e["dtype"], tuple(e["shape"])) for n, e in manifest["tensors"].items()} == {
        name: (entry.dtype, entry.shape) for name, entry in headers.items()
    }


def test_the_manifest_has_every_tensors_digest(artifact):
    made = artifact("int4", "maverick")
    manifest = json.loads((made / MANIFEST_NAME).read_text())
    digests = {name: hashlib.sha256(bits(tensor)).hexdigest() for name, tensor in weights(made).items()}
    assert {name: entry["sha256"] for name, entry in manifest["tensors"].items()} == digests
    assert manifest["recipe"]["name"] == "int4"
    assert manifest["source"]["parameters"] > 0
    assert str(made.parent) not in json.dumps(manifest)


@pytest.mark.parametrize("recipe", ["int4-rtn", "fp8", "int4"])
def test_a_tensor_written_whole_is_hashed_as_it_is_written(checkpoint, tmp_path, monkeypatch, recipe):
    read_back, digest = [], ShardWriter._digest
    monkeypatch.setattr(
        ShardWriter, "_digest", lambda writer, extent: (read_back.append(extent), digest(writer, extent))[1]
    )
    plan = quick_plan(checkpoint("scout"), recipe)
    run_plan(plan, tmp_path / "out")
    assert read_back == []


def test_nothing_but_the_artifact_is_left(artifact):
    made = artifact("int4-rtn", "scout")
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_progress_counts_every_byte_once(checkpoint, tmp_path):
    plan = make_plan(open_source(str(checkpoint("scout"))), load_recipe("fp8"))
    steps = []
    result = run_plan(plan, tmp_path / "out", shown=Shown(steps.append))
    assert sum(steps) == plan.read_bytes == result.read_bytes
    assert result.peak_rss_bytes > 0
    assert not result.resumed_bytes
