"""MLX exports: words, scales and biases as MLX defines them, held against what compressed-tensors makes of the artifact."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import quick_plan
from exporting import MIX, recipe_of
from upstream import decompressed, weights

from l4pack.checkpoint.open import open_source
from l4pack.errors import UsageError
from l4pack.export.mlx import Mlx
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.quantize.run import run_plan

LAYER = "language_model.model.layers.1."
EXPERTS = f"{LAYER}feed_forward.experts."
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
MIXES = {"integers": MIX, "mxfp4": recipe_of(routed_expert="mxfp4", shared_expert="mxfp4", attention="int8-g64")}


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    made = {}

    def make(kind, mix="integers"):
        if (kind, mix) not in made:
            place = tmp_path_factory.mktemp("mlx")
            artifact = run_plan(quick_plan(checkpoint(kind), MIXES[mix]), place / kind).out
            plan = plan_export(open_source(str(artifact)), Mlx(), split=400_000)
            made[kind, mix] = artifact, plan, run_export(plan, place / "out")
        return made[kind, mix]

    return make


def values_of(folder):
    """Every matrix by its module: scale * code + bias, codes cut out of the words bit by bit; and what is not quantized."""
    held, config = weights(folder), json.loads((folder / "config.json").read_text())
    found = {}
    for name, tensor in held.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and f"{module}.scales" in held:
            given = config["quantization"].get(module, config["quantization"])
            bits, size = given["bits"], given["group_size"]
            words = tensor.view(torch.int32).numpy().view(np.uint32)
            codes = np.stack([(words >> np.uint32(first)) & np.uint32(2**bits - 1) for first in range(0, 32, bits)], -1)
            codes = codes.reshape(*words.shape[:-1], -1, size)
            parts = [held[f"{module}.{part}"] for part in ("scales", "biases") if f"{module}.{part}" in held]
            scales = [part.float().numpy()[..., None] for part in parts]
            if given["mode"] == "mxfp4":
                values = np.float32(E2M1)[codes] * np.exp2(scales[0] - 127)
            else:
                values = codes.astype(np.float32) * scales[0] + scales[1]
            found[module] = values.reshape(*words.shape[:-1], -1)
        elif suffix not in ("scales", "biases"):
            found[module] = tensor.float().numpy()
    return found


@pytest.mark.parametrize(
    ("kind", "mix"), [("scout", "integers"), ("maverick", "integers"), ("text", "integers"), ("scout", "mxfp4")]
)
def test_a_folder_holds_the_artifacts_numbers(exported, kind, mix):
    artifact, plan, result = exported(kind, mix)
    found = values_of(result.out)
    prefix = "language_model." if kind == "text" else ""
    plain = {name.removesuffix(".weight"): one for name, one in weights(artifact).items() if name.endswith(".weight")}
    left = {f"{prefix}{name}": one for name, one in {**plain, **decompressed(artifact, exact=True)}.items()}
    for module, values in found.items():
        if ".experts." in module:
            where, _, projection = module.rpartition(".")
            wanted = np.stack([left.pop(f"{where}.{expert}.{projection}").numpy() for expert in range(len(values))])
        else:
            wanted = left.pop(module).float().numpy()
        np.testing.assert_array_equal(values, wanted, err_msg=module)
    assert all("vision" in name or "multi_modal" in name for name in left)
    assert result.proof.matrices == plan.matrices
    assert {path.name: path.stat().st_size for path in result.out.iterdir()} == plan.files


def test_words_and_scales_are_the_artifacts_own_bytes(exported):
    artifact, _, result = exported("scout")
    source, made = weights(artifact), weights(result.out)
    packed = torch.stack([source[f"{EXPERTS}{expert}.up_proj.weight_packed"] for expert in range(4)])
    scales = torch.stack([source[f"{EXPERTS}{expert}.up_proj.weight_scale"] for expert in range(4)])
    assert torch.equal(made[f"{EXPERTS}up_proj.weight"].view(torch.int32), packed)
    assert torch.equal(made[f"{EXPERTS}up_proj.scales"], scales)
    assert torch.equal(made[f"{EXPERTS}up_proj.biases"], -8 * scales)


def test_the_configuration_says_each_modules_group_and_both_spellings_of_rotary_numbers(exported):
    _, _, result = exported("scout")
    config = json.loads((result.out / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    modules = {name.removesuffix(".scales") for name in weights(result.out) if name.endswith(".scales")}
    for module in modules:
        given = config["quantization"].get(module, config["quantization"])
        assert given["mode"] == "affine"
        assert (given["bits"], given["group_size"]) == (
            (4, 64) if ".experts." in module else (8, 128) if "self_attn" in module else (8, 64)
        )
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 500000.0
    assert text["rope_scaling"]["rope_type"] == "llama3"
    assert config["model_type"] == "llama4"
    assert "vision_config" not in config


def test_a_text_model_is_one_that_mlx_lm_knows(exported):
    _, _, result = exported("text")
    config = json.loads((result.out / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"]) == ("llama4", "llama4_text")
    assert (result.out / "tokenizer.json").exists()


def test_bytes_of_mxfp4_are_the_artifacts_own(exported):
    artifact, _, result = exported("scout", "mxfp4")
    source, made = weights(artifact), weights(result.out)
    for ours, theirs in {"weight_packed": "weight", "weight_scale": "scales"}.items():
        wanted = torch.stack([source[f"{EXPERTS}{expert}.down_proj.{ours}"] for expert in range(4)])
        assert torch.equal(made[f"{EXPERTS}down_proj.{theirs}"].view(torch.uint8), wanted)
    assert f"{EXPERTS}down_proj.biases" not in made
    config = json.loads((result.out / "config.json").read_text())
    assert {key: config["quantization"][key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 32, "bits": 4, "mode": "mxfp4",
    }  # fmt: skip


@pytest.mark.parametrize(("scheme", "says"), [("fp8", "hold integers, not FP8"), ("nvfp4", "global scales of NVFP4")])
def test_what_would_be_rounded_is_refused(checkpoint, tmp_path, scheme, says):
    artifact = run_plan(quick_plan(checkpoint("scout"), recipe_of(routed_expert=scheme)), tmp_path / "artifact").out
    with pytest.raises(UsageError, match=says):
        plan_export(open_source(str(artifact)), Mlx())
    result = run_export(plan_export(open_source(str(artifact)), Mlx(), lossy=True), tmp_path / "out")
    assert result.proof.rounded == 48
    assert 0 < result.proof.largest_error < 0.05


def test_embeddings_are_rounded_where_that_is_asked_for(exported, tmp_path):
    artifact = exported("scout")[0]
    plan = plan_export(open_source(str(artifact)), Mlx(), round_embeddings=True)
    assert run_export(plan, tmp_path / "out").proof.rounded == 2
    found, wanted = values_of(tmp_path / "out"), weights(artifact)
    for module in ("language_model.model.embed_tokens", "language_model.lm_head"):
        groups = wanted[f"{module}.weight"].float().numpy().reshape(-1, 32)
        step = np.abs(groups).max(-1, keepdims=True) / 127
        assert (np.abs(found[module].reshape(-1, 32) - groups) <= 0.8 * step).all()


def test_a_tied_head_is_written_out(checkpoint, tmp_path):
    source = checkpoint("text", tie_word_embeddings=True)
    result = run_export(plan_export(open_source(str(source)), Mlx()), tmp_path / "out")
    made = weights(result.out)
    embedding = made["language_model.model.embed_tokens.weight"]
    assert torch.equal(made["language_model.lm_head.weight"], embedding)
