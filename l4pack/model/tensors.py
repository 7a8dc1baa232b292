"""Every tensor of a Llama 4 checkpoint, from its configuration alone: name, role, layer, storage and shape.

Names are put together of `parts.py`. Two views of one model:

- `TensorSpec`: what lies in a source checkpoint under one name;
- `Linear`: one weight matrix as a runtime sees it, `[out_features, in_features]`, the unit a scheme applies to, and
  where its numbers lie in the source (in fused checkpoints one 3-D tensor holds the matrices of many experts, stored
  `[expert, in, out]`, with gate columns before up columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from l4pack.model import parts
from l4pack.model.config import Llama4Config, TextConfig
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
    """The prefixes a checkpoint writes before its names, and the names they make."""

    text: str = f"{parts.LANGUAGE_MODEL}.model."
    head: str = f"{parts.LANGUAGE_MODEL}.{parts.HEAD}"
    vision: str = f"{parts.VISION_MODEL}."
    projector: str = f"{parts.PROJECTOR}."

    @property
    def embedding(self) -> str:
        """The token embedding."""
        return f"{self.text}{parts.EMBEDDING}.{parts.WEIGHT}"

    @property
    def final_norm(self) -> str:
        """The norm before the head."""
        return f"{self.text}{parts.FINAL_NORM}.{parts.WEIGHT}"

    @property
    def head_weight(self) -> str:
        """The head; the embedding is taken for it where the two are tied."""
        return f"{self.head}.{parts.WEIGHT}"

    def layer(self, layer: int) -> str:
        """What the names of a layer begin with."""
        return f"{self.text}{parts.LAYERS}.{layer}."


ROUTER = f"{parts.FEED_FORWARD}.{parts.ROUTER}"
_EXPERTS = f"{parts.FEED_FORWARD}.{parts.EXPERTS}"
_IN_FUSED = {parts.GATE: parts.GATE_UP, parts.UP: parts.GATE_UP, parts.DOWN: parts.DOWN}


def mlp_prefix(role: Role, expert: int | None = None) -> str:
    """What the names of an MLP begin with, below their layer; a routed expert has a number."""
    below = {
        Role.DENSE_MLP: "",
        Role.SHARED_EXPERT: f"{parts.SHARED_EXPERT}.",
        Role.ROUTED_EXPERT: f"{parts.EXPERTS}.{expert}.",
    }
    return f"{parts.FEED_FORWARD}.{below[role]}"


MULTIMODAL_NAMING = Naming()
TEXT_ONLY_NAMING = Naming(text="model.", head=parts.HEAD)


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
    tensors = [TensorSpec(naming.embedding, Role.EMBEDDING, None, (text.vocab_size, text.hidden_size))]
    by_layer: dict[int, list[Linear]] = {}
    for linear in linears:
        by_layer.setdefault(linear.layer, []).append(linear)
    for layer in range(text.num_hidden_layers):
        tensors += _layer_tensors(text, naming, layer, by_layer[layer], fused)
    tensors += _outer_tensors(text, naming)
    if config.vision is not None:
        tower, projector = parts.vision_shapes(config.vision), parts.projector_shapes(config.vision, text)
        tensors += [TensorSpec(f"{naming.vision}{name}", Role.VISION, None, shape) for name, shape in tower.items()]
        tensors += [
            TensorSpec(f"{naming.projector}{name}", Role.PROJECTOR, None, shape) for name, shape in projector.items()
        ]
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
    prefix = naming.layer(layer)
    for projection, shape in parts.attention_shapes(text).items():
        yield _linear(f"{prefix}{parts.ATTENTION}.", projection, Role.ATTENTION, layer, shape)
    if layer not in text.moe_layers:
        yield from _mlp(prefix, Role.DENSE_MLP, layer, parts.mlp_shapes(text.hidden_size, text.intermediate_size_mlp))
        return
    shapes = parts.mlp_shapes(text.hidden_size, text.intermediate_size)
    yield from _mlp(prefix, Role.SHARED_EXPERT, layer, shapes)
    for expert in range(text.num_local_experts):
        yield from _mlp(prefix, Role.ROUTED_EXPERT, layer, shapes, expert, fused=fused)


def _mlp(
    prefix: str,
    role: Role,
    layer: int,
    shapes: Mapping[str, tuple[int, int]],
    expert: int | None = None,
    *,
    fused: bool = False,
) -> Iterator[Linear]:
    below = f"{prefix}{mlp_prefix(role, expert)}"
    for projection, shape in shapes.items():
        tensor = f"{prefix}{_EXPERTS}.{_IN_FUSED[projection]}" if fused else None
        yield _linear(below, projection, role, layer, shape, expert, tensor)


def _linear(
    prefix: str,
    projection: str,
    role: Role,
    layer: int,
    shape: tuple[int, int],
    expert: int | None = None,
    fused: str | None = None,
) -> Linear:
    """A matrix in a tensor of its own, or in a fused one."""
    return Linear(
        module=f"{prefix}{projection}",
        role=role,
        layer=layer,
        expert=expert,
        projection=projection,
        out_features=shape[0],
        in_features=shape[1],
        tensor=fused or f"{prefix}{projection}.{parts.WEIGHT}",
        layout=Layout.IN_OUT if fused else Layout.OUT_IN,
        column=shape[0] if fused and projection == parts.UP else 0,
    )


def _layer_tensors(
    text: TextConfig, naming: Naming, layer: int, linears: list[Linear], fused: bool
) -> Iterator[TensorSpec]:
    prefix = naming.layer(layer)
    for norm in parts.LAYER_NORMS:
        yield TensorSpec(f"{prefix}{norm}.{parts.WEIGHT}", Role.NORM, layer, (text.hidden_size,))
    if layer in text.moe_layers:
        shape = (text.num_local_experts, text.hidden_size)
        yield TensorSpec(f"{prefix}{ROUTER}.{parts.WEIGHT}", Role.ROUTER, layer, shape)
        if fused:
            for name, stored in parts.fused_shapes(text).items():
                yield TensorSpec(f"{prefix}{_EXPERTS}.{name}", Role.ROUTED_EXPERT, layer, stored)
    for linear in linears:
        if linear.layout is Layout.OUT_IN:
            yield TensorSpec(linear.tensor, linear.role, layer, (linear.out_features, linear.in_features))
        if linear.role is Role.ATTENTION and text.attention_bias:
            yield TensorSpec(f"{linear.module}.{parts.BIAS}", Role.ATTENTION, layer, (linear.out_features,))


def _outer_tensors(text: TextConfig, naming: Naming) -> Iterator[TensorSpec]:
    yield TensorSpec(naming.final_norm, Role.NORM, None, (text.hidden_size,))
    if not text.tie_word_embeddings:
        yield TensorSpec(naming.head_weight, Role.LM_HEAD, None, (text.vocab_size, text.hidden_size))
