"""Tiny Llama 4 checkpoints with random weights: made by transformers' own model classes, saved in every source layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    PreTrainedModel,
)

Kind = Literal["scout", "maverick", "text"]
LayoutName = Literal["fused", "unfused"]

VOCABULARY, IMAGE_TOKEN, BOS, EOT, PAD = 384, 300, 256, 257, 258
SPECIAL = {BOS: "<|begin_of_text|>", EOT: "<|eot|>", PAD: "<|finetune_right_pad|>", 259: "<|header_start|>",
           260: "<|header_end|>", IMAGE_TOKEN: "<|image|>"}  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|header_start|>{{ message['role'] }}<|header_end|>\n\n"
    "{{ message['content'] }}<|eot|>{% endfor %}"
)

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "attention_chunk_size": 32, "floor_scale": 16, "attn_scale": 0.1, "attn_temperature_tuning": True,
    "max_position_embeddings": 1024, "no_rope_layers": [1, 1, 1, 0], "initializer_range": 0.08,
    "bos_token_id": BOS, "eos_token_id": EOT, "pad_token_id": PAD,
}  # fmt: skip
_SCOUT = {
    **_TEXT, "num_local_experts": 4, "interleave_moe_layer_step": 1, "use_qk_norm": True,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 1.0, "original_max_position_embeddings": 64},
}  # fmt: skip
_MAVERICK = {**_TEXT, "num_local_experts": 8, "interleave_moe_layer_step": 2, "use_qk_norm": False}
_VISION: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 56,
    "patch_size": 14, "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "initializer_range": 0.08,
}  # fmt: skip


def build(
    folder: Path,
    kind: Kind = "scout",
    layout: LayoutName = "fused",
    dtype: str = "bfloat16",
    seed: int = 0,
    shards: int = 1,
    **text: Any,
) -> Path:
    """Save a random checkpoint; the same arguments give the same bytes. Keywords change its text configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    model = _model(kind, seed, text)
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    kept = getattr(torch, dtype)
    state = {name: tensor.detach().to(kept).contiguous() for name, tensor in model.state_dict().items()}
    write_weights(folder, unfuse(state) if layout == "unfused" else state, shards)
    write_tokenizer(folder)
    return folder


def _model(kind: Kind, seed: int, text: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(seed)
    if kind == "text":
        model: PreTrainedModel = Llama4ForCausalLM(Llama4TextConfig(**{**_SCOUT, **text}))
        model.config.architectures = ["Llama4ForCausalLM"]
    else:
        base = _SCOUT if kind == "scout" else _MAVERICK
        config = Llama4Config(
            text_config={**base, **text}, vision_config=_VISION, boi_token_index=301, eoi_token_index=302,
            image_token_index=IMAGE_TOKEN,
        )  # fmt: skip
        model = Llama4ForConditionalGeneration(config)
        model.config.architectures = ["Llama4ForConditionalGeneration"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def unfuse(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights with one [out, in] tensor for each matrix of each expert."""
    result = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj" and tensor.ndim == 3:
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.T.chunk(2)
                result[f"{prefix}.{expert}.gate_proj.weight"] = gate.contiguous()
                result[f"{prefix}.{expert}.up_proj.weight"] = up.contiguous()
        elif last == "down_proj" and tensor.ndim == 3:
            for expert, matrix in enumerate(tensor):
                result[f"{prefix}.{expert}.down_proj.weight"] = matrix.T.contiguous()
        else:
            result[name] = tensor
    return result


def write_weights(folder: Path, state: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Save tensors in `shards` safetensors files, with an index when there are several."""
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in list(state)[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes and a few special tokens, with a chat template."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    specials = [SPECIAL.get(number, f"<|reserved_{number}|>") for number in range(256, VOCABULARY)]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOT],
        "pad_token": SPECIAL[PAD], "chat_template": TEMPLATE, "model_max_length": 1024,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
