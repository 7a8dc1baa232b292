"""Bytes of weights on each GPU: what is split, what is repeated, and what a runtime changes as it loads.

Split of tensor-parallel vLLM 0.33 (`models/llama4.py`, `models/mllama4.py`; SGLang and llama-models do the same):
columns of q/k/v, gate, up, fc1 and the projector; rows of o, down and fc2; the vocabulary of embedding and head, padded to
64; KV heads are repeated once there are more GPUs than heads. Router, norms, the class and position embeddings are on
every GPU. Expert parallelism gives each GPU whole experts. Pipeline stages hold consecutive layers; the vision tower is on
every stage.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache

from l4pack.artifact.kv_cache import SUFFIXES as KV_SUFFIXES
from l4pack.budget.load import Setting
from l4pack.budget.runtimes import Runtime
from l4pack.budget.subject import Subject, TensorKind, from_config
from l4pack.errors import UsageError
from l4pack.formats.float_quantized import FLOAT_QUANTIZED
from l4pack.formats.limits import ROW_SPLIT
from l4pack.model.config import TextConfig
from l4pack.model.parts import (
    CLASS_EMBEDDING,
    GATE_UP,
    KEY,
    LAYER_NORMS,
    NORM_AFTER,
    NORM_BEFORE,
    POSITIONS,
    VALUE,
    VISION_DOWN,
)
from l4pack.model.tensors import Role
from l4pack.quant.dtypes import FLOATS
from l4pack.quant.suffixes import Suffix

VOCAB_PADDING = 64  # vLLM `vocab_parallel_embedding.py`
MODEL_BYTES = 2  # BF16
FP8_SCALE_BYTES = 4  # vLLM and SGLang keep the scales of FP8 matrices in float32
CUT_BY_INPUTS = {*ROW_SPLIT, VISION_DOWN}
REPEATED = {
    CLASS_EMBEDDING, POSITIONS, NORM_BEFORE, NORM_AFTER, *LAYER_NORMS,
}  # fmt: skip
WHOLE = {Suffix.SHAPE, Suffix.GLOBAL_SCALE, Suffix.INPUT_SCALE, Suffix.INPUT_GLOBAL_SCALE, *KV_SUFFIXES}


def stage_layers(num_layers: int, stages: int) -> list[range]:
    """Layers of each pipeline stage: the remainder goes to the middle stages (vLLM `distributed/utils.py`)."""
    sizes = [num_layers // stages] * stages
    for index in range(2, num_layers % stages + 2):
        sizes[-index] += 1
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def weights_by_role(subject: Subject, setting: Setting, runtime: Runtime) -> list[dict[Role, int]]:
    """Bytes on the GPU by role, for each pipeline stage. Raises UsageError when a tensor can't be split `tp` ways."""
    if runtime.unpacks and subject.quantized:
        subject = _unpacked(subject)
    return _by_role(subject, setting.tp, setting.pp, setting.expert_parallel, runtime.casts)


@lru_cache(maxsize=8)
def _unpacked(subject: Subject) -> Subject:
    return from_config(subject.name, subject.config)


@lru_cache(maxsize=64)
def _by_role(subject: Subject, tp: int, pp: int, expert_parallel: bool, casts: bool) -> list[dict[Role, int]]:
    text = subject.config.text
    stages = stage_layers(text.num_hidden_layers, pp)
    totals: list[dict[Role, int]] = [defaultdict(int) for _ in stages]
    for kind, count in subject.kinds.items():
        nbytes = _per_gpu(kind, count * _element_bytes(kind, casts), text, tp, expert_parallel)
        for stage in _stages_of(kind, stages, text.tie_word_embeddings):
            totals[stage][kind.role] += nbytes
    return [dict(total) for total in totals]


def _stages_of(kind: TensorKind, stages: list[range], tied: bool) -> list[int]:
    last = len(stages) - 1
    if kind.layer is not None:
        return [index for index, layers in enumerate(stages) if kind.layer in layers]
    if kind.role in (Role.VISION, Role.PROJECTOR):
        return list(range(len(stages)))
    if kind.role is Role.EMBEDDING:
        return sorted({0, last}) if tied else [0]
    return [last]


def _per_gpu(kind: TensorKind, weight: int, text: TextConfig, tp: int, expert_parallel: bool) -> int:
    if kind.role is Role.ROUTED_EXPERT and expert_parallel:
        experts = text.num_local_experts
        return math.prod(kind.shape) * weight * -(-experts // tp) // experts
    axis = _split_axis(kind)
    if axis is None:
        return math.prod(kind.shape) * weight
    size = kind.shape[axis]
    return math.prod(kind.shape) // size * _share(kind, size, text, tp) * weight


def _element_bytes(kind: TensorKind, casts: bool) -> int:
    """Bytes of an element on the GPU; a runtime that casts holds floats in the model's dtype and FP8 scales in float32."""
    if not casts:
        return kind.nbytes // max(math.prod(kind.shape), 1)
    if kind.form is FLOAT_QUANTIZED and kind.suffix == Suffix.SCALE:
        return FP8_SCALE_BYTES
    if kind.dtype in FLOATS:
        return MODEL_BYTES
    return kind.nbytes // max(math.prod(kind.shape), 1)


def _split_axis(kind: TensorKind) -> int | None:
    """The axis tensor parallelism cuts; None for a tensor that every GPU holds whole.

    A row-split bias or channel scale has no such axis, and so is repeated.
    """
    if kind.role in (Role.ROUTER, Role.NORM) or kind.suffix in WHOLE:
        return None
    if kind.projection in REPEATED:
        return None
    axis = 1 if kind.projection in CUT_BY_INPUTS else 0
    if kind.role is Role.ROUTED_EXPERT and len(kind.shape) == 3:
        axis = 2 if kind.projection.startswith(GATE_UP) else 1
    return axis if len(kind.shape) > axis and kind.shape[axis] > 1 else None


def _share(kind: TensorKind, size: int, text: TextConfig, tp: int) -> int:
    """How much of an axis one GPU holds."""
    if kind.role in (Role.EMBEDDING, Role.LM_HEAD):
        padded = -(-size // VOCAB_PADDING) * VOCAB_PADDING
        return -(-padded // tp)
    parts = tp
    if kind.role is Role.ATTENTION and kind.projection in (KEY, VALUE):
        parts = min(tp, text.num_key_value_heads)
    if size % parts:
        raise UsageError(
            f"{kind.projection} has {size} to split {parts} ways, which leaves a remainder",
            hint="use a smaller --tp, or --expert-parallel",
        )
    return size // parts
