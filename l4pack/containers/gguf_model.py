"""What a GGUF file holds of Llama 4: its numbers as a configuration, and which role each tensor has.

For commands that read headers alone: names are spelled out here once more, and a test holds them against those that the
gguf library has and `export` writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from l4pack.containers.gguf_header import GgufFile, GgufTensor
from l4pack.errors import SourceError
from l4pack.model.config import TEXT_ONLY, Llama4Config, parse_config
from l4pack.model.tensors import Role

TEXT, TOWER = "llama4", "clip"
CHUNK, WITHOUT_NORMS = 8192, 128
_OUTER = {"token_embd": Role.EMBEDDING, "output": Role.LM_HEAD, "output_norm": Role.NORM, "rope_freqs": Role.NORM}
_IN_LAYER = {
    **dict.fromkeys(("attn_norm", "ffn_norm"), Role.NORM),
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), Role.ATTENTION),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), Role.DENSE_MLP),
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), Role.SHARED_EXPERT),
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), Role.ROUTED_EXPERT),
    "ffn_gate_inp": Role.ROUTER,
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,4})\.)?(?P<part>\w+)\.(?:weight|bias|scale|input_scale)")
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "expert_feed_forward_length",
    "intermediate_size_mlp": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_HINT = "give a GGUF file of Llama 4's text model"


def text_config(file: GgufFile) -> Llama4Config:
    """The text model as llama.cpp runs it. Raises SourceError naming a key that is missing or can't be."""
    name = file.path.name
    if file.architecture == TOWER:
        raise SourceError(f"{name} holds the vision tower alone", hint="name the text model's file, or the folder")
    if file.architecture != TEXT:
        raise SourceError(f"{name}: architecture {file.architecture!r} is not {TEXT!r}", hint=_HINT)
    raw: dict[str, Any] = {"model_type": TEXT_ONLY}
    for own, key in _KEYS.items():
        raw[own] = _key(file, f"{TEXT}.{key}")
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    raw["head_dim"] = file.values.get(f"{TEXT}.attention.key_length") or _divided(raw)
    raw["vocab_size"] = (shapes.get("token_embd.weight") or (file.values.get(f"{TEXT}.vocab_size"),))[0]
    raw["tie_word_embeddings"] = "output.weight" not in shapes
    raw |= {"attention_chunk_size": CHUNK, "use_qk_norm": raw["num_local_experts"] != WITHOUT_NORMS}
    return parse_config(raw, name)


def placed(tensor: GgufTensor) -> tuple[Role, int | None]:
    """A tensor's role and layer. Raises SourceError for a name that llama.cpp's Llama 4 does not have."""
    match = _NAME.fullmatch(tensor.name)
    layer = None if match is None or match["layer"] is None else int(match["layer"])
    known: Mapping[str, Role] = _OUTER if layer is None else _IN_LAYER
    role = None if match is None else known.get(match["part"])
    if role is None:
        raise SourceError(f"{tensor.file}: {tensor.name} is not a tensor of Llama 4", hint=_HINT)
    return role, layer


def expected_shapes(config: Llama4Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that llama.cpp must find, with its shape; `output.weight` where the head is not the embedding."""
    text = config.text
    hidden, experts, inner, dense = (
        text.hidden_size, text.num_local_experts, text.intermediate_size, text.intermediate_size_mlp,
    )  # fmt: skip
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    found: dict[str, tuple[int, ...]] = {"token_embd": (text.vocab_size, hidden), "output_norm": (hidden,)}
    found |= {} if text.tie_word_embeddings else {"output": (text.vocab_size, hidden)}
    attention = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (queries, hidden), "attn_k": (keys, hidden),
                 "attn_v": (keys, hidden), "attn_output": (hidden, queries)}  # fmt: skip
    routed = {"ffn_gate_inp": (experts, hidden), "ffn_gate_exps": (experts, inner, hidden),
              "ffn_up_exps": (experts, inner, hidden), "ffn_down_exps": (experts, hidden, inner),
              "ffn_gate_shexp": (inner, hidden), "ffn_up_shexp": (inner, hidden),
              "ffn_down_shexp": (hidden, inner)}  # fmt: skip
    plain = {"ffn_gate": (dense, hidden), "ffn_up": (dense, hidden), "ffn_down": (hidden, dense)}
    for layer in range(text.num_hidden_layers):
        parts = attention | (routed if layer in text.moe_layers else plain)
        found |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
    return {f"{name}.weight": shape for name, shape in found.items()}


def _key(file: GgufFile, key: str) -> Any:
    if key not in file.values:
        raise SourceError(f"{file.path.name}: key {key} is missing", hint=_HINT)
    return file.values[key]


def _divided(raw: Mapping[str, Any]) -> Any:
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None
