"""A Llama 4 checkpoint small enough to make in a test: the files of a repository, by name."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save

from l4pack.model.config import parse_config
from l4pack.model.tensors import catalogue

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4,
    "interleave_moe_layer_step": 2, "attention_chunk_size": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28,
    "patch_size": 14, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16,
}  # fmt: skip
CONFIG = {
    "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "torch_dtype": "bfloat16",
    "text_config": TEXT, "vision_config": VISION,
}  # fmt: skip


def checkpoint_files(shards: int = 3, config: dict[str, object] = CONFIG) -> dict[str, bytes]:
    """config.json, index, shards of float16 numbers, and a few companions."""
    rng = np.random.default_rng(4)
    specs = catalogue(parse_config(config)).by_name
    tensors = {name: rng.standard_normal(spec.shape).astype(np.float16) for name, spec in specs.items()}
    parts = {f"model-{i + 1:05}-of-{shards:05}.safetensors": sorted(tensors)[i::shards] for i in range(shards)}
    weight_map = {name: file for file, names in parts.items() for name in names}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        "tokenizer_config.json": b'{"model_max_length": 64}',
        "README.md": b"---\nlanguage:\n- en\n---\n",
        **{file: save({name: tensors[name] for name in names}) for file, names in parts.items()},
    }
