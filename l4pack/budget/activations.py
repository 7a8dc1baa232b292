"""Transient bytes of one forward pass, and the tables a runtime keeps for requests and positions.

A pass has phases whose tensors do not live at the same time: images through the vision tower, tokens through one layer,
logits through the sampler. The peak is the largest phase, with the images' embeddings kept beside the last two. Each phase
is counted twice: `low` holds the tensors that must be alive at its widest point, `high` adds the copies that kernels and
streams may hold besides. Buffers of `vllm/v1/worker/gpu_model_runner.py` (`profile_run`) and of the fused experts
(`fused_moe/experts/marlin_moe.py`, `workspace_shapes`).
"""

from __future__ import annotations

from dataclasses import dataclass

from l4pack.budget.kv import groups
from l4pack.budget.load import Setting
from l4pack.budget.runtimes import Runtime
from l4pack.model.config import Llama4Config, TextConfig, VisionConfig

ACTIVATION_BYTES = 2  # BF16
TILES_PER_IMAGE = 16 + 1  # `max_patches` of Llama 4's image processor, and the global tile
ByteRange = tuple[int, int]


@dataclass(frozen=True)
class Phase:
    """One phase of a forward pass: bytes alive at its widest point."""

    name: str
    low: int
    high: int


def phases(config: Llama4Config, setting: Setting, runtime: Runtime, quantized: bool) -> list[Phase]:
    """The phases of a pass over `setting.step_tokens` tokens."""
    text = config.text
    images = _images(config.vision, setting)
    kept = images * image_tokens(config.vision) * text.hidden_size * ACTIVATION_BYTES if config.vision else 0
    low, high = (
        _layer(text, setting) if setting.chunked_prefill else _whole_prompt_layer(text, setting, runtime, quantized)
    )
    found = [Phase("decoder layer", low + kept, high + kept)]
    rows = min(setting.requests, setting.step_tokens) if setting.chunked_prefill else setting.sequences
    rows = setting.step_tokens if runtime.kv == "full" else rows
    low, high = (rows * text.vocab_size * size for size in runtime.sampler_bytes)
    found.append(Phase("sampler", low + kept, high + kept))
    if config.vision and images:
        low, high = _vision(config.vision, setting, images)
        found.append(Phase("vision tower", low + kept, high + kept))
    return found


def image_tokens(vision: VisionConfig | None) -> int:
    """Text positions one image of the largest size takes."""
    if vision is None:
        return 0
    return TILES_PER_IMAGE * int(vision.patches * vision.pixel_shuffle_ratio**2)


def rope_table(text: TextConfig, setting: Setting, runtime: Runtime) -> ByteRange:
    """Cosines and sines for every position: vLLM makes them for the model's whole context, whatever is served."""
    if runtime.rope_per_context:
        size = setting.context * text.head_dim * runtime.rope_per_context
        return size, size
    low, high = runtime.rope_bytes
    return setting.max_positions * text.head_dim * low, setting.max_positions * text.head_dim * high


def request_tables(text: TextConfig, setting: Setting, runtime: Runtime) -> ByteRange:
    """Which block holds which tokens, for every request there may be: int32 per block of the context, for each group."""
    tables = 1 if runtime.kv == "pools" else sum(map(len, groups(text, setting.hybrid)))
    entries = setting.requests * -(-setting.context // runtime.block_size) * tables
    low, high = runtime.table_bytes
    return entries * low, entries * high


def _images(vision: VisionConfig | None, setting: Setting) -> int:
    """Images of one pass: as many as the batch has tokens for, one at least (vLLM `multimodal/encoder_budget.py`)."""
    if vision is None or not setting.chunked_prefill:
        return (setting.images or 0) if vision else 0
    fitting = max(1, setting.batched_tokens // max(image_tokens(vision), 1))
    return fitting if setting.images is None else min(fitting, setting.images * setting.requests)


def _layer(text: TextConfig, setting: Setting) -> ByteRange:
    """Residual and normed states, and the wider of attention and MLP."""
    tp, hidden = setting.tp, text.hidden_size
    unit = setting.step_tokens * ACTIVATION_BYTES
    attention = _attention_width(text, tp)
    size = text.intermediate_size if setting.expert_parallel else text.intermediate_size // tp
    shared = 3 * text.intermediate_size // tp
    experts = text.num_experts_per_tok * (max(size, hidden) + max(2 * size, hidden)) + hidden
    dense = 3 * text.intermediate_size_mlp // tp if len(text.moe_layers) < text.num_hidden_layers else 0
    low = 2 * hidden + max(attention, experts, dense)
    high = 3 * hidden + max(3 * attention, experts + shared, dense + hidden)
    return unit * low, unit * high


def _attention_width(text: TextConfig, tp: int) -> int:
    """Elements per token of q, k, v and the attention's output."""
    queries = text.num_attention_heads * text.head_dim // tp
    keys = max(1, text.num_key_value_heads // tp) * text.head_dim
    return 2 * queries + 2 * keys


def _whole_prompt_layer(text: TextConfig, setting: Setting, runtime: Runtime, quantized: bool) -> ByteRange:
    """A prompt in one piece, with an explicit attention mask.

    transformers repeats the states for every expert, and runs experts at once when they are fused, one by one in an
    artifact; llama-models gathers the routed tokens.
    """
    unit = setting.step_tokens * ACTIVATION_BYTES
    hidden, size = text.hidden_size, text.intermediate_size
    mlp = 3 * size // setting.tp
    if runtime.kv == "dynamic":
        copies = text.num_local_experts
        mlp = copies * 2 * hidden + mlp * (1 if quantized else copies)
    low = 2 * hidden + max(_attention_width(text, setting.tp), mlp)
    mask = setting.sequences * setting.context**2
    return unit * low + mask, unit * (low + hidden) + ACTIVATION_BYTES * mask


def _vision(vision: VisionConfig, setting: Setting, images: int) -> ByteRange:
    """All tiles of all images at once: states, and fc1's output before and after its activation."""
    unit = images * TILES_PER_IMAGE * (vision.patches + 1) * ACTIVATION_BYTES
    inner = 2 * vision.intermediate_size // setting.tp
    low = 2 * vision.hidden_size + inner
    return unit * low, unit * (low + vision.hidden_size + 4 * vision.hidden_size // setting.tp)
