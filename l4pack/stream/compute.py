"""Where layers are computed, and in what: float32 on a CPU, BF16 on CUDA."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from l4pack.quant.precision import TF32, tensor_cores
from l4pack.work import machine
from l4pack.work.device import CPU, chosen

# Without it torch refuses every matrix product on CUDA that is to be deterministic; cuBLAS reads it when it starts.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Compute:
    """A device and the dtype of weights and hidden states on it."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str) -> Compute:
        """`cpu`, `cuda`, `cuda:N`, or `auto` (CUDA where there is one). Raises UsageError."""
        device = torch.device(chosen(name))
        return cls(device, torch.float32 if device.type == CPU else torch.bfloat16)

    def describe(self) -> str:
        """The device by its own name."""
        if self.device.type == "cuda":
            return str(torch.cuda.get_device_name(self.device))
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

    def parts(self) -> dict[str, Any]:
        """What decides the last bits of what is computed, as parts of a job's identity."""
        parts: dict[str, Any] = {"--compute": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}
        if self.device.type == CPU:
            parts["threads"] = torch.get_num_threads()
            parts["instruction set"] = torch.backends.cpu.get_cpu_capability()
        elif torch.cuda.is_available():
            parts["device"] = self.describe()
        if self.device.type != CPU and self.dtype is torch.float32:
            parts["products"] = TF32  # see `calibrating`
        return parts | {f"{name} version": version(name) for name in ("torch", "transformers", "numba")}

    @property
    def tiles(self) -> int:
        """Threads that widen matrices tile by tile; 0 where a device multiplies them in the dtype they are stored in."""
        return torch.get_num_threads() if self.device.type == CPU and self.dtype is torch.float32 else 0

    def device_room(self, max_vram: int | None = None) -> machine.Room | None:
        """What the device may give; None where the CPU computes, in the machine's memory."""
        if self.device.type == CPU:
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        if max_vram is not None and max_vram < free:
            return machine.Room(max_vram, machine.ASKED_OF_DEVICE)
        return machine.Room(int(free), machine.DEVICE)


def float32_on(device: str) -> Compute:
    """How calibration computes: in float32 wherever it is."""
    return Compute(torch.device(device), torch.float32)


@contextmanager
def reproducible() -> Iterator[None]:
    """Only algorithms of torch that give the same bits every time."""
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def calibrating() -> Iterator[None]:
    """How forward passes, gradients and second moments are computed: the same bits every time, and by a GPU's tensor cores.

    There their float32 products take factors rounded to TF32, eight times as finely as the BF16 that models are served in;
    solvers and routers take whole ones.
    """
    with reproducible(), tensor_cores():
        yield
