"""Every tensor of a Llama 4 checkpoint, from its configuration alone: name, role, layer, storage and shape.

This is the one place that knows Llama 4's names and layouts. Two views of one model:

- `TensorSpec`: what lies in a source checkpoint under one name;
- `Linear`: one weight matrix as a runtime sees it, `[out_features, in_features]`, the unit a scheme applies to, and
  where its numbers lie in the source (in fused checkpoints one 3-D tensor holds the matrices of many experts, stored
  `[expert, in, out]`, with gate columns before up columns).

Source: transformers `models/llama4/modeling_llama4.py` and `convert_llama4_weights_to_hf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from l4pack.model.config import Llama4Config, TextConfig, VisionConfig
from l4pack.quant.layout import Layout


class Role(StrEnum):
    """What a tensor is for; recipes decide by role."""

    ROUTED_EXPERT = "routed_expert"
    SHARED_EXPERT = "shared_expert"
    DENSE_MLP = "dense_mlp"
    ATTENTION = "attention"
    ROUTER = "router"
    NORM = "norm"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    VISION = "vision"
    PROJECTOR = "projector"


QUANTIZABLE = (Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP, Role.ATTENTION)


@dataclass(frozen=True, slots=True)
class Naming:
    """The prefixes a checkpoint writes before its names."""

    text: str = "language_model.model."
    head: str = "language_model.lm_head"
    vision: str = "vision_model."
    projector: str = "multi_modal_projector."


MULTIMODAL_NAMING = Naming()
TEXT_ONLY_NAMING = Naming(text="model.", head="lm_head")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor a checkpoint must hold."""

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Linear:
    """One weight matrix `[out_features, in_features]` and where its numbers lie in the source."""

    module: str
    role: Role
    layer: int
    expert: int | None
    projection: str
    out_features: int
    in_features: int
    tensor: str
    layout: Layout
    column: int = 0  # first column inside a fused tensor

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Catalogue:
    """All tensors of one checkpoint layout, and all matrices that may be quantized."""

    config: Llama4Config
    naming: Naming
    fused: bool
    tensors: tuple[TensorSpec, ...]
    linears: tuple[Linear, ...]

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """Tensors by name."""
        return {spec.name: spec for spec in self.tensors}

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(spec.numel for spec in self.tensors)


def catalogue(config: Llama4Config, naming: Naming | None = None, *, fused: bool = True) -> Catalogue:
    """List what a checkpoint with this configuration holds.

    `naming` defaults to what transformers writes for the architecture; `fused` says whether the routed experts of a
    layer lie in two 3-D tensors (as released) or in one 2-D tensor for each matrix of each expert.
    """
    naming = naming or (TEXT_ONLY_NAMING if config.vision is None else MULTIMODAL_NAMING)
    text = config.text
    linears = [linear for layer in range(text.num_hidden_layers) for linear in _linears(text, naming, layer, fused)]
    tensors = [
        TensorSpec(f"{naming.text}embed_tokens.weight", Role.EMBEDDING, None, (text.vocab_size, text.hidden_size))
    ]
    by_layer: dict[int, list[Linear]] = {}
    for linear in linears:
        by_layer.setdefault(linear.layer, []).append(linear)
    for layer in range(text.num_hidden_layers):
        tensors += _layer_tensors(text, naming, layer, by_layer[layer], fused)
    tensors += _outer_tensors(text, naming)
    if config.vision is not None:
        tensors += _vision_tensors(config.vision, naming.vision)
        tensors += _projector_tensors(config.vision, text, naming.projector)
    return Catalogue(config, naming, fused, tuple(tensors), tuple(linears))


def canonical_naming(config: Llama4Config) -> Naming:
    """The prefixes transformers, vLLM and SGLang expect of an artifact."""
    return TEXT_ONLY_NAMING if config.vision is None else MULTIMODAL_NAMING


def rename(name: str, old: Naming, new: Naming) -> str:
    """A tensor's name with one checkpoint's prefixes exchanged for another's."""
    head = f"{old.head}."
    pairs = [(head, f"{new.head}."), (old.vision, new.vision), (old.projector, new.projector), (old.text, new.text)]
    for prefix, replacement in pairs:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise ValueError(f"{name} has none of the prefixes of its checkpoint")


def _linears(text: TextConfig, naming: Naming, layer: int, fused: bool) -> Iterator[Linear]:
    prefix = f"{naming.text}layers.{layer}."
    for projection, (out_features, in_features) in _attention_shapes(text).items():
        yield _linear(f"{prefix}self_attn.{projection}", Role.ATTENTION, layer, out_features, in_features)
    if layer not in text.moe_layers:
        yield from _mlp(f"{prefix}feed_forward.", Role.DENSE_MLP, layer, text.hidden_size, text.intermediate_size_mlp)
        return
    size = text.intermediate_size
    yield from _mlp(f"{prefix}feed_forward.shared_expert.", Role.SHARED_EXPERT, layer, text.hidden_size, size)
    for expert in range(text.num_local_experts):
        experts = f"{prefix}feed_forward.experts."
        for linear in _mlp(f"{experts}{expert}.", Role.ROUTED_EXPERT, layer, text.hidden_size, size, expert):
            yield _in_fused(linear, experts) if fused else linear


def _attention_shapes(text: TextConfig) -> dict[str, tuple[int, int]]:
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    hidden = text.hidden_size
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }


def _mlp(prefix: str, role: Role, layer: int, hidden: int, size: int, expert: int | None = None) -> Iterator[Linear]:
    yield _linear(f"{prefix}gate_proj", role, layer, size, hidden, expert)
    yield _linear(f"{prefix}up_proj", role, layer, size, hidden, expert)
    yield _linear(f"{prefix}down_proj", role, layer, hidden, size, expert)


def _linear(
    module: str, role: Role, layer: int, out_features: int, in_features: int, expert: int | None = None
) -> Linear:
    return Linear(
        module=module,
        role=role,
        layer=layer,
        expert=expert,
        projection=module.rpartition(".")[2],
        out_features=out_features,
        in_features=in_features,
        tensor=f"{module}.weight",
        layout=Layout.OUT_IN,
    )


def _in_fused(linear: Linear, experts: str) -> Linear:
    down = linear.projection == "down_proj"
    return Linear(
        module=linear.module,
        role=linear.role,
        layer=linear.layer,
        expert=linear.expert,
        projection=linear.projection,
        out_features=linear.out_features,
        in_features=linear.in_features,
        tensor=f"{experts}{'down_proj' if down else 'gate_up_proj'}",
        layout=Layout.IN_OUT,
        column=linear.out_features if linear.projection == "up_proj" else 0,
    )


def _layer_tensors(
    text: TextConfig, naming: Naming, layer: int, linears: list[Linear], fused: bool
) -> Iterator[TensorSpec]:
    prefix = f"{naming.text}layers.{layer}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{prefix}{norm}.weight", Role.NORM, layer, (text.hidden_size,))
    if layer in text.moe_layers:
        shape = (text.num_local_experts, text.hidden_size)
        yield TensorSpec(f"{prefix}feed_forward.router.weight", Role.ROUTER, layer, shape)
        if fused:
            yield from _fused_tensors(text, f"{prefix}feed_forward.experts.", layer)
    for linear in linears:
        if linear.layout is Layout.OUT_IN:
            yield TensorSpec(linear.tensor, linear.role, layer, (linear.out_features, linear.in_features))
        if linear.role is Role.ATTENTION and text.attention_bias:
            yield TensorSpec(f"{linear.module}.bias", Role.ATTENTION, layer, (linear.out_features,))


def _fused_tensors(text: TextConfig, experts: str, layer: int) -> Iterator[TensorSpec]:
    count, hidden, size = text.num_local_experts, text.hidden_size, text.intermediate_size
    yield TensorSpec(f"{experts}gate_up_proj", Role.ROUTED_EXPERT, layer, (count, hidden, 2 * size))
    yield TensorSpec(f"{experts}down_proj", Role.ROUTED_EXPERT, layer, (count, size, hidden))


def _outer_tensors(text: TextConfig, naming: Naming) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{naming.text}norm.weight", Role.NORM, None, (text.hidden_size,))
    if not text.tie_word_embeddings:
        yield TensorSpec(f"{naming.head}.weight", Role.LM_HEAD, None, (text.vocab_size, text.hidden_size))


def _vision_tensors(vision: VisionConfig, prefix: str) -> Iterator[TensorSpec]:
    hidden, size = vision.hidden_size, vision.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (hidden,),
        "positional_embedding_vlm": (vision.patches + 1, hidden),
        "patch_embedding.linear.weight": (hidden, vision.num_channels * vision.patch_size**2),
    }
    shapes |= _with_bias("layernorm_pre", (hidden,)) | _with_bias("layernorm_post", (hidden,))
    for layer in range(vision.num_hidden_layers):
        block = f"model.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= _with_bias(f"{block}self_attn.{projection}", (hidden, hidden))
        shapes |= _with_bias(f"{block}mlp.fc1", (size, hidden)) | _with_bias(f"{block}mlp.fc2", (hidden, size))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= _with_bias(f"{block}{norm}", (hidden,))
    shapes["vision_adapter.mlp.fc1.weight"] = (vision.projector_input_dim, size)
    shapes["vision_adapter.mlp.fc2.weight"] = (vision.projector_output_dim, vision.projector_output_dim)
    for name, shape in shapes.items():
        yield TensorSpec(f"{prefix}{name}", Role.VISION, None, shape)


def _with_bias(module: str, weight_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{module}.weight": weight_shape, f"{module}.bias": weight_shape[:1]}


def _projector_tensors(vision: VisionConfig, text: TextConfig, prefix: str) -> Iterator[TensorSpec]:
    """The projector has no bias, whatever `multi_modal_projector_bias` says: transformers doesn't read that key."""
    shape = (text.hidden_size, vision.vision_output_dim)
    yield TensorSpec(f"{prefix}linear_1.weight", Role.PROJECTOR, None, shape)
