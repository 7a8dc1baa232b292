"""Llama 4 as Meta released it: what its own code calls each weight, how model parallelism split it, and `params.json`.

Sources: llama-models `models/llama4/{args,model,moe,ffn}.py`, `vision/` and `models/checkpoint.py` (names that were
trained with, and those that its load hooks make of them); transformers `convert_llama4_weights_to_hf.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from l4pack.model import parts
from l4pack.model.tensors import ROUTER, Naming

Shape = tuple[int, ...]


class Split(StrEnum):
    """How a weight's shards make it up; the numbers are transformers' axes."""

    ROWS = "rows"
    COLUMNS = "columns"
    EMBEDDING = "embedding"  # by vocabulary or by width, as the shards' shape tells
    COPIED = "copied"  # each shard has all of it
    ROUTER = "router"  # the same, turned
    EXPERTS_INTO = "experts_into"  # [experts * in, out / shards], gate or up, of a fused tensor's columns
    EXPERTS_OUT = "experts_out"  # [experts * in / shards, out]


@dataclass(frozen=True)
class Placed:
    """Which tensors of transformers' a weight is, those stacked in it one below the other, and how it is split.

    `half` is the half of a fused tensor's columns that it is: 0 gate, 1 up.
    """

    names: tuple[str, ...]
    split: Split
    half: int = 0


ALWAYS_SPLIT = f"{parts.LAYERS}.0.attention.wo.weight"  # by its columns, and nothing is stacked in it
_DROPPED = re.compile(
    r"rope\.freqs|freqs?_cis|.*\._extra_state|.*\.expert_activation_DE|.*gate_stats_3E|.*running_gate_stats\w*"
)
_OUTER = {
    "tok_embeddings.weight": Split.EMBEDDING,
    "output.weight": Split.ROWS,
    "norm.weight": Split.COPIED,
    "vision_projection.weight": Split.ROWS,
}
_ATTENTION = parts.ATTENTION
_FORWARD, _SHARED = parts.FEED_FORWARD, f"{parts.FEED_FORWARD}.{parts.SHARED_EXPERT}"
_EXPERTS = f"{_FORWARD}.{parts.EXPERTS}"
_STACKED = f"{_ATTENTION}.{parts.QUERY}", f"{_ATTENTION}.{parts.KEY}", f"{_ATTENTION}.{parts.VALUE}"


def _norm(name: str) -> Placed:
    return Placed((f"{name}.{parts.WEIGHT}",), Split.COPIED)


def _weight(module: str, split: Split) -> Placed:
    return Placed((f"{module}.{parts.WEIGHT}",), split)


# Below `layers.N.`; weights have the names of training and, those that llama-models' hooks rename, both.
_LAYER: Mapping[str, Placed] = {
    "attention.wqkv.layer_norm_weight": _norm(parts.INPUT_NORM),
    "attention_norm.weight": _norm(parts.INPUT_NORM),
    "feed_forward.norm.weight": _norm(parts.MLP_NORM),
    "feed_forward.mlp.layer_norm_weight": _norm(parts.MLP_NORM),
    "ffn_norm.weight": _norm(parts.MLP_NORM),
    "attention.wqkv.weight": Placed(tuple(f"{one}.{parts.WEIGHT}" for one in _STACKED), Split.ROWS),
    "attention.wq.weight": _weight(_STACKED[0], Split.ROWS),
    "attention.wk.weight": _weight(_STACKED[1], Split.ROWS),
    "attention.wv.weight": _weight(_STACKED[2], Split.ROWS),
    "attention.wo.weight": _weight(f"{_ATTENTION}.{parts.OUTPUT}", Split.COLUMNS),
    "feed_forward.router_DE": _weight(ROUTER, Split.ROUTER),
    "feed_forward.experts.moe_w_in_eD_F": Placed((f"{_EXPERTS}.{parts.GATE_UP}",), Split.EXPERTS_INTO, 0),
    "feed_forward.experts.moe_w_swiglu_eD_F": Placed((f"{_EXPERTS}.{parts.GATE_UP}",), Split.EXPERTS_INTO, 1),
    "feed_forward.experts.moe_w_out_eF_D": Placed((f"{_EXPERTS}.{parts.DOWN}",), Split.EXPERTS_OUT),
    "feed_forward.experts.w1": Placed((f"{_EXPERTS}.{parts.GATE_UP}",), Split.EXPERTS_INTO, 0),
    "feed_forward.experts.w3": Placed((f"{_EXPERTS}.{parts.GATE_UP}",), Split.EXPERTS_INTO, 1),
    "feed_forward.experts.w2": Placed((f"{_EXPERTS}.{parts.DOWN}",), Split.EXPERTS_OUT),
    "feed_forward.w_in_shared_FD.weight": _weight(f"{_SHARED}.{parts.GATE}", Split.ROWS),
    "feed_forward.w_swiglu_FD.weight": _weight(f"{_SHARED}.{parts.UP}", Split.ROWS),
    "feed_forward.w_out_shared_DF.weight": _weight(f"{_SHARED}.{parts.DOWN}", Split.COLUMNS),
    "feed_forward.shared_expert.w1.weight": _weight(f"{_SHARED}.{parts.GATE}", Split.ROWS),
    "feed_forward.shared_expert.w3.weight": _weight(f"{_SHARED}.{parts.UP}", Split.ROWS),
    "feed_forward.shared_expert.w2.weight": _weight(f"{_SHARED}.{parts.DOWN}", Split.COLUMNS),
    "feed_forward.mlp.fc1_weight": Placed(
        (f"{_FORWARD}.{parts.GATE}.{parts.WEIGHT}", f"{_FORWARD}.{parts.UP}.{parts.WEIGHT}"), Split.ROWS
    ),
    "feed_forward.mlp.fc2_weight": _weight(f"{_FORWARD}.{parts.DOWN}", Split.COLUMNS),
    "feed_forward.w1.weight": _weight(f"{_FORWARD}.{parts.GATE}", Split.ROWS),
    "feed_forward.w3.weight": _weight(f"{_FORWARD}.{parts.UP}", Split.ROWS),
    "feed_forward.w2.weight": _weight(f"{_FORWARD}.{parts.DOWN}", Split.COLUMNS),
}
_TOWER = "vision_embeddings.vision_encoder."
_IN_TOWER: Mapping[str, Placed] = {
    "class_embedding": Placed((parts.CLASS_EMBEDDING,), Split.COPIED),
    "positional_embedding_vlm": Placed((parts.POSITIONS,), Split.COPIED),
    "conv1._linear.weight": _weight(f"{parts.PATCHES}.linear", Split.ROWS),
    **{
        f"{own}.{kind}": Placed((f"{name}.{kind}",), Split.COPIED)
        for own, name in (("ln_pre", parts.NORM_BEFORE), ("ln_post", parts.NORM_AFTER))
        for kind in (parts.WEIGHT, parts.BIAS)
    },
}
_BLOCK: Mapping[str, tuple[str, Split]] = {
    "attn.wq": (f"{_ATTENTION}.{parts.QUERY}", Split.ROWS),
    "attn.wk": (f"{_ATTENTION}.{parts.KEY}", Split.ROWS),
    "attn.wv": (f"{_ATTENTION}.{parts.VALUE}", Split.ROWS),
    "attn.wo": (f"{_ATTENTION}.{parts.OUTPUT}", Split.COLUMNS),
    "mlp.c_fc": (f"{parts.VISION_MLP}.{parts.VISION_UP}", Split.ROWS),
    "mlp.c_proj": (f"{parts.VISION_MLP}.{parts.VISION_DOWN}", Split.COLUMNS),
    "ln_1": (parts.INPUT_NORM, Split.COPIED),
    "ln_2": (parts.MLP_NORM, Split.COPIED),
}
_ADAPTER = {
    "vision_embeddings.vision_adapter.mlp.c_fc.weight": (parts.VISION_UP, Split.ROWS),
    "vision_embeddings.vision_adapter.mlp.c_proj.weight": (parts.VISION_DOWN, Split.COLUMNS),
}
_IN_LAYER = re.compile(rf"{parts.LAYERS}\.(\d{{1,4}})\.(.+)")
_IN_BLOCK = re.compile(rf"{re.escape(_TOWER)}transformer\.resblocks\.(\d{{1,4}})\.(.+)\.(weight|bias)")


def is_dropped(name: str) -> bool:
    """Whether a name is of what training kept beside the weights: neither runtime reads it."""
    return _DROPPED.fullmatch(name) is not None


def placed(name: str, naming: Naming) -> Placed | None:
    """Where a weight of Meta's belongs, by the names that `naming` makes; None for one that is not Llama 4's."""
    if name in _OUTER:
        own = {
            "tok_embeddings.weight": naming.embedding,
            "output.weight": naming.head_weight,
            "norm.weight": naming.final_norm,
            "vision_projection.weight": f"{naming.projector}{parts.PROJECTION}.{parts.WEIGHT}",
        }[name]
        return Placed((own,), _OUTER[name])
    if (found := _IN_LAYER.fullmatch(name)) and found[2] in _LAYER:
        return _below(naming.layer(int(found[1])), _LAYER[found[2]])
    if name in _ADAPTER:
        last, split = _ADAPTER[name]
        return Placed((f"{naming.vision}{parts.ADAPTER}.{parts.VISION_MLP}.{last}.{parts.WEIGHT}",), split)
    if (found := _IN_BLOCK.fullmatch(name)) and found[2] in _BLOCK:
        module, split = _BLOCK[found[2]]
        split = Split.COPIED if split is Split.COLUMNS and found[3] == parts.BIAS else split
        return Placed((f"{naming.vision}{parts.VISION_LAYERS}.{int(found[1])}.{module}.{found[3]}",), split)
    below = _IN_TOWER.get(name.removeprefix(_TOWER)) if name.startswith(_TOWER) else None
    return below and _below(naming.vision, below)


def _below(prefix: str, place: Placed) -> Placed:
    return Placed(tuple(f"{prefix}{name}" for name in place.names), place.split, place.half)


@dataclass(frozen=True)
class Widths:
    """What `params.json` leaves to be computed or does not say, as the shards have it; None where no weight tells."""

    vocabulary: int | None
    experts: int | None  # inner width of one
    dense: int | None


def widths(shapes: Mapping[str, Shape], shards: int) -> Widths:
    """The widths that the shapes of one shard's weights tell."""

    def first(pattern: str, axis: int) -> int | None:
        sizes = (shape for name, shape in shapes.items() if re.fullmatch(pattern, name) and len(shape) >= 2)
        return next((shape[axis] * shards for shape in sizes), None)

    layer = rf"{parts.LAYERS}\.\d+\.feed_forward\."
    return Widths(
        first(r"output\.weight", 0),
        first(layer + r"experts\.(moe_w_in_eD_F|w1)", -1),
        first(layer + r"(mlp\.fc2_weight|w2\.weight)", 1),
    )
