"""Bytes as bars: what an artifact is made of beside its original, and what serving it takes of a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from l4pack.budget.model import Budget
from l4pack.checkpoint.source import Checkpoint
from l4pack.model.names import classify
from l4pack.model.tensors import Role, catalogue
from l4pack.units import GIB, MIB, human_bytes, human_gib

_ITEM_BYTES = {"float32": 4}
_SLICES = {
    Role.ROUTED_EXPERT: "routed experts", Role.SHARED_EXPERT: "shared experts", Role.DENSE_MLP: "dense MLPs",
    Role.ATTENTION: "attention", Role.EMBEDDING: "embedding and head", Role.LM_HEAD: "embedding and head",
    Role.VISION: "vision and projector", Role.PROJECTOR: "vision and projector",
    Role.ROUTER: "routers and norms", Role.NORM: "routers and norms",
}  # fmt: skip


@dataclass(frozen=True)
class SizePair:
    """Bytes of one part in the original and in the artifact, and both as shares (in per cent) of the largest."""

    name: str
    before: int
    after: int
    before_width: float
    after_width: float


def size_pairs(artifact: Checkpoint) -> list[SizePair]:
    """Bytes by what they are for: what the original's configuration implies, and what the artifact's headers say."""
    before: dict[str, int] = defaultdict(int)
    after: dict[str, int] = defaultdict(int)
    item = _ITEM_BYTES.get(artifact.config.dtype or "", 2)
    for spec in catalogue(artifact.config).tensors:
        before[_SLICES[spec.role]] += spec.numel * item
    for name, entry in artifact.entries.items():
        after[_SLICES[classify(name).role]] += entry.nbytes
    before["all"], after["all"] = sum(before.values()), sum(after.values())
    scale = max(*before.values(), *after.values(), 1) / 100
    names = [name for name in ("all", *dict.fromkeys(_SLICES.values())) if before[name] or after[name]]
    return [SizePair(name, before[name], after[name], before[name] / scale, after[name] / scale) for name in names]


@dataclass(frozen=True)
class MemoryBar:
    """One line of a GPU's memory, put behind the lines before it: places in per cent of the drawing's width."""

    name: str
    amount: str
    start: float
    low: float  # width of what it takes at least
    range: float  # width of what it may take beyond that
    formula: str


@dataclass(frozen=True)
class MemoryBars:
    """All lines of a GPU, their sum, and where the runtime's plan and the GPU's memory end, in per cent."""

    bars: tuple[MemoryBar, ...]
    planned: float
    planned_bytes: int
    end: float
    device_bytes: int


def memory_bars(found: Budget) -> MemoryBars:
    """The memory of the GPU that decides: each line begins where those before it end at their low ends."""
    device, high = found.host.device.memory_bytes, sum(line.high for line in found.lines)
    scale = max(device, high) / 100
    planned = found.tightest.planned_bytes
    return MemoryBars(tuple(_bars(found, scale)), planned / scale, planned, device / scale, device)


def _bars(found: Budget, scale: float) -> Iterator[MemoryBar]:
    start = 0
    for line in found.lines:
        if line.high:
            yield _bar(line.name, start / scale, line.low, line.high, scale, line.formula)
        start += line.low
    yield _bar("in all", 0.0, start, sum(line.high for line in found.lines), scale, "")


def _bar(name: str, start: float, low: int, high: int, scale: float, formula: str) -> MemoryBar:
    least, most = _binary(low), _binary(high)
    shared = least[-4:] if least[-4:] == most[-4:] else ""
    amount = most if low == high else f"{least.removesuffix(shared)} to {most}"
    return MemoryBar(name, amount, start, low / scale, (high - low) / scale, formula)


def size_rows(pairs: list[SizePair]) -> list[tuple[str, str, str, str]]:
    """The pairs as rows of a table."""
    return [
        (pair.name, human_bytes(pair.before), human_bytes(pair.after), f"{100 * pair.after / pair.before:.1f} %")
        if pair.before
        else (pair.name, "0 B", human_bytes(pair.after), "")
        for pair in pairs
    ]


def _binary(count: int) -> str:
    return human_gib(count) if count >= GIB // 10 or not count else f"{max(0.01, count / MIB):.3g} MiB"
