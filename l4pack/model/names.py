"""Reading a tensor's name: what the tensor is for, and which layer and expert it belongs to.

`catalogue` lists the names a checkpoint must have; this goes the other way, and so also knows the names that a
quantized artifact adds (`weight_packed`, `weight_scale`, ...). Prefixes are not looked at, so multimodal
(`language_model.model.layers...`), text-only (`model.layers...`) and nested (`model.language_model.layers...`)
checkpoints are read alike.

Sources: transformers `models/llama4/modeling_llama4.py`; compressed-tensors `compressors/`; vLLM `mllama4.py`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from l4pack.errors import SourceError
from l4pack.model.tensors import Role

SUFFIXES = (
    "weight", "bias", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "k_scale", "v_scale", "q_scale",
)  # fmt: skip

_SUFFIX = rf"(?:{'|'.join(SUFFIXES)})"
_MLP = rf"(?:gate|up|down)_proj\.{_SUFFIX}"
_FUSED = r"(?:gate_up|down)_proj(?:_weight)?(?:\.weight)?(?:_scale|_packed)?"
_LAYER = re.compile(r"(?:^|\.)layers\.(?P<layer>\d{1,4})\.(?P<rest>.+)$")
_IN_LAYER = [
    (Role.ROUTED_EXPERT, re.compile(rf"feed_forward\.experts\.(?P<expert>\d{{1,4}})\.{_MLP}")),
    (Role.ROUTED_EXPERT, re.compile(rf"feed_forward\.experts\.{_FUSED}")),
    (Role.SHARED_EXPERT, re.compile(rf"feed_forward\.shared_expert\.{_MLP}")),
    (Role.DENSE_MLP, re.compile(rf"feed_forward\.{_MLP}")),
    (Role.ROUTER, re.compile(rf"feed_forward\.router\.{_SUFFIX}")),
    (Role.ATTENTION, re.compile(rf"self_attn\.(?:[qkvo]_proj\.)?{_SUFFIX}")),
    (Role.NORM, re.compile(r"(?:input|post_attention)_layernorm\.weight")),
]
_OUTER = [
    (Role.VISION, re.compile(r"(?:.*\.)?vision_model\..+")),
    (Role.PROJECTOR, re.compile(rf"(?:.*\.)?multi_modal_projector\.linear_1\.{_SUFFIX}")),
    (Role.EMBEDDING, re.compile(rf"(?:.*\.)?embed_tokens\.{_SUFFIX}")),
    (Role.LM_HEAD, re.compile(rf"(?:.*\.)?lm_head\.{_SUFFIX}")),
    (Role.NORM, re.compile(r"(?:.*\.)?norm\.weight")),
]


class Place(NamedTuple):
    """Where a tensor belongs; `layer` and `expert` are None outside the text model's layers and routed experts."""

    role: Role
    layer: int | None
    expert: int | None


def classify(name: str) -> Place:
    """Role, layer and expert of a Llama 4 tensor, plain or quantized. Raises SourceError for any other name."""
    place = _in_layer(name) if "vision_model." not in name else None
    if place is not None:
        return place
    for role, pattern in _OUTER:
        if pattern.fullmatch(name):
            return Place(role, None, None)
    raise SourceError(f"{name} is not a tensor of Llama 4", hint="check that config.json belongs to the weights")


def split_suffix(name: str) -> tuple[str, str]:
    """A name's module, and the last part that tells the module's tensors apart: `q_proj.weight_scale` is split in two.

    Fused experts and a few vision tensors are parameters of their own: their suffix is empty.
    """
    module, _, suffix = name.rpartition(".")
    return (module, suffix) if suffix in SUFFIXES else (name, "")


def _in_layer(name: str) -> Place | None:
    found = _LAYER.search(name)
    if found is None:
        return None
    for role, pattern in _IN_LAYER:
        if match := pattern.fullmatch(found["rest"]):
            expert = match.groupdict().get("expert")
            return Place(role, int(found["layer"]), None if expert is None else int(expert))
    return None
