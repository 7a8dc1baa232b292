"""Moving data to and from a device beside what it computes: on streams of their own, out of pinned memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from l4pack.work.device import CUDA


@contextmanager
def beside(device: torch.device, *, after: bool = False) -> Iterator[None]:
    """What this thread starts on the device meanwhile waits for nobody, but with `after` for what is started already; it
    is done at the end. Nothing else is done for a CPU."""
    if device.type != CUDA:
        yield
        return
    own: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    if after:
        own.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(own):
        yield
    own.synchronize()


def hand_over(tensors: Iterable[Tensor]) -> None:
    """Tensors made `beside` are used by the other threads from now on: their memory is theirs until they are done."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.default_stream(tensor.device))


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of the machine on a device: as it is, out of pinned memory, and only there in another dtype."""
    if device.type != CUDA:
        return tensor.to(device, dtype)
    return tensor.pin_memory().to(device, non_blocking=True).to(dtype)
