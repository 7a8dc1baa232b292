"""Accelerators and hosts, from `devices.yaml` and from files people add.

A host is N of a device, written `8xh100`; one device needs no number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from l4pack.datafile import read_yaml, validate
from l4pack.errors import RecipeError, UsageError
from l4pack.units import parse_size

DATA = Path(__file__).parent
MAX_GPUS = 1024


def _size(value: object) -> int:
    try:
        return parse_size(str(value))
    except UsageError as error:
        raise ValueError(error.message) from None


WrittenSize = Annotated[int, BeforeValidator(_size)]  # as a file writes it: `80GiB`, or plain bytes


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SpeedData(BaseModel):
    """What a device does at best, by its data sheet: operations a second of dense products by dtype, no sparsity counted,
    and bytes a second of its memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    float32: Rate
    float64: Rate
    bfloat16: Rate
    memory: Rate
    source: str


class DeviceData(BaseModel):
    """One device as a file describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    memory: Annotated[WrittenSize, Field(gt=0)]
    source: str
    aliases: list[str] = []
    small_batches: bool = False
    unified: bool = False
    speed: SpeedData | None = None


class DeviceFile(BaseModel):
    """A file of devices."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: dict[str, DeviceData] = Field(min_length=1)


@dataclass(frozen=True)
class Device:
    """One accelerator; `memory_bytes` is what the driver hands out, not the label."""

    name: str
    title: str
    memory_bytes: int
    source: str
    aliases: tuple[str, ...] = ()
    small_batches: bool = False
    unified: bool = False  # shared with the system, which takes its part of it
    speed: SpeedData | None = None


@dataclass(frozen=True)
class Host:
    """`count` of one device."""

    device: Device
    count: int

    @property
    def name(self) -> str:
        """`h100` or `8xh100`."""
        return self.device.name if self.count == 1 else f"{self.count}x{self.device.name}"


def load_devices(extra: Path | None = None) -> dict[str, Device]:
    """Devices by name: the shipped ones, and over them those of `extra`. Raises UsageError naming file and key."""
    return _read(DATA / "devices.yaml") | (_read(extra) if extra else {})


def find_host(text: str, devices: dict[str, Device]) -> Host:
    """The host meant by `h100` or `8xh100`. Raises UsageError with the nearest names."""
    match = re.fullmatch(r"(?:(\d{1,4})\s*[x×*]\s*)?([a-z0-9][a-z0-9._-]*)", text.strip().lower())
    if match is None:
        raise UsageError(f"'{text}' is not a device", hint="write a device or a host, for example h100 or 8xh100")
    count = int(match[1] or 1)
    if not 1 <= count <= MAX_GPUS:
        raise UsageError(f"'{text}': a host has 1 to {MAX_GPUS} devices", hint="for example 8xh100")
    names = {alias: device for device in devices.values() for alias in (device.name, *device.aliases)}
    if match[2] not in names:
        close = get_close_matches(match[2], names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(devices)}; or --devices FILE"
        raise UsageError(f"no device is named '{match[2]}'", hint=hint)
    return Host(names[match[2]], count)


def _read(path: Path) -> dict[str, Device]:
    try:
        data = validate(
            DeviceFile, read_yaml(path), str(path), hint="`l4pack devices` lists those that are known without"
        )
    except RecipeError as error:
        raise UsageError(error.message, hint=f"keys of a device: {', '.join(DeviceData.model_fields)}") from None
    return {name.lower(): _device(name.lower(), entry) for name, entry in data.devices.items()}


def _device(name: str, entry: DeviceData) -> Device:
    values = entry.model_dump(exclude={"memory", "aliases", "speed"})
    return Device(name, memory_bytes=entry.memory, aliases=tuple(entry.aliases), speed=entry.speed, **values)
