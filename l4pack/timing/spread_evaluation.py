"""An evaluation or a measurement on so many workers of a cluster: how long, and what each reads and writes.

The stages are those of `evaluate.spread`; tokens are taken as shared out evenly among experts. Waves of a measurement wait for
nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from l4pack.model.config import TextConfig
from l4pack.model.parts import attention_shapes, mlp_shapes
from l4pack.model.tensors import Role
from l4pack.timing.counts import attending, running_mlp, scoring
from l4pack.timing.jobs import LayerWeights, mlps_of, tokens_of
from l4pack.timing.speeds import Speeds
from l4pack.timing.spread import TASKS_A_WORKER, Spread, makespan, waited
from l4pack.timing.work import Kind, Work

HIDDEN_READ, HIDDEN_WRITTEN = 5, 3  # times hidden states of a model pass in a layer


@dataclass(frozen=True)
class Evaluated:
    """Models beside each other on so many tokens, in sequences of a length; `itemsize` bytes a number of hidden states."""

    text: TextConfig
    models: Sequence[LayerWeights]
    tokens: int
    length: int
    itemsize: int


def spread_evaluation(job: Evaluated, workers: int, speeds: Speeds) -> Spread:
    """An evaluation on so many workers, each as fast as `speeds`."""
    text, count = job.text, len(job.models)
    moe, dense = len(text.moe_layers), text.num_hidden_layers - len(text.moe_layers)
    with_experts = list(_layer(job, workers, speeds, moe=True)) if moe else []
    parts = TASKS_A_WORKER * workers
    answers = speeds.seconds(scoring(text, job.tokens, count))
    stages = moe * with_experts + (dense * list(_layer(job, workers, speeds, moe=False)) if dense else [])
    stages.append([answers / parts] * parts)
    alone, whole = sum(map(sum, stages)), sum(makespan(stage, workers) for stage in stages)
    barrier = sum(waited(stage, workers) for stage in with_experts)
    read, written = _bytes(job, workers)
    return Spread(workers, whole, alone, max(0.0, 1 - alone / (workers * whole)), barrier, read, written)


def spread_waves(waves: Sequence[Sequence[Work]], workers: int, speeds: Speeds, read_bytes: int) -> Spread:
    """Waves of a measurement on so many workers, which read so many bytes of weights together."""
    seconds = [sum(map(speeds.seconds, wave)) for wave in waves]
    written = sum(work.total(Kind.WRITE) for wave in waves for work in wave)
    alone, whole = sum(seconds), makespan(seconds, workers)
    waiting = max(0.0, 1 - alone / (workers * whole))
    return Spread(workers, whole, alone, waiting, 0.0, read_bytes / workers, written / workers)


def _layer(job: Evaluated, workers: int, speeds: Speeds, *, moe: bool) -> Iterator[list[float]]:
    """The tasks of each stage of a layer, with experts or without; each loads what it runs."""
    text, parts, tokens = job.text, TASKS_A_WORKER * workers, len(job.models) * job.tokens
    attention = speeds.seconds(attending(text, tokens, job.length, Kind.FORWARD, speeds.device))
    yield [attention / parts + _loading(job, _numbers(attention_shapes(text)), speeds)] * parts
    everyones = Role.SHARED_EXPERT if moe else Role.DENSE_MLP
    yield [_running(job, everyones, speeds, parts) + _loading(job, _mlp(text, everyones), speeds)] * parts
    if moe:
        one = _running(job, Role.ROUTED_EXPERT, speeds, 1) + _loading(job, _mlp(text, Role.ROUTED_EXPERT), speeds)
        yield [one] * text.num_local_experts


def _running(job: Evaluated, role: Role, speeds: Speeds, parts: int) -> float:
    tokens = tokens_of(job.text, role, len(job.models) * job.tokens) / parts
    inner = mlps_of(job.text)[role].inner
    return speeds.seconds(running_mlp(job.text, inner, tokens, Kind.FORWARD, role.value, speeds.device))


def _loading(job: Evaluated, numbers: int, speeds: Speeds) -> float:
    """Making so many weights of each model ready to compute with."""
    return sum(
        speeds.seconds(model.loading()) * numbers / max(1, model.plain + model.quantized) for model in job.models
    )


def _mlp(text: TextConfig, role: Role) -> int:
    return _numbers(mlp_shapes(text.hidden_size, mlps_of(text)[role].inner))


def _numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _bytes(job: Evaluated, workers: int) -> tuple[float, float]:
    """What a worker reads and writes: its share of experts and hidden states, and all of attention and everyone's MLPs."""
    text, layers = job.text, job.text.num_hidden_layers
    hidden = len(job.models) * job.tokens * text.hidden_size * job.itemsize * layers / workers
    shared = sum(
        units.count * _mlp(text, role) for role, units in mlps_of(text).items() if role is not Role.ROUTED_EXPERT
    )
    shared += layers * _numbers(attention_shapes(text))
    read = 0.0
    for model in job.models:
        common = model.nbytes * shared / max(1, model.plain + model.quantized)
        read += common + (model.nbytes - common) / workers
    return read + HIDDEN_READ * hidden, HIDDEN_WRITTEN * hidden
