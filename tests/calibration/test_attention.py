"""Attention that is solved: for what the artifact itself gives each matrix, written, resumed and recorded as MLPs are."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_model
from conftest import file_digests
from killing import Killed, killed_after
from models import build
from whole_model import one_thread  # noqa: F401

from l4pack.artifact.calibration_record import RECORD_NAME
from l4pack.calibration import problems
from l4pack.calibration.attention import OUTPUT, PROJECTIONS
from l4pack.calibration.text import with_text
from l4pack.checkpoint.open import open_source
from l4pack.plan.plan import Plan, make_plan
from l4pack.quantize.run import run_plan
from l4pack.recipe import Recipe
from l4pack.stream.layer import Blocks

LAYERS, SAMPLES, LENGTH, CHUNK = 4, 5, 80, 32
SHAPE = {"head_dim": 64, "attention_chunk_size": CHUNK, "attention_bias": True}  # wider than the hidden states
SCHEME = {"format": "pack-quantized", "num_bits": 4, "group_size": 32, "method": "gptq", "gptq": {"sweeps": 2}}


def recipe(roles: list[str], **gptq: Any) -> Recipe:
    values = {
        "name": "attention", "title": "Attention", "schemes": {"int4": SCHEME | {"gptq": {"sweeps": 2} | gptq}},
        "rules": [{"roles": roles, "scheme": "int4"}, {"roles": "all", "scheme": "keep"}],
        "calibration": {"samples": SAMPLES, "sequence_length": LENGTH, "max_cold_experts": 1.0},
    }  # fmt: skip
    return Recipe.model_validate(values)


EVERYTHING = ["attention", "dense_mlp", "shared_expert", "routed_expert"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("attention") / "tiny-maverick", "maverick", **SHAPE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("\n\n".join(f"{number} and {number * number % 997} are numbers" for number in range(300)))
    return path


def planned(source: Path, text: Path, **gptq: Any) -> Plan:
    return with_text(make_plan(open_source(str(source)), recipe(EVERYTHING, **gptq)), str(text))


@pytest.fixture(scope="module")
def solved(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory):
    """A plan, its artifact, and the moments that its attention was solved for, in order; pieces come whole and in blocks."""
    found, moments_of = [], problems.moments_of

    def spy(*arguments: Any):
        moments = moments_of(*arguments)
        finish = moments.finish
        moments.finish = lambda: found.append(finish()) or found[-1]
        return moments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l4pack.calibration.attention.moments_of", spy)
        patch.setattr("l4pack.calibration.problems.gptq.prepare_problem", _copied(problems.gptq.prepare_problem))
        patch.setattr(Blocks, "on", classmethod(lambda cls, *_: cls(attention=48, rows=50)))
        plan = planned(source, text)
        return plan, run_plan(plan, tmp_path_factory.mktemp("solved") / "artifact").out, found


def _copied(prepare: Any) -> Any:
    """Solving uses moments up: it gets copies."""

    def prepared(hessian: torch.Tensor, **options: Any) -> Any:
        given = {name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in options.items()}
        return prepare(hessian.clone(), **given)

    return prepared


def test_matrices_are_solved_for_what_the_artifact_gives_them(solved, source):
    """Against hooks on whole models of transformers': the artifact's inputs, and how the original's differ."""
    plan, folder, found = solved
    sequences = [item.tokens for item in plan.text.sequences]
    served = seen(whole_model.load(folder, quantized=True, dtype=torch.bfloat16), sequences)
    original = seen(whole_model.load(source), sequences)
    assert len(found) == 2 * LAYERS
    for number, moments in enumerate(found):
        name = f"{number // 2}.{(PROJECTIONS[0], OUTPUT)[number % 2]}"
        x, before = served[name], original[name]
        hessian = x.T @ x / len(x)
        close = {"rtol": 1e-3, "atol": 2e-5 * hessian.diagonal().mean().item(), "msg": name}
        torch.testing.assert_close(moments.hessian.double(), hessian, **close)
        torch.testing.assert_close(moments.cross.double(), (before - x).T @ x / len(x), **close)


def seen(model: Any, sequences: list[Any]) -> dict[str, torch.Tensor]:
    """Inputs of the first projection and of the last in every layer, float64 [tokens, in]."""
    inputs = defaultdict(list)
    for number, layer in enumerate(model.language_model.model.layers):
        for name in (PROJECTIONS[0], OUTPUT):
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, key=f"{number}.{name}": inputs[key].append(args[0][0].double())
            )
    whole_model.logits(model, sequences)
    return {name: torch.cat(parts) for name, parts in inputs.items()}


def test_the_record_has_every_matrix_and_what_solving_took_off(solved, source, l4pack):
    plan, folder, _ = solved
    matrices = json.loads((folder / RECORD_NAME).read_bytes())["matrices"]
    attention = {name: one for name, one in matrices.items() if "self_attn" in name}
    assert len(attention) == 4 * LAYERS
    for name, one in attention.items():
        assert one["method"] == "gptq", name
        assert one["error"] < 0.8 * one["rtn_error"], name
        assert (one["tokens"], one["borrowed_tokens"]) == (SAMPLES * LENGTH, 0)
    assert sum(plan.files.values()) == plan.artifact_bytes
    ended = l4pack("verify", folder, "--against", source, "--json")
    assert json.loads(ended.out)["ok"] is True, ended.out


@pytest.mark.parametrize("records", [0, 1, 12])
def test_killed_before_or_after_attention_it_ends_in_the_same_bytes(
    source, text, tmp_path, monkeypatch, records, undisturbed
):
    plan, out = planned(source, text), tmp_path / "out"
    with monkeypatch.context() as context:
        killed_after(context, records)
        with pytest.raises(Killed):
            run_plan(plan, out)
    assert file_digests(run_plan(plan, out).out) == undisturbed


@pytest.fixture(scope="module")
def undisturbed(source, text, tmp_path_factory) -> dict[str, str]:
    return file_digests(run_plan(planned(source, text), tmp_path_factory.mktemp("undisturbed") / "out").out)


def test_attention_alone_aims_at_the_original_or_not(source, text, tmp_path):
    """With MLPs as they are, and one stream or two."""
    for asymmetric in (0.0, 1.0):
        wanted = recipe(["attention"], asymmetric=asymmetric)
        plan = with_text(make_plan(open_source(str(source)), wanted), str(text))
        assert plan.needs.streams == 1 + (asymmetric > 0)
        out = run_plan(plan, tmp_path / str(asymmetric)).out
        assert len(json.loads((out / RECORD_NAME).read_bytes())["matrices"]) == 4 * LAYERS


def test_fp8_is_solved_too(source, text, tmp_path, l4pack):
    values = recipe(["attention"]).model_dump()
    values["schemes"]["int4"] = {
        "format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "channel", "activations": "dynamic_token",
        "method": "gptq", "gptq": {"sweeps": 2},
    }  # fmt: skip
    out = run_plan(
        with_text(make_plan(open_source(str(source)), Recipe.model_validate(values)), str(text)), tmp_path / "fp8"
    ).out
    matrices = json.loads((out / RECORD_NAME).read_bytes())["matrices"]
    assert len(matrices) == 4 * LAYERS
    assert all(one["error"] < 0.8 * one["rtn_error"] for one in matrices.values())
    assert json.loads(l4pack("verify", out, "--against", source, "--json").out)["ok"] is True


def test_what_mlps_alone_may_have_is_refused():
    values = recipe(["attention"]).model_dump()
    values["schemes"]["int4"]["gptq"]["two_sided"] = True
    with pytest.raises(ValueError, match=r"rules\.0\.roles: two_sided carries gradients back through MLPs alone"):
        Recipe.model_validate(values)
    values["schemes"]["int4"] = {
        "format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "tensor",
        "activations": "static_tensor",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"rules\.0\.roles: fixed scales of inputs are found for MLPs alone"):
        Recipe.model_validate(values)
