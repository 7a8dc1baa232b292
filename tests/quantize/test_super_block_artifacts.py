"""Artifacts of super-blocks: planned bytes, what verify says, and GGUF files that hold their bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import quick_plan, quick_recipe
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_fp4_artifacts import errors, rounding
from transformers import AutoConfig, Llama4ForConditionalGeneration

from l4pack.artifact.manifest import MANIFEST_NAME
from l4pack.artifact.manifest_schema import read_manifest
from l4pack.checkpoint.open import open_source
from l4pack.errors import RecipeError, UsageError
from l4pack.export.gguf import Gguf
from l4pack.export.mlx import Mlx
from l4pack.export.plan import plan_export
from l4pack.export.run import run_export
from l4pack.formats.configuration import as_compressed_tensors
from l4pack.plan.plan import make_plan
from l4pack.publish.card import render_card
from l4pack.publish.licence import folder_materials, governing_policy
from l4pack.publish.publish import Wishes, gather_facts
from l4pack.quantize.run import run_plan
from l4pack.stream.weights import Weights

WIDE = {"hidden_size": 256, "intermediate_size": 256}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """An artifact that was solved, and its source."""
    source = checkpoint("scout", **WIDE)
    return run_plan(quick_plan(source, "gguf-q4_k"), tmp_path_factory.mktemp("q4k") / "made").out, source


def test_what_is_written_is_what_was_planned_and_verified(made, checkpoint, tmp_path):
    artifact, source = made
    plan = quick_plan(source, "gguf-q4_k")
    assert {path.name: path.stat().st_size for path in artifact.iterdir()} == plan.files
    assert any("export --to gguf" in warning for warning in plan.warnings())
    assert errors(artifact, source) == []
    rounded = run_plan(quick_plan(checkpoint("maverick", **WIDE), rounding("gguf-q4_k")), tmp_path / "rounded").out
    assert errors(rounded, checkpoint("maverick", **WIDE)) == []


def test_the_file_has_the_values_that_evaluation_computes_with(made, tmp_path):
    artifact, _ = made
    checkpoint = open_source(str(artifact))
    plan = plan_export(checkpoint, Gguf())
    folder = run_export(plan, tmp_path / "out").out
    assert sum(path.stat().st_size for path in folder.iterdir()) == plan.artifact_bytes
    tensors = {one.name: one for one in gguf.GGUFReader(next(folder.glob("[!m]*.gguf"))).tensors}
    with Weights(checkpoint, torch.device("cpu"), torch.float32) as weights:
        for projection, name in EXPERTS.items():
            stack = tensors[f"blk.1.{name}.weight"]
            assert stack.tensor_type.name == "Q4_K"
            theirs = gguf.dequantize(stack.data, stack.tensor_type)
            for expert in range(len(theirs)):
                module = f"language_model.model.layers.1.feed_forward.experts.{expert}.{projection}"
                ours = weights.linears([module])[module].weight.numpy()
                np.testing.assert_array_equal(ours.view(np.uint32), theirs[expert].view(np.uint32))


def test_a_damaged_scale_is_found(made, tmp_path):
    artifact, source = made
    for path in artifact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / MANIFEST_NAME).unlink()
    file = next(file for file in sorted(tmp_path.glob("*.safetensors")) if any(_scales(load_file(file))))
    tensors = load_file(file)
    name = next(_scales(tensors))
    tensors[name][5, 1] = 0x7C  # makes d infinite
    save_file(tensors, file, {"format": "pt"})
    assert any(message.startswith("scale:") for message in errors(tmp_path, source))


def _scales(tensors):
    return (name for name in tensors if name.endswith("weight_scale") and tensors[name].dtype is torch.uint8)


def test_runtimes_refuse_it_and_mlx_says_why(made):
    artifact, _ = made
    with pytest.raises((ValueError, RuntimeError), match="q4_k"):
        Llama4ForConditionalGeneration.from_pretrained(artifact, config=AutoConfig.from_pretrained(artifact))
    with pytest.raises(UsageError, match="6-bit scales"):
        plan_export(open_source(str(artifact)), Mlx())
    assert as_compressed_tensors({"weights": None})["format"] == "pack-quantized"


def test_budget_and_card_send_people_to_the_file(made, tmp_path, l4pack):
    artifact = Path(shutil.copytree(made[0], tmp_path / "Llama-4-Tiny"))
    for asked in ((artifact,), ("llama-4-scout", "--recipe", "gguf-q4_k")):
        ended = l4pack("budget", *asked)
        assert ended.code == 2
        assert "vllm does not load" in ended.err
        assert "it is for llama.cpp" in ended.err
    materials = folder_materials(artifact)
    facts = gather_facts(
        artifact, "Llama-4-Tiny-Q4_K", governing_policy(materials), read_manifest(artifact), None, None, Wishes()
    )
    card = ModelCard(render_card(facts))
    assert card.data.library_name == "l4pack"
    assert "vllm" not in card.content.lower()
    assert "l4pack export Llama-4-Tiny-Q4_K --to gguf" in card.text


def test_a_model_that_is_too_narrow_is_refused_with_what_is_not(checkpoint):
    with pytest.raises(RecipeError, match="super-blocks of 256, does not divide the 128") as caught:
        make_plan(open_source(str(checkpoint("scout"))), quick_recipe("gguf-q4_k"))
    assert "int4-g32" in caught.value.hint
