"""Where to compute: the one reading of what a user asks for."""

from __future__ import annotations

from pathlib import Path

from l4pack.errors import UsageError

CPU, CUDA, AUTO = "cpu", "cuda", "auto"
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def chosen(compute: str) -> str:
    """`cpu` or the torch device that `cpu`, `cuda`, `cuda:N` or `auto` (CUDA where there is one) means here.

    Raises UsageError.
    """
    if compute == CPU or (compute == AUTO and not any(Path(file).exists() for file in _DRIVER_FILES)):
        return CPU  # without importing torch, which takes a second and 250 MB
    import torch

    if compute == AUTO:
        return CUDA if torch.cuda.is_available() else CPU
    try:
        device = torch.device(compute)
    except RuntimeError:
        device = None
    if device is None or device.type != CUDA:
        raise UsageError(f"'{compute}' is not a place to compute", hint="choose cpu, cuda, cuda:N or auto")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"this machine has no {compute}", hint="choose cpu, or install a CUDA build of torch")
    return compute
