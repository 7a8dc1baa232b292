"""Write the demo model as the BF16 Llama 4 repositories are laid out: fused experts, several shards and an index."""

import json
from pathlib import Path
from typing import Any

import torch
from demo_model import Params, Preset
from demo_tokenizer import BEGIN, EOM, EOT, IMAGE_END, IMAGE_START, PAD, PATCH
from demo_tokenizer import END as END_OF_TEXT
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration

SHARD_BYTES = 4_500_000
IMAGE_SIZE, PATCH_SIZE = 56, 14
CONTEXT = 2048


def write_checkpoint(sizes: Preset, params: Params, tokenizer: Tokenizer, folder: Path, seed: int) -> None:
    """Write the weights and every JSON file but the tokenizer's. The vision tower is random, from `seed`."""
    config = config_json(sizes, tokenizer)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation(tokenizer))
    _write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    _write_json(folder / "processor_config.json", PROCESSOR)
    text = {name: value.detach().to(torch.bfloat16) for name, value in params.items()}
    _write_shards({**text, **_vision(config, seed)}, folder)


def config_json(sizes: Preset, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json in the spelling of the published Llama 4 repositories."""
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": tokenizer.token_to_id(IMAGE_START),
        "eoi_token_index": tokenizer.token_to_id(IMAGE_END),
        "image_token_index": tokenizer.token_to_id(PATCH),
        "model_type": "llama4",
        "text_config": _text_config(sizes, tokenizer),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": VISION,
    }


def _text_config(sizes: Preset, tokenizer: Tokenizer) -> dict[str, Any]:
    layers = range(sizes.num_hidden_layers)
    return {
        "attention_bias": False,
        "attention_chunk_size": sizes.attention_chunk_size,
        "attention_dropout": 0.0,
        "attn_scale": sizes.attn_scale,
        "attn_temperature_tuning": True,
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": _ends(tokenizer),
        "floor_scale": sizes.floor_scale,
        "for_llm_compressor": False,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": sizes.interleave_moe_layer_step,
        "intermediate_size": sizes.intermediate_size,
        "intermediate_size_mlp": sizes.intermediate_size_mlp,
        "max_position_embeddings": CONTEXT,
        "model_type": "llama4_text",
        "no_rope_layers": [int(sizes.has_rope(layer)) for layer in layers],
        "num_attention_heads": sizes.num_attention_heads,
        "num_experts_per_tok": 1,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_key_value_heads": sizes.num_key_value_heads,
        "num_local_experts": sizes.num_local_experts,
        "output_router_logits": False,
        "pad_token_id": tokenizer.token_to_id(PAD),
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": sizes.rope_theta,
        "router_aux_loss_coef": 0.01,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": sizes.use_qk_norm,
        "vocab_size": sizes.vocab_size,
    }


VISION = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 64,
    "image_size": IMAGE_SIZE,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": PATCH_SIZE,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
    "rope_theta": 10000,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 128,
}

PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Llama4ImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_patches": 4,
    "processor_class": "Llama4Processor",
    "resample": 2,
    "rescale_factor": 1 / 255,
    "resize_to_max_canvas": False,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}

PROCESSOR = {
    "fake_image_token": "<|image|>",
    "image_token": "<|image|>",
    "patch_size": PATCH_SIZE,
    "pixel_shuffle_ratio": 0.5,
    "processor_class": "Llama4Processor",
}


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "do_sample": True,
        "eos_token_id": _ends(tokenizer),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "temperature": 0.6,
        "top_p": 0.9,
    }


def _ends(tokenizer: Tokenizer) -> list[int]:
    return [int(tokenizer.token_to_id(token)) for token in (END_OF_TEXT, EOM, EOT)]


def _vision(config: dict[str, Any], seed: int) -> Params:
    """Random weights of the vision tower and the projector, as transformers initialises them."""
    torch.manual_seed(seed)
    state = Llama4ForConditionalGeneration(Llama4Config(**config)).state_dict()
    return {
        name: value.to(torch.bfloat16)
        for name, value in state.items()
        if name.startswith(("vision_model.", "multi_modal_projector."))
    }


def _write_shards(tensors: Params, folder: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in tensors.items():
        if shards[-1] and _size(shards[-1]) + value.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = value.contiguous()
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": _size(tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
