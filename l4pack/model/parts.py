"""The parts of Llama 4: what checkpoints and runtimes call each, and the shape of its weight. Nothing else spells a name.

A tensor's name is a prefix (`tensors.Naming`), a layer, the parts below it and a suffix, joined by dots:
`language_model.model.` `layers.3.` `feed_forward.experts.0.` `gate_proj` `.weight`. `tensors.py` puts names together,
`names.py` takes them apart.

Source: transformers `models/llama4/modeling_llama4.py` and `convert_llama4_weights_to_hf.py`; `FUSED_MODULES`: vLLM
`models/llama4.py`, `packed_modules_mapping`.
"""

from __future__ import annotations

from collections.abc import Mapping

from l4pack.model.config import TextConfig, VisionConfig

Shape = tuple[int, ...]

WEIGHT, BIAS = "weight", "bias"

# The model's parts, and what of the text model lies outside its layers.
LANGUAGE_MODEL, VISION_MODEL, PROJECTOR = "language_model", "vision_model", "multi_modal_projector"
EMBEDDING, FINAL_NORM, HEAD = "embed_tokens", "norm", "lm_head"
LAYERS = "layers"

# A layer of the text model.
INPUT_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
LAYER_NORMS = (INPUT_NORM, MLP_NORM)
ATTENTION = "self_attn"
QUERY, KEY, VALUE, OUTPUT = "q_proj", "k_proj", "v_proj", "o_proj"
ATTENTION_MATRICES = (QUERY, KEY, VALUE, OUTPUT)
FEED_FORWARD, SHARED_EXPERT, EXPERTS, ROUTER = "feed_forward", "shared_expert", "experts", "router"
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
MLP_MATRICES = (GATE, UP, DOWN)

# Matrices that a fused tensor of all experts, or a module of a runtime, holds side by side.
QUERY_KEY_VALUE, GATE_UP = "qkv_proj", "gate_up_proj"
FUSED_MODULES: Mapping[str, tuple[str, ...]] = {QUERY_KEY_VALUE: (QUERY, KEY, VALUE), GATE_UP: (GATE, UP)}


def merged_with(projection: str) -> tuple[str, ...]:
    """The projections that runtimes hold in one matrix with this one, itself among them."""
    return next((merged for merged in FUSED_MODULES.values() if projection in merged), (projection,))


# The vision tower and the projector.
CLASS_EMBEDDING, POSITIONS, PATCHES = "class_embedding", "positional_embedding_vlm", "patch_embedding"
NORM_BEFORE, NORM_AFTER = "layernorm_pre", "layernorm_post"
VISION_LAYERS = "model.layers"
VISION_MLP, VISION_UP, VISION_DOWN = "mlp", "fc1", "fc2"
ADAPTER = "vision_adapter"
PROJECTION = "linear_1"


def attention_shapes(text: TextConfig) -> dict[str, tuple[int, int]]:
    """[out_features, in_features] of a text layer's attention matrices."""
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    hidden = text.hidden_size
    return {QUERY: (queries, hidden), KEY: (keys, hidden), VALUE: (keys, hidden), OUTPUT: (hidden, queries)}


def mlp_shapes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """[out_features, in_features] of an MLP's matrices: an expert's, the shared expert's, or a dense layer's."""
    return {GATE: (inner, hidden), UP: (inner, hidden), DOWN: (hidden, inner)}


def fused_shapes(text: TextConfig) -> dict[str, tuple[int, int, int]]:
    """[experts, in_features, out_features] of the tensors that hold a layer's experts; gate columns before up columns."""
    count, hidden, inner = text.num_local_experts, text.hidden_size, text.intermediate_size
    return {GATE_UP: (count, hidden, 2 * inner), DOWN: (count, inner, hidden)}


def vision_shapes(vision: VisionConfig) -> dict[str, Shape]:
    """Every tensor of the vision tower, below its prefix."""
    hidden, size = vision.hidden_size, vision.intermediate_size
    shapes: dict[str, Shape] = {
        CLASS_EMBEDDING: (hidden,),
        POSITIONS: (vision.patches + 1, hidden),
        f"{PATCHES}.linear.{WEIGHT}": (hidden, vision.num_channels * vision.patch_size**2),
    }
    shapes |= _with_bias(NORM_BEFORE, (hidden,)) | _with_bias(NORM_AFTER, (hidden,))
    for layer in range(vision.num_hidden_layers):
        block = f"{VISION_LAYERS}.{layer}."
        for projection in ATTENTION_MATRICES:
            shapes |= _with_bias(f"{block}{ATTENTION}.{projection}", (hidden, hidden))
        shapes |= _with_bias(f"{block}{VISION_MLP}.{VISION_UP}", (size, hidden))
        shapes |= _with_bias(f"{block}{VISION_MLP}.{VISION_DOWN}", (hidden, size))
        for norm in LAYER_NORMS:
            shapes |= _with_bias(f"{block}{norm}", (hidden,))
    shapes[f"{ADAPTER}.{VISION_MLP}.{VISION_UP}.{WEIGHT}"] = (vision.projector_input_dim, size)
    shapes[f"{ADAPTER}.{VISION_MLP}.{VISION_DOWN}.{WEIGHT}"] = (vision.projector_output_dim,) * 2
    return shapes


def projector_shapes(vision: VisionConfig, text: TextConfig) -> dict[str, Shape]:
    """The projector has no bias, whatever `multi_modal_projector_bias` says: transformers doesn't read that key."""
    return {f"{PROJECTION}.{WEIGHT}": (text.hidden_size, vision.vision_output_dim)}


def _with_bias(module: str, weight_shape: Shape) -> dict[str, Shape]:
    return {f"{module}.{WEIGHT}": weight_shape, f"{module}.{BIAS}": weight_shape[:1]}
