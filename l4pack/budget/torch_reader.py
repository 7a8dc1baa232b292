"""Reading a GPU's memory through torch. Apart from `measure`, so that a budget does not wait for torch to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from l4pack.errors import L4packError
from l4pack.units import GIB

CHUNK = GIB


class TorchReader:
    """A CUDA or ROCm device through torch. Raises L4packError where there is none."""

    def __init__(self, device: str = "cuda:0") -> None:
        if not torch.cuda.is_available():
            raise L4packError("there is no GPU to measure on", hint="run this where torch.cuda.is_available()")
        self._device = torch.device(device)
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
        """Take bytes in pieces of a GiB. Raises MemoryError."""
        sizes = [CHUNK] * (nbytes // CHUNK) + ([nbytes % CHUNK] if nbytes % CHUNK else [])
        try:
            return [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error

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
