"""Where matrices are quantized: the CPU kernels, or torch on a CUDA device, with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l4pack.errors import UsageError
from l4pack.execute import Quantizer
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import Quantized, quantize_block

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l4pack.quant.floats import FloatName
    from l4pack.quant.scheme import Scheme

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


def quantizer(device: str) -> Quantizer:
    """The quantizer for a device that `chosen` named."""
    return quantize_block if device == CPU else torch_quantizer(device)


def torch_quantizer(device: str) -> Quantizer:
    """Quantize with torch on `device`; a block is moved there and its arrays come back."""
    import torch

    from l4pack.quant import torch_ops

    def quantize(
        source: NDArray[Any], layout: Layout, dtype: FloatName, scheme: Scheme, *, amax: float | None = None
    ) -> Quantized:
        tensor = torch.from_numpy(np.ascontiguousarray(source)).to(device)
        if dtype == "BF16":
            tensor = tensor.view(torch.bfloat16)
        weight = tensor.T if layout is Layout.IN_OUT else tensor
        return torch_ops.quantize(weight, scheme, amax=amax).to_numpy()

    return quantize
