"""Runtimes as data: how each splits the device, keeps KV, and what it needs besides."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict

from l4pack.budget.devices import DATA, Device, WrittenSize
from l4pack.datafile import read_yaml, validate
from l4pack.errors import UsageError
from l4pack.model.config import VisionConfig
from l4pack.units import GIB

Range = tuple[WrittenSize, WrittenSize]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BatchDefaults(_Data):
    """The batch limits a runtime takes on devices of at least `min_memory`."""

    min_memory: WrittenSize
    batched_tokens: int
    max_num_seqs: int


class Reserve(_Data):
    """What a runtime keeps free for activations and graphs on devices below `max_memory`."""

    max_memory: WrittenSize
    gib: float
    gib_per_gpu: float


class ServeOptions(_Data):
    """How a runtime's server is started, and what it calls each part of a load; empty where it has no word for it."""

    command: list[str]
    context: str
    max_num_seqs: str
    batched_tokens: str
    tp: str
    pp: str
    utilization: str
    kv_dtype: list[str]
    overrides: str
    images: str = ""
    expert_parallel: list[str] = []
    no_hybrid: list[str] = []


class Runtime(_Data):
    """One runtime. Pairs are [low, high] bytes per GPU, or bytes per element where the formula says so."""

    title: str
    source: str
    utilization: float | None = None
    reserve: list[Reserve] = []
    vision_shrinks_reserve: bool = False
    serve: ServeOptions | None = None
    kv: Literal["blocks", "pools", "dynamic", "full", "llama.cpp", "mlx"]
    kv_dtypes: list[str] = ["bfloat16", "fp8"]
    hybrid: bool
    block_size: int
    local_ratio: float = 1.0
    chunked_prefill: bool
    pipeline: bool = False
    unpacks: bool = False
    casts: bool = True
    batches: list[BatchDefaults] = []
    rope_bytes: tuple[int, int] = (0, 0)
    rope_per_context: int = 0
    table_bytes: tuple[int, int] = (0, 0)
    sampler_bytes: tuple[int, int] = (0, 0)
    context: Range
    communication: Range = (0, 0)
    graphs: Range = (0, 0)

    def defaults(self, device: Device) -> BatchDefaults | None:
        """The batch limits this runtime takes on a device by itself; None when it runs a prompt as one batch."""
        memory = 0 if device.small_batches else device.memory_bytes
        return next((tier for tier in self.batches if memory >= tier.min_memory), None)

    def fraction(self, device: Device, gpus: int, vision: VisionConfig | None) -> float:
        """The share of a device that the runtime plans with."""
        if self.utilization is not None:
            return self.utilization
        tier = next((tier for tier in self.reserve if device.memory_bytes < tier.max_memory), self.reserve[-1])
        kept = (tier.gib + tier.gib_per_gpu * gpus) * GIB
        fraction = round((device.memory_bytes - kept) / device.memory_bytes, 3)
        return fraction * (_vision_factor(vision) if self.vision_shrinks_reserve and vision else 1.0)


def load_runtime(name: str) -> Runtime:
    """A runtime by name. Raises UsageError with the nearest names."""
    known = _runtimes()
    if name not in known:
        close = get_close_matches(name, known, n=2, cutoff=0.5) or list(known)
        raise UsageError(f"no runtime is named '{name}'", hint=f"did you mean {' or '.join(close)}?")
    return known[name]


class _RuntimeFile(_Data):
    runtimes: dict[str, Runtime]


@cache
def _runtimes() -> dict[str, Runtime]:
    return validate(_RuntimeFile, read_yaml(DATA / "runtimes.yaml"), "runtimes.yaml").runtimes


def _vision_factor(vision: VisionConfig) -> float:
    """SGLang's own rule: 0.95, less a tenth for every doubling over a ViT-L/14, between 0.8 and 1.05 of that."""
    complexity = vision.num_hidden_layers * vision.hidden_size**2 / (24 * 1024**2)
    return 0.95 * max(0.8, min(1.05, 1.0 - 0.1 * (complexity - 1.0)))
