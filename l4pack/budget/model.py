"""The budget: every line of a GPU's memory, and whether the lines fit.

Pure arithmetic over a subject's tensors, a host, a runtime and a load. Lines that nobody can know exactly are ranges, so a
budget has two ends; it fits only when it fits at the dear one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from l4pack.budget.activations import phases, request_tables, rope_table
from l4pack.budget.devices import Host
from l4pack.budget.files import FileSubject, runtime_of
from l4pack.budget.kv import kv_cache
from l4pack.budget.lines import WEIGHT_LINES, Line, LineGroup, Stage
from l4pack.budget.load import Load, Setting, resolve
from l4pack.budget.local import local_lines
from l4pack.budget.runtimes import Runtime, load_runtime
from l4pack.budget.split import check_split
from l4pack.budget.subject import Subject
from l4pack.budget.weights import stage_layers, weights_by_role
from l4pack.model.tensors import Role
from l4pack.units import KIB, human_bytes, human_gib

UNPUBLISHED = "a range: no runtime publishes it"


class Verdict(StrEnum):
    """Whether the lines fit: at both ends of the ranges, at the cheap end only, or not at all."""

    FITS = "fits"
    UNSURE = "unsure"
    TOO_LARGE = "does_not_fit"


@dataclass(frozen=True)
class Budget:
    """A subject's memory on a host under a load."""

    subject: Subject
    host: Host
    runtime: Runtime
    setting: Setting
    stages: tuple[Stage, ...]
    outside: tuple[Line, ...] = ()  # in the machine's own memory, where a runtime keeps a part of the model there

    @cached_property
    def tightest(self) -> Stage:
        """The GPU that decides."""
        return min(self.stages, key=lambda stage: stage.headroom(high=True))

    @property
    def lines(self) -> tuple[Line, ...]:
        """The lines of the GPU that decides."""
        return self.tightest.lines

    @property
    def headroom_bytes(self) -> int:
        """Bytes to spare per GPU when every range is at its high end."""
        return self.tightest.headroom(high=True)

    @property
    def headroom_high_bytes(self) -> int:
        """Bytes to spare per GPU when every range is at its low end."""
        return min(stage.headroom(high=False) for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether it fits at both ends."""
        return self.headroom_bytes >= 0

    @property
    def verdict(self) -> Verdict:
        """Fits, unsure, or does not fit."""
        if self.fits:
            return Verdict.FITS
        return Verdict.UNSURE if self.headroom_high_bytes >= 0 else Verdict.TOO_LARGE

    def lacking(self, verb: str) -> str:
        """What there is too little of per GPU at the dear end, with `lack` or `lacks`; `may lack` where that is not sure."""
        said = "may lack" if self.verdict is Verdict.UNSURE else verb
        return f"{said} {human_gib(-self.headroom_bytes)}"


def budget(subject: Subject, host: Host, load: Load, runtime: str = "vllm") -> Budget:
    """The budget of a subject on a host. Raises UsageError for a load that the model or the runtime can't take."""
    profile = load_runtime(runtime_of(subject, runtime))
    setting = resolve(subject, host, profile, load)
    check_split(subject, setting, runtime)
    return assess(subject, host, profile, setting)


def assess(subject: Subject, host: Host, runtime: Runtime, setting: Setting) -> Budget:
    """The budget for a setting with every choice made."""
    if isinstance(subject, FileSubject):
        return Budget(subject, host, runtime, setting, *local_lines(subject, host, runtime, setting))
    weights = weights_by_role(subject, setting, runtime)
    memory = host.device.memory_bytes
    planned = -int(-memory * setting.utilization // 1)  # rounded up, as vLLM does
    fixed = _fixed_lines(subject, setting, runtime)
    layers = stage_layers(subject.config.text.num_hidden_layers, setting.pp)
    stages = tuple(
        Stage(
            index,
            (*_weight_lines(roles, setting), _kv_line(subject, setting, runtime, layers[index]), *fixed),
            planned,
            memory - planned,
        )
        for index, roles in enumerate(weights)
    )
    return Budget(subject, host, runtime, setting, stages)


def _weight_lines(roles: dict[Role, int], setting: Setting) -> list[Line]:
    lines = []
    for name, members, formula in WEIGHT_LINES:
        size = sum(roles.get(role, 0) for role in members)
        whole_experts = setting.expert_parallel and Role.ROUTED_EXPERT in members
        how = "whole experts / tp" if whole_experts else "as stored" if setting.tp == 1 else formula
        if size:
            lines.append(Line(name, LineGroup.WEIGHTS, size, size, how))
    return lines


def _kv_line(subject: Subject, setting: Setting, runtime: Runtime, layers: range) -> Line:
    cache = kv_cache(subject.config.text, setting, runtime, layers)
    size = cache.total(setting.sequences)
    if cache.held_bytes:
        blocks = cache.bytes_per_request // cache.held_bytes
        how = f"{setting.sequences:,} x {blocks:,} blocks of {cache.held_bytes / KIB:g} KiB, 1 held back"
    else:
        how = f"{setting.sequences:,} x {human_bytes(cache.bytes_per_request)}"
    return Line("KV cache", LineGroup.KV_CACHE, size, size, how)


def _fixed_lines(subject: Subject, setting: Setting, runtime: Runtime) -> list[Line]:
    """Lines that are the same on every stage, as far as a budget can know."""
    text = subject.config.text
    found = phases(subject.config, setting, runtime, subject.quantized)
    low, high = max(phase.low for phase in found), max(phase.high for phase in found)
    widest = max(found, key=lambda phase: phase.high).name
    outside = bool(runtime.reserve)
    links = runtime.communication if setting.gpus > 1 and not runtime.pipeline else (0, 0)
    positions = f"{setting.context if runtime.rope_per_context else setting.max_positions:,} positions"
    step = f"{setting.step_tokens:,} tokens a step, {setting.requests:,} requests"
    lines = [
        Line("position table", LineGroup.RUNTIME, *rope_table(text, setting, runtime), positions),
        Line(
            "request tables",
            LineGroup.RUNTIME,
            *request_tables(text, setting, runtime),
            f"{setting.requests:,} requests",
        ),
        Line("activations", LineGroup.ACTIVATIONS, low, high, f"{step}; widest: {widest}", outside),
        Line("CUDA graphs", LineGroup.RUNTIME, *runtime.graphs, UNPUBLISHED, outside),
        Line("device context", LineGroup.RUNTIME, *runtime.context, UNPUBLISHED),
        Line("communication", LineGroup.RUNTIME, *links, UNPUBLISHED),
    ]
    return [line for line in lines if line.high]
