"""The catalogue of a model's tensors, against published totals and against transformers' own modules."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

from l4pack.model.config import known_config, parse_config
from l4pack.model.tensors import MULTIMODAL_NAMING, TEXT_ONLY_NAMING, Naming, Role, catalogue, rename
from l4pack.quant.layout import Layout

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 80, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 28,
    "patch_size": 14, "projector_input_dim": 20, "projector_output_dim": 28, "vision_output_dim": 36,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "parameters", "tensors", "text_only"),
    [
        ("llama-4-scout", 108_641_793_536, 1_133, 107_769_861_120),
        ("llama-4-maverick", 401_583_781_376, 1_061, 400_711_848_960),
    ],
)
def test_published_totals(model, parameters, tensors, text_only):
    found = catalogue(known_config(model))
    assert found.parameters == parameters
    assert len(found.tensors) == tensors
    assert parameters - text_only == sum(
        spec.numel for spec in found.tensors if spec.role in (Role.VISION, Role.PROJECTOR)
    )
    unfused = catalogue(known_config(model), fused=False)
    assert unfused.parameters == parameters


def test_shares_of_the_routed_experts():
    for model, percent in (("llama-4-scout", 88.95), ("llama-4-maverick", 96.26)):
        found = catalogue(known_config(model))
        routed = sum(spec.numel for spec in found.tensors if spec.role is Role.ROUTED_EXPERT)
        assert round(100 * routed / found.parameters, 2) == percent


CHANGES = {
    "scout-like": {},
    "maverick-like": {"interleave_moe_layer_step": 2, "use_qk_norm": False},
    "biased": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "listed MoE layers": {"moe_layers": [0, 3]},
    "dense only": {"moe_layers": []},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_text_model_has_the_tensors_of_transformers(change):
    raw = {"model_type": "llama4_text", **TEXT, **change}
    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4TextConfig(**TEXT, **change))
    assert _shapes(raw) == _saved(model)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_multimodal_model_has_the_tensors_of_transformers(change):
    raw = {"model_type": "llama4", "text_config": {**TEXT, **change},
           "vision_config": {**VISION, "multi_modal_projector_bias": True}}  # fmt: skip
    with torch.device("meta"):
        config = Llama4Config(text_config=raw["text_config"], vision_config=raw["vision_config"])
        model = Llama4ForConditionalGeneration(config)
    assert _shapes(raw) == _saved(model)


def _shapes(raw):
    return {spec.name: spec.shape for spec in catalogue(parse_config(raw)).tensors}


def _saved(model):
    """What save_pretrained keeps: no tied copies."""
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def test_linears_are_the_linear_modules_of_transformers():
    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4TextConfig(**TEXT, interleave_moe_layer_step=2))
    theirs = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(("router", "lm_head"))
    }
    raw = {"model_type": "llama4_text", **TEXT, "interleave_moe_layer_step": 2}
    ours = catalogue(parse_config(raw)).linears
    outside = {linear.module: (linear.out_features, linear.in_features) for linear in ours if linear.expert is None}
    assert outside == theirs
    assert len(ours) - len(outside) == 2 * 3 * 3  # MoE layers, experts, projections


def test_the_places_of_experts_in_fused_tensors_tile_them():
    found = catalogue(parse_config({"model_type": "llama4_text", **TEXT}))
    covered = {}
    for linear in found.linears:
        if linear.layout is Layout.IN_OUT:
            columns = set(range(linear.column, linear.column + linear.out_features))
            cells = covered.setdefault((linear.tensor, linear.expert), set())
            assert not cells & columns
            cells |= columns
            assert found.by_name[linear.tensor].shape[1] == linear.in_features
    assert len(covered) == 4 * 3 * 2
    assert all(cells == set(range(found.by_name[tensor].shape[2])) for (tensor, _), cells in covered.items())


@pytest.mark.parametrize(
    "naming", [MULTIMODAL_NAMING, Naming("model.language_model.", "lm_head", "model.vision_model.", "model.mmp.")]
)
def test_rename_is_undone_by_its_opposite(naming):
    config = known_config("llama-4-maverick")
    new = [spec.name for spec in catalogue(config, naming).tensors]
    assert [rename(name, naming, MULTIMODAL_NAMING) for name in new] == [
        spec.name for spec in catalogue(config).tensors
    ]
    with pytest.raises(ValueError, match="none of the prefixes"):
        rename("elsewhere.weight", naming, MULTIMODAL_NAMING)


def test_text_only_names_have_no_outer_prefix():
    found = catalogue(parse_config({"model_type": "llama4_text", **TEXT}))
    assert found.naming == TEXT_ONLY_NAMING
    assert {re.sub(r"\d+", "N", spec.name).partition("N")[0] for spec in found.tensors} == {
        "model.embed_tokens.weight", "model.layers.", "model.norm.weight", "lm_head.weight",
    }  # fmt: skip
