"""Predicted against measured: allocate what the budget counts on a real GPU and read what the device says.

One GPU stands for the one that decides. Weights and KV cache are allocated at their real sizes; the phases of a forward pass
are run on random numbers; what several GPUs exchange and what a server captures as graphs is not there to be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from l4pack.budget.lines import Line, LineGroup
from l4pack.budget.model import Budget
from l4pack.errors import L4packError

SAMPLED_PHASES = ("sampler",)


class DeviceMemory(Protocol):
    """A device that memory can be taken from and read on."""

    def name(self) -> str:
        """What the driver calls the device."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes, as the driver reports them."""
        ...

    def allocate(self, nbytes: int) -> Any:
        """Take bytes; they are held as long as the result lives. Raises MemoryError."""
        ...

    def allocated(self) -> int:
        """Bytes that allocations hold now."""
        ...

    def peak(self, work: Callable[[], None]) -> int:
        """Most bytes held at once while `work` runs, over those held before."""
        ...

    def sample(self, rows: int, vocabulary: int) -> None:
        """What a sampler does with `rows` rows of BF16 logits."""
        ...


@dataclass(frozen=True)
class Measured:
    """One line: what was predicted, and what the device said; None where this can't be measured on one GPU."""

    name: str
    low: int
    high: int
    measured: int | None

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return {"name": self.name, "low_bytes": self.low, "high_bytes": self.high, "measured_bytes": self.measured}


def measure_device(found: Budget, reader: DeviceMemory) -> list[Measured]:
    """Allocate every line that one GPU can hold and read it back. Raises L4packError when the device is too small."""
    free, total = reader.memory()
    lines = [Measured("device memory", found.host.device.memory_bytes, found.host.device.memory_bytes, total)]
    lines += [_line(line, total - free) for line in found.lines if line.name == "device context"]
    held: list[Any] = []
    for line in found.lines:
        if line.group in (LineGroup.WEIGHTS, LineGroup.KV_CACHE) or line.name in ("position table", "request tables"):
            lines.append(_line(line, _take(line, reader, held)))
        elif line.name not in ("device context", "activations"):
            lines.append(_line(line, None))
    lines += [_line(line, _sampler(found, line, reader)) for line in found.lines if line.name == "activations"]
    return lines


def _take(line: Line, reader: DeviceMemory, held: list[Any]) -> int:
    before = reader.allocated()
    try:
        held.append(reader.allocate(line.low))
    except MemoryError as error:
        raise L4packError(
            f"the device has no room for {line.name}", hint="measure a load that fits this device"
        ) from error
    return reader.allocated() - before


def _sampler(found: Budget, line: Line, reader: DeviceMemory) -> int | None:
    """The widest phase, where it is the sampler; other phases need the model's own kernels."""
    if not line.formula.endswith(SAMPLED_PHASES):
        return None
    rows = min(found.setting.requests, found.setting.step_tokens)
    return reader.peak(lambda: reader.sample(rows, found.subject.config.text.vocab_size))


def _line(line: Line, measured: int | None) -> Measured:
    return Measured(line.name, line.low, line.high, measured)
