"""The folder that mlx-lm loads: safetensors files, their index, and a config.json with the scheme of every module.

mlx-lm `models/llama4.py` and `utils.py`, `load_model`: the text model alone, experts of a layer stacked, `scales` and
`biases` beside `weight`; what has no scales stays as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from l4pack.containers.assumed import refuse_others
from l4pack.containers.safetensors_folder import SafetensorsFolder
from l4pack.model import parts
from l4pack.model.config import MULTIMODAL, SECTIONS, STANZA_KEYS, Llama4Config, rope_numbers
from l4pack.model.names import split_suffix
from l4pack.model.tensors import MULTIMODAL_NAMING, Naming, Role, rename

FOLDER = SafetensorsFolder("mlx")
NORM_EPS = 1e-6
_SECTION = SECTIONS[0]
_ARCHITECTURE = "Llama4ForConditionalGeneration"
# What mlx-lm has no default for.
_NEEDED = (
    "attention_bias", "attention_chunk_size", "head_dim", "hidden_size", "interleave_moe_layer_step", "intermediate_size",
    "intermediate_size_mlp", "max_position_embeddings", "num_attention_heads", "num_experts_per_tok",
    "num_hidden_layers", "num_key_value_heads", "num_local_experts", "rms_norm_eps", "use_qk_norm", "vocab_size",
)  # fmt: skip


class Group(NamedTuple):
    """How a module's groups are stored, in mlx-lm's words."""

    group_size: int
    bits: int
    mode: str


def check_text(config: Llama4Config) -> None:
    """Raise UsageError naming a value of the configuration that mlx-lm would answer wrongly with, or not load."""
    chunk = config.text.attention_chunk_size
    refuse_others(config, "mlx-lm", [(chunk is None, "attention_chunk_size", "attention goes by chunks")])


def tensor_name(name: str, naming: Naming, role: Role, layer: int | None, suffix: str) -> str:
    """The name of a tensor, from that of one of its matrices (a module) or of the tensor in an artifact."""
    module, own = split_suffix(name)
    last = suffix or own or parts.WEIGHT
    if role is Role.ROUTED_EXPERT:
        assert layer is not None
        projection = module.rpartition(".")[2]
        return f"{MULTIMODAL_NAMING.layer(layer)}{parts.FEED_FORWARD}.{parts.EXPERTS}.{projection}.{last}"
    return rename(f"{module}.{last}", naming, MULTIMODAL_NAMING)


def configuration(config: Llama4Config, groups: Mapping[str, Group]) -> bytes:
    """The bytes of config.json: the text model's numbers, rotary ones in both spellings, and each module's group."""
    without = {*STANZA_KEYS, *SECTIONS}
    whole = {} if config.raw.get("model_type") != MULTIMODAL else config.raw
    raw: dict[str, Any] = {key: value for key, value in whole.items() if key not in without}
    raw |= {"model_type": MULTIMODAL, "architectures": [_ARCHITECTURE], _SECTION: _text(config)}
    if groups:
        raw["quantization"] = raw[STANZA_KEYS[0]] = _quantization(groups)
    return (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode()


def _text(config: Llama4Config) -> dict[str, Any]:
    given = {key: value for key, value in config.text_raw.items() if key not in STANZA_KEYS}
    rope = rope_numbers(config.raw, _SECTION)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        **{key: getattr(config.text, key) for key in _NEEDED},
        **given,
        "model_type": "llama4_text",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
    }


def _quantization(groups: Mapping[str, Group]) -> dict[str, Any]:
    """The most common group, and by module those that differ."""
    (usual, _), *_ = Counter(groups.values()).most_common(1)
    return usual._asdict() | {module: group._asdict() for module, group in groups.items() if group != usual}
