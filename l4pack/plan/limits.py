"""What a run may take of the machine it is planned on."""

from __future__ import annotations

from l4pack.containers.safetensors_folder import DEFAULT_SHARD_BYTES
from l4pack.plan.plan import RunLimits
from l4pack.work.device import CPU
from l4pack.work.machine import Room


def limits_here(
    device: str, *, max_ram: int | None = None, max_vram: int | None = None, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> RunLimits:
    """Limits of a run that computes on a device of this machine, in bytes; its memory is looked at unless it is the CPU."""
    return RunLimits(
        max_ram=max_ram,
        max_vram=max_vram,
        accelerated=device != CPU,
        free_vram=_free_vram(device, max_vram),
        shard_bytes=shard_bytes,
    )


def _free_vram(device: str, asked: int | None) -> Room | None:
    """What the device has free, of that no more than asked for."""
    if device == CPU:
        return None
    from l4pack.stream.compute import float32_on  # imports torch

    return float32_on(device).device_room(asked)
