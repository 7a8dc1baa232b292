"""Lines of a GPU's memory: what a budget is made of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from l4pack.model.tensors import Role


class LineGroup(StrEnum):
    """What a line is about."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"
    ACTIVATIONS = "activations"
    RUNTIME = "runtime"


@dataclass(frozen=True)
class Line:
    """One line of memory on one GPU, in bytes; `formula` says how it was made, in words of the memory model."""

    name: str
    group: LineGroup
    low: int
    high: int
    formula: str
    outside: bool = False  # taken from what the runtime's own fraction leaves over


@dataclass(frozen=True)
class Stage:
    """One pipeline stage's GPU: its lines, the bytes the runtime plans with, and the bytes it leaves over."""

    index: int
    lines: tuple[Line, ...]
    planned_bytes: int
    rest_bytes: int

    def headroom(self, *, high: bool) -> int:
        """Bytes to spare at one end of the ranges; negative when the lines are too large."""
        inside = sum(line.high if high else line.low for line in self.lines if not line.outside)
        outside = sum(line.high if high else line.low for line in self.lines if line.outside)
        return min(self.planned_bytes - inside, self.rest_bytes - outside) if outside else self.planned_bytes - inside


WEIGHT_LINES: tuple[tuple[str, tuple[Role, ...], str], ...] = (
    ("routed experts", (Role.ROUTED_EXPERT,), "stored / tp"),
    ("shared experts", (Role.SHARED_EXPERT,), "stored / tp"),
    ("dense MLP", (Role.DENSE_MLP,), "stored / tp"),
    ("attention", (Role.ATTENTION,), "stored / tp, KV heads repeated beyond their number"),
    ("embedding, head", (Role.EMBEDDING, Role.LM_HEAD), "vocabulary padded to 64, / tp"),
    ("vision, projector", (Role.VISION, Role.PROJECTOR), "matrices / tp, norms and positions whole"),
    ("router, norms", (Role.ROUTER, Role.NORM), "whole on every GPU"),
)
