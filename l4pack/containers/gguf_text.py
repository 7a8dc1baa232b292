"""What a GGUF file says of a Llama 4 text model, and what llama.cpp takes for granted of one and no file can change.

llama.cpp `src/models/llama4.cpp` and `llama-model.cpp`: chunks of 8192 tokens, every fourth layer without chunks and
rotary positions, its attention's temperature by steps of 8192 tokens, norms of queries and keys unless there are 128
experts. `attention.sliding_window` must be absent: 0 would switch chunks off and rotary positions on everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter

from l4pack.containers.assumed import refuse_others
from l4pack.model.config import Llama4Config, rope_numbers
from l4pack.quant.floats import Float32Array

CHUNK, FLOOR, TEMPERATURE, WITHOUT_NORMS = 8192, 8192, 0.1, 128


def check_text(config: Llama4Config) -> None:
    """Raise UsageError naming a value of the configuration that llama.cpp would answer wrongly with, saying nothing."""
    text = config.text
    kind = rope_numbers(config.raw, "text_config")["rope_type"]
    refuse_others(
        config,
        "llama.cpp",
        [
            (
                text.use_qk_norm != (text.num_local_experts != WITHOUT_NORMS),
                "use_qk_norm",
                f"queries and keys are normed unless there are {WITHOUT_NORMS} experts",
            ),
            (text.attention_bias, "attention_bias", "attention has no biases"),
            (kind not in ("default", "llama3"), "rope_scaling", "it scales positions as llama3 or not at all"),
        ],
    )


def context_length(config: Llama4Config) -> int:
    """Tokens up to which llama.cpp computes what the model does: all of its context, or those before chunks differ.

    Chunks of another size, or another temperature, change nothing before the first chunk ends or the first step comes.
    """
    text, raw = config.text, config.text_raw
    most = text.max_position_embeddings
    if text.attention_chunk_size != CHUNK:
        most = min(most, CHUNK, text.attention_chunk_size or CHUNK)
    floor = int(raw.get("floor_scale") or FLOOR)
    same = text.attn_temperature_tuning and floor == FLOOR and raw.get("attn_scale", TEMPERATURE) == TEMPERATURE
    return most if same else min(most, FLOOR - 1, floor - 1 if text.attn_temperature_tuning else FLOOR - 1)


def as_run(config: Llama4Config) -> Llama4Config:
    """The configuration with llama.cpp's chunks, and the context that the file says."""
    own = {"attention_chunk_size": CHUNK, "max_position_embeddings": context_length(config)}
    return config.model_copy(update={"text": config.text.model_copy(update=own)})


def describe_text(writer: GGUFWriter, config: Llama4Config) -> None:
    """Write the keys of the text model's numbers."""
    text = config.text
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(float(rope_numbers(config.raw, "text_config")["rope_theta"]))
    writer.add_expert_count(text.num_local_experts)
    writer.add_expert_used_count(text.num_experts_per_tok)
    writer.add_interleave_moe_layer_step(text.interleave_moe_layer_step)
    writer.add_vocab_size(text.vocab_size)


def rope_factors(config: Llama4Config) -> Float32Array | None:
    """What each rotary frequency is divided by, float32 [head_dim / 2]; None where none is scaled.

    As transformers' `_compute_llama3_parameters` (`modeling_rope_utils.py`), which multiplies by the inverse.
    """
    rope = rope_numbers(config.raw, "text_config")
    if rope["rope_type"] != "llama3":
        return None
    size = config.text.head_dim
    wavelengths = [2 * math.pi * rope["rope_theta"] ** (2 * index / size) for index in range(size // 2)]
    return np.array([_divisor(wavelength, rope) for wavelength in wavelengths], np.float32)


def _divisor(wavelength: float, rope: Mapping[str, Any]) -> float:
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = float(rope["original_max_position_embeddings"]) / wavelength
    if turns > high:
        return 1.0
    if turns < low or high == low:
        return factor
    smooth = (turns - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)
