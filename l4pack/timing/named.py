"""Speeds of devices and hosts that are named: data sheets, and what is assumed to be reached of them.

A name is a device or a host of `l4pack devices` (`h100`, `8xh100`), so many cores (`64-core`), or a cloud instance whose
name tells its threads (`c7i.16xlarge`).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from l4pack.budget.devices import Host, SpeedData, find_host, load_devices
from l4pack.datafile import read_yaml, validate
from l4pack.errors import UsageError
from l4pack.timing.speeds import Speeds
from l4pack.timing.work import Kind
from l4pack.work.device import CPU, CUDA

ASSUMPTIONS = Path(__file__).parent / "assumptions.yaml"
MAX_CORES = 1024
_CORES = re.compile(r"(\d{1,4})-cores?")
_INSTANCE = re.compile(r"([a-z]+\d[a-z-]*)\.(?:(\d{1,3})?xlarge|(large))")
_THREADS_OF_XLARGE, _THREADS_OF_LARGE = 4, 2
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(_Data):
    """What part of a peak is reached, and why that is believed."""

    share: Annotated[float, Field(gt=0, le=1)]
    why: str


class Rate(_Data):
    """An amount a second, and why that is believed."""

    rate: Positive
    why: str


class GpuData(_Data):
    """What is reached of a GPU's peaks; where memory decides, the bytes that pass for each piece of work."""

    product: Share
    tensor: Share
    update: Share
    product64: Share
    forward: Share
    cholesky: Share
    memory: Share
    call: Rate
    step: Rate
    bytes_a_weight: dict[Kind, Positive]


class Assumptions(_Data):
    """The file of assumptions."""

    gpu: GpuData
    core: dict[Kind, Rate]
    one_thread: list[Kind]
    scaling: Annotated[float, Field(gt=0, le=1)]
    host: dict[Kind, Rate]
    threads_per_core: dict[str, Annotated[int, Field(ge=1, le=8)]]


def assumptions(path: Path = ASSUMPTIONS) -> Assumptions:
    """What is assumed. Raises RecipeError naming file and key."""
    return validate(Assumptions, read_yaml(path), str(path), hint="install l4pack again: the file came with it")


@cache
def _shipped() -> Assumptions:
    return assumptions()


def named_speeds(name: str, devices: Path | None = None, assumed: Assumptions | None = None) -> Speeds:
    """What the device, host, number of cores or instance of that name does; `devices` is a file of the user's own.

    Raises UsageError for a name that is not known, or a device whose data has no speed.
    """
    assumed = assumed or _shipped()
    cores = _cores_of(name.strip().lower(), assumed)
    if cores is not None:
        return _of_cores(name, cores, assumed)
    host = find_host(name, load_devices(devices))
    if host.device.speed is None:
        raise UsageError(
            f"no speed is known of {host.device.name}", hint="give its data sheet's under `speed` in a --devices FILE"
        )
    return _of_host(host, host.device.speed, assumed)


def _cores_of(name: str, assumed: Assumptions) -> int | None:
    """How many cores a name means; None where it is a device's. Raises UsageError."""
    if match := _CORES.fullmatch(name):
        cores = int(match[1])
    elif match := _INSTANCE.fullmatch(name):
        if match[1] not in assumed.threads_per_core:
            known = ", ".join(assumed.threads_per_core)
            raise UsageError(f"no instance is named '{name}'", hint=f"families: {known}; or say its cores, as 32-core")
        threads = _THREADS_OF_LARGE if match[3] else _THREADS_OF_XLARGE * int(match[2] or 1)
        cores = max(1, threads // assumed.threads_per_core[match[1]])
    else:
        return None
    if not 1 <= cores <= MAX_CORES:
        raise UsageError(f"'{name}': a host has 1 to {MAX_CORES} cores", hint="for example 64-core")
    return cores


def _of_cores(name: str, cores: int, assumed: Assumptions) -> Speeds:
    together = 1 + (cores - 1) * assumed.scaling
    rates = {kind: one.rate for kind, one in assumed.host.items()}
    for kind, one in assumed.core.items():
        rates[kind] = one.rate * (1 if kind in assumed.one_thread else together)
    basis = f"assumed for {cores} cores of a recent server, not measured"
    return Speeds(name.strip().lower(), rates, basis, device=CPU)


def _of_host(host: Host, peak: SpeedData, assumed: Assumptions) -> Speeds:
    gpu = assumed.gpu
    memory = peak.memory * gpu.memory.share
    rates = {
        **{kind: one.rate for kind, one in assumed.host.items()},
        Kind.PRODUCT: peak.float32 * gpu.product.share,
        Kind.TENSOR: max(peak.float32 * gpu.product.share, peak.bfloat16 * gpu.tensor.share),
        Kind.UPDATE: peak.float32 * gpu.update.share,
        Kind.CHOLESKY: peak.float32 * gpu.cholesky.share,
        Kind.PRODUCT64: peak.float64 * gpu.product64.share,
        Kind.FORWARD: peak.bfloat16 * gpu.forward.share,
        Kind.MEMORY: memory,
        Kind.CALL: gpu.call.rate,
        Kind.STEP: gpu.step.rate,
        **{kind: memory / nbytes for kind, nbytes in gpu.bytes_a_weight.items()},
    }
    reached = f"{gpu.product.share:.0%} of float32's peak in products, {gpu.tensor.share:.0%} of BF16's by tensor cores"
    basis = f"assumed from data sheets ({reached}), not measured"
    return Speeds(host.name, rates, basis, host.count, CUDA, host.device.memory_bytes)
