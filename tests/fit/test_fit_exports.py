"""Fits for llama.cpp and MLX: what each can hold, and the exact bytes and memory of the files that they load."""

from __future__ import annotations

import json
from itertools import product

import pytest
from exporting import with_merge
from synthetic_sensitivity import ROUNDED, synthetic

from l4pack.budget.devices import find_host, load_devices
from l4pack.budget.files import CONTAINERS, open_files
from l4pack.budget.load import Load
from l4pack.budget.model import budget
from l4pack.checkpoint.open import open_source
from l4pack.errors import BudgetError, UsageError
from l4pack.export.ahead import planned_export
from l4pack.export.known import target_named
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.fit.budgets import Wish
from l4pack.fit.fit import fit
from l4pack.fit.record import fit_record
from l4pack.formats.known import FORMATS
from l4pack.formats.limits import LocalMatrix, hindrances
from l4pack.model.tensors import Role
from l4pack.plan.plan import make_plan
from l4pack.quant.scheme import Strategy
from l4pack.quantize.run import run_plan
from l4pack.recipe import RecipeScheme

WIDE = {"hidden_size": 256, "intermediate_size": 256, "intermediate_size_mlp": 512, "attention_chunk_size": 8192}
KINDS = {"scout": WIDE, "maverick": {"num_local_experts": 128, "attention_chunk_size": 8192}, "text": {}}
OPTIONS = (*ROUNDED, "fp8")
CONTEXT = 8


@pytest.fixture(scope="module")
def sources(checkpoint, tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = with_merge(checkpoint(kind, **KINDS[kind]), tmp_path_factory.mktemp("fit") / "source")
        return open_source(str(made[kind]))

    return make


def exported(source, recipe, runtime, folder):
    """The files that a recipe ends in, made."""
    artifact = run_plan(make_plan(source, recipe), folder / "artifact").out
    target = target_named(CONTAINERS[runtime])
    return run_export(plan_export(open_source(str(artifact)), target), folder / "export").out


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("runtime", CONTAINERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_as_large_as_was_said_and_take_the_memory(sources, tmp_path, kind, runtime):
    source = sources(kind)
    record = synthetic(source, seed=len(kind), options=OPTIONS)
    with pytest.raises(BudgetError, match=r"the smallest (GGUF|MLX) export that the runtime can load is") as caught:
        fit(source, record, Wish(max_bytes=1, runtime=runtime))
    least, most = int(caught.value.hint.split()[1]), fit(source, record, Wish(bits=15, runtime=runtime)).artifact_bytes
    bound = (3 * least + most) // 4
    fitted = fit(source, record, Wish(max_bytes=bound, runtime=runtime))
    out = exported(source, fitted.recipe, runtime, tmp_path)
    assert size(out) == fitted.artifact_bytes <= bound
    used = {one.option for one in fit_record(fitted).choice}
    assert len(used) > 1
    assert used <= {"keep", *ROUNDED} - ({"q4_k-rtn"} if runtime == "mlx" else set())
    load, host = Load(context=CONTEXT), find_host("m4-max-128", load_devices())
    real = budget(open_files(out), host, load, runtime)
    planned = budget(planned_export(make_plan(source, fitted.recipe), runtime).subject, host, load, runtime)
    assert [(line.name, line.low, line.high) for line in planned.lines] == [
        (line.name, line.low, line.high) for line in real.lines
    ]


def test_a_byte_less_than_the_least_is_too_little(sources):
    source = sources("scout")
    record = synthetic(source, options=OPTIONS)
    for runtime in CONTAINERS:
        with pytest.raises(BudgetError) as caught:
            fit(source, record, Wish(max_bytes=1, runtime=runtime))
        least = int(caught.value.hint.split()[1])
        assert fit(source, record, Wish(max_bytes=least, runtime=runtime)).artifact_bytes == least
        with pytest.raises(BudgetError):
            fit(source, record, Wish(max_bytes=least - 1, runtime=runtime))


def test_scales_of_a_source_in_float32_are_such_as_the_file_has(checkpoint, tmp_path):
    source = open_source(str(with_merge(checkpoint("text", dtype="float32"), tmp_path / "source")))
    record = synthetic(source, options=("int4-g32-rtn", "int8-g32"))
    fitted = fit(source, record, Wish(bits=9, runtime="llama.cpp"))
    assert {scheme.scale_dtype.value for scheme in fitted.recipe.schemes.values()} == {"float16"}
    assert size(exported(source, fitted.recipe, "llama.cpp", tmp_path)) == fitted.artifact_bytes


def _schemes():
    """Every scheme that some format takes."""
    for form in FORMATS.values():
        takes = form.accepts
        for bits, strategy, symmetric in product(takes.num_bits, takes.strategies, takes.symmetric):
            groups = takes.group_sizes if strategy in (Strategy.GROUP, Strategy.TENSOR_GROUP) else [None]
            blocks = takes.block_structures if strategy is Strategy.BLOCK else [None]
            for group, block in product(groups, blocks):
                values = {"num_bits": bits, "type": takes.type, "strategy": strategy, "symmetric": symmetric}
                values |= {} if group is None else {"group_size": group}
                values |= {} if block is None else {"block_structure": block}
                values |= {} if takes.scale_dtype is None else {"scale_dtype": takes.scale_dtype}
                yield form, RecipeScheme.model_validate({**values, "format": form.name})


@pytest.mark.parametrize("runtime", CONTAINERS)
def test_the_limits_as_data_are_those_of_what_carries_a_matrix(runtime):
    """For every scheme there is, and sizes that its groups divide."""
    target, tried = target_named(CONTAINERS[runtime]), set()
    for (form, scheme), columns in product(_schemes(), (24, 32, 96, 128, 160, 256, 1024, 5120)):
        if columns % scheme.column_multiple():
            continue
        matrices = [LocalMatrix("down_proj", 64, columns)]
        found = hindrances(form, scheme, Role.ROUTED_EXPERT, matrices, [runtime], weight_only=True)
        can = not isinstance(target.carrier(scheme, columns, "BF16"), str)
        assert can == (not found), (form.name, scheme, columns, found)
        tried.add((form.name, can))
    assert {name for name, can in tried if can} >= {"pack-quantized", "mxfp4-pack-quantized"}
    assert ("float-quantized", False) in tried


def test_a_model_that_llama_cpp_would_answer_wrongly_is_refused(checkpoint):
    source = open_source(str(checkpoint("maverick")))
    with pytest.raises(UsageError, match=r"use_qk_norm is not what llama\.cpp takes for granted"):
        fit(source, synthetic(source, options=OPTIONS), Wish(bits=6, runtime="llama.cpp"))


def test_layers_off_the_device_leave_it_room(sources):
    source = open_source("llama-4-scout")
    record = synthetic(source, options=OPTIONS)
    with pytest.raises(BudgetError, match=r"leave .* for weights") as caught:
        fit(source, record, Wish(device="rtx5090", context=8192, runtime="llama.cpp"))
    layers = int(caught.value.hint.partition("--gpu-layers ")[2].split()[0])
    wish = Wish(device="rtx5090", context=8192, runtime="llama.cpp", gpu_layers=layers)
    fitted = fit(source, record, wish)
    assert fitted.memory.fits
    assert fitted.recipe.promise is None
    with pytest.raises(UsageError, match="keeps all layers on the device"):
        fit(sources("text"), synthetic(sources("text")), Wish(device="h100", context=CONTEXT, gpu_layers=3))


def test_a_user_is_told_what_was_not_measured_and_what_to_type(sources, l4pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = sources("scout")
    asked = ("fit", source.store.folder, "--runtime", "llama.cpp", "--bits", "6")
    assert "lack" not in l4pack(*asked).err  # the stand-ins have them all
    synthetic(source, options=("int4-g32-rtn", "int8-g32")).write(tmp_path / "s.json")
    ended = l4pack(*asked, "--sensitivity", "s.json")
    assert ended.code == 0, ended.err
    said = " ".join(ended.err.split())
    assert "lack mxfp4, q4_k, int4-g32, which llama.cpp could have: l4pack measure SOURCE --options mxfp4,q4_k," in said
    assert "l4pack build SOURCE --export gguf --recipe fit.yaml" in " ".join(ended.out.split())
    assert "to be loaded by llama.cpp" in (tmp_path / "fit.yaml").read_text()


def test_one_command_fits_and_makes_the_runtimes_files(sources, l4pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = sources("scout")
    synthetic(source, options=OPTIONS).write(tmp_path / "s.json")
    asked = ("build", source.store.folder, "--fit", "--sensitivity", "s.json", "--out", "made", "--skip-evaluate")
    asked = (*asked, "--runtime", "llama.cpp", "--bits", "6", "--device", "m4-max-128", "--context", CONTEXT, "--json")
    asked = (*asked, "--base-model", "meta-llama/Llama-4-Tiny")
    ended = l4pack(*asked)
    assert ended.code in (0, 7), ended.err  # a tiny model has no licence to go with it
    found = json.loads(ended.out)
    assert found["budget"]["fits"]
    assert found["budget"]["serve"].startswith("llama-server --model made-gguf/")
