"""Predicted against measured: allocate what the budget counts on a real GPU and read what the device says.

One GPU stands for the one that decides. Weights and KV cache are allocated at their real sizes; the phases of a forward pass
are run on random numbers; what several GPUs exchange and what a server captures as graphs is not there to be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from l4pack.budget.model import Budget, Group, Line
from l4pack.errors import L4packError
from l4pack.units import GIB

CHUNK = GIB
SAMPLED_PHASES = ("sampler",)


class Reader(Protocol):
    """A device that memory can be taken from and read on."""

    def name(self) -> str:
        """What the driver calls the device."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes, as the driver reports them."""
        ...

    def allocate(self, nbytes: int) -> Any:
        """Take bytes; they are held as long as the result lives."""
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


class TorchReader:
    """A CUDA or ROCm device through torch. Raises L4packError where there is none."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise L4packError("there is no GPU to measure on", hint="run this where torch.cuda.is_available()")
        self._device = torch.device("cuda", 0)
        torch.zeros(1, device=self._device)  # makes the context, which is part of what is measured

    def name(self) -> str:
        """What the driver calls the device."""
        return torch.cuda.get_device_name(self._device)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes, as the driver reports them."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free), int(total)

    def allocate(self, nbytes: int) -> Any:
        """Take bytes in pieces of a GiB."""
        sizes = [CHUNK] * (nbytes // CHUNK) + ([nbytes % CHUNK] if nbytes % CHUNK else [])
        return [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]

    def allocated(self) -> int:
        """Bytes that torch's allocator has handed out."""
        return int(torch.cuda.memory_allocated(self._device))

    def peak(self, work: Callable[[], None]) -> int:
        """Most bytes held at once while `work` runs, over those held before."""
        before = self.allocated()
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_allocated(self._device)) - before

    def sample(self, rows: int, vocabulary: int) -> None:
        """Logits in BF16, their float32 copy, probabilities, and the noise a draw is made with."""
        logits = torch.rand(rows, vocabulary, dtype=torch.bfloat16, device=self._device)
        scores = logits.float().div_(0.5)
        probabilities = scores.softmax(dim=-1)
        noise = torch.empty_like(probabilities).exponential_()
        probabilities.div_(noise).argmax(dim=-1)


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


def measure(found: Budget, reader: Reader) -> list[Measured]:
    """Allocate every line that one GPU can hold and read it back. Raises L4packError when the device is too small."""
    free, total = reader.memory()
    lines = [Measured("device memory", found.host.device.memory_bytes, found.host.device.memory_bytes, total)]
    lines += [_line(line, total - free) for line in found.lines if line.name == "device context"]
    held: list[Any] = []
    for line in found.lines:
        if line.group in (Group.WEIGHTS, Group.KV_CACHE) or line.name in ("position table", "request tables"):
            lines.append(_line(line, _take(line, reader, held)))
        elif line.name not in ("device context", "activations"):
            lines.append(_line(line, None))
    lines += [_line(line, _sampler(found, line, reader)) for line in found.lines if line.name == "activations"]
    return lines


def _take(line: Line, reader: Reader, held: list[Any]) -> int:
    before = reader.allocated()
    try:
        held.append(reader.allocate(line.low))
    except torch.OutOfMemoryError as error:
        raise L4packError(
            f"the device has no room for {line.name}", hint="measure a load that fits this device"
        ) from error
    return reader.allocated() - before


def _sampler(found: Budget, line: Line, reader: Reader) -> int | None:
    """The widest phase, where it is the sampler; other phases need the model's own kernels."""
    if not line.formula.endswith(SAMPLED_PHASES):
        return None
    rows = min(found.setting.requests, found.setting.step_tokens)
    return reader.peak(lambda: reader.sample(rows, found.subject.config.text.vocab_size))


def _line(line: Line, measured: int | None) -> Measured:
    return Measured(line.name, line.low, line.high, measured)
