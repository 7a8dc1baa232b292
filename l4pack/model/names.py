"""Reading a tensor's name: what the tensor is for, and which layer and expert it belongs to.

`catalogue` lists the names a checkpoint must have; this goes the other way, and so also knows the names that a
quantized artifact adds (`weight_packed`, `weight_scale`, ...). Prefixes are not looked at, so multimodal
(`language_model.model.layers...`), text-only (`model.layers...`) and nested (`model.language_model.layers...`)
checkpoints are read alike.

Sources of suffixes: transformers `models/llama4/modeling_llama4.py`; compressed-tensors `compressors/`; vLLM `mllama4.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from l4pack.errors import SourceError
from l4pack.model import parts
from l4pack.model.config import Llama4Config
from l4pack.model.tensors import Catalogue, Naming, Role, catalogue
from l4pack.quant.suffixes import Suffix

SUFFIXES = (*Suffix, "bias", "k_scale", "v_scale", "q_scale")

_SUFFIX = rf"(?:{'|'.join(SUFFIXES)})"
_NUMBER = r"\d{1,4}"
_MLP = rf"(?:{'|'.join(parts.MLP_MATRICES)})\.{_SUFFIX}"
_ATTENTION = rf"(?:(?:{'|'.join(parts.ATTENTION_MATRICES)})\.)?{_SUFFIX}"
_FUSED = rf"(?:{parts.GATE_UP}|{parts.DOWN})(?:_weight)?(?:\.weight)?(?:_scale|_packed)?"
_LAYER = re.compile(rf"(?:^|\.){parts.LAYERS}\.(?P<layer>{_NUMBER})\.(?P<rest>.+)$")
_IN_LAYER = [
    (Role.ROUTED_EXPERT, re.compile(rf"{parts.FEED_FORWARD}\.{parts.EXPERTS}\.(?P<expert>{_NUMBER})\.{_MLP}")),
    (Role.ROUTED_EXPERT, re.compile(rf"{parts.FEED_FORWARD}\.{parts.EXPERTS}\.{_FUSED}")),
    (Role.SHARED_EXPERT, re.compile(rf"{parts.FEED_FORWARD}\.{parts.SHARED_EXPERT}\.{_MLP}")),
    (Role.DENSE_MLP, re.compile(rf"{parts.FEED_FORWARD}\.{_MLP}")),
    (Role.ROUTER, re.compile(rf"{parts.FEED_FORWARD}\.{parts.ROUTER}\.{_SUFFIX}")),
    (Role.ATTENTION, re.compile(rf"{parts.ATTENTION}\.{_ATTENTION}")),
    (Role.NORM, re.compile(rf"(?:{'|'.join(parts.LAYER_NORMS)})\.weight")),
]
_OUTER = [
    (Role.VISION, re.compile(rf"(?:.*\.)?{parts.VISION_MODEL}\..+")),
    (Role.PROJECTOR, re.compile(rf"(?:.*\.)?{parts.PROJECTOR}\.{parts.PROJECTION}\.{_SUFFIX}")),
    (Role.EMBEDDING, re.compile(rf"(?:.*\.)?{parts.EMBEDDING}\.{_SUFFIX}")),
    (Role.LM_HEAD, re.compile(rf"(?:.*\.)?{parts.HEAD}\.{_SUFFIX}")),
    (Role.NORM, re.compile(rf"(?:.*\.)?{parts.FINAL_NORM}\.weight")),
]


def _one_of(names: Sequence[str]) -> str:
    """`(gate|up|down)_proj`."""
    return f"({'|'.join(name.removesuffix('_proj') for name in names)})_proj"


MODULES = {
    Role.ROUTED_EXPERT: rf"{parts.FEED_FORWARD}\.{parts.EXPERTS}\.\d+\.{_one_of(parts.MLP_MATRICES)}",
    Role.SHARED_EXPERT: rf"{parts.FEED_FORWARD}\.{parts.SHARED_EXPERT}\.{_one_of(parts.MLP_MATRICES)}",
    Role.DENSE_MLP: rf"{parts.FEED_FORWARD}\.{_one_of(parts.MLP_MATRICES)}",
    Role.ATTENTION: rf"{parts.ATTENTION}\.{_one_of(parts.ATTENTION_MATRICES)}",
}
"""How a configuration speaks of all matrices of a role, below their layers."""
TOWER_MODULES = (
    f"{parts.VISION_MODEL}.{parts.VISION_LAYERS}.0.{parts.ATTENTION}.{parts.QUERY}",
    f"{parts.VISION_MODEL}.{parts.VISION_LAYERS}.0.{parts.VISION_MLP}.{parts.VISION_UP}",
    f"{parts.VISION_MODEL}.{parts.PATCHES}",
    f"{parts.VISION_MODEL}.{parts.ADAPTER}.{parts.VISION_MLP}.{parts.VISION_UP}",
    f"{parts.PROJECTOR}.{parts.PROJECTION}",
)
"""Modules of a whole model's tower: a text model's configuration may speak of them, as it does of others of its kind."""


class Place(NamedTuple):
    """Where a tensor belongs; `layer` and `expert` are None outside the text model's layers and routed experts."""

    role: Role
    layer: int | None
    expert: int | None


def classify(name: str) -> Place:
    """Role, layer and expert of a Llama 4 tensor, plain or quantized. Raises SourceError for any other name."""
    place = _in_layer(name) if f"{parts.VISION_MODEL}." not in name else None
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


def detect_layout(config: Llama4Config, names: Iterable[str]) -> Catalogue:
    """The catalogue for the prefixes and the expert layout that these tensor names show. Raises SourceError."""
    names = list(names)
    embedding, head = f"{parts.EMBEDDING}.{parts.WEIGHT}", f"{parts.HEAD}.{parts.WEIGHT}"
    text, before_head = _prefix(names, embedding), _prefix(names, head)
    if text is None:
        raise SourceError(f"no token embedding (…{embedding}) among the tensors", hint="is this the full checkpoint?")
    vision = _prefix(names, f"{parts.VISION_MODEL}.{parts.CLASS_EMBEDDING}")
    projector = _prefix(names, f"{parts.PROJECTOR}.{parts.PROJECTION}.{parts.WEIGHT}")
    naming = Naming(
        text=text,
        head=f"{text.removesuffix('model.') if before_head is None else before_head}{parts.HEAD}",
        vision=f"{vision or ''}{parts.VISION_MODEL}.",
        projector=f"{projector or ''}{parts.PROJECTOR}.",
    )
    return catalogue(config, naming, fused=any(name.endswith(f".{parts.EXPERTS}.{parts.GATE_UP}") for name in names))


def _prefix(names: list[str], ending: str) -> str | None:
    found = [name.removesuffix(ending) for name in names if name.endswith(ending)]
    return min(found, key=len) if found else None


_BELOW = re.compile(
    rf"(?:(?:model|{parts.LANGUAGE_MODEL}|module|_orig_mod)\.)*"
    rf"(?P<name>(?:{parts.LAYERS}|{parts.EMBEDDING}|{parts.FINAL_NORM}|{parts.HEAD}|{parts.VISION_MODEL}|{parts.PROJECTOR})"
    r"\..+|(?:" + parts.HEAD + "|" + parts.EMBEDDING + "))"
)


def below_prefix(name: str) -> str | None:
    """A tensor's or module's name below the prefixes that the model's parts have in different wrappings: two that are
    the same in this are the same part. None where it is no part of Llama 4's."""
    match = _BELOW.fullmatch(name)
    return None if match is None else match["name"]


def of_vision(name: str) -> bool:
    """Whether a tensor's name is one of the vision tower or the projector, whatever lies before them."""
    return f"{parts.VISION_MODEL}." in name or f"{parts.PROJECTOR}." in name


def _in_layer(name: str) -> Place | None:
    found = _LAYER.search(name)
    if found is None:
        return None
    for role, pattern in _IN_LAYER:
        if match := pattern.fullmatch(found["rest"]):
            expert = match.groupdict().get("expert")
            return Place(role, int(found["layer"]), None if expert is None else int(expert))
    return None
