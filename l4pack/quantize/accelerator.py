"""Where matrices are quantized: the CPU kernels, or torch on a CUDA device, with the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from l4pack.quant.layout import Layout
from l4pack.quant.quantize import quantize_block
from l4pack.quant.quantized import Quantized
from l4pack.quantize.execute import Quantizer
from l4pack.work.device import CPU

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l4pack.quant.dtypes import FloatName
    from l4pack.quant.scheme import Scheme


def quantizer(device: str) -> Quantizer:
    """The quantizer for a device that `chosen` named."""
    return quantize_block if device == CPU else torch_quantizer(device)


def torch_quantizer(device: str) -> Quantizer:
    """Quantize with torch on `device`; a block is moved there and its arrays come back."""
    from l4pack.quant import torch_ops

    def quantize(
        source: NDArray[Any],
        layout: Layout,
        dtype: FloatName,
        scheme: Scheme,
        *,
        amax: float | None = None,
        global_scale: float | None = None,
    ) -> Quantized:
        del dtype  # the array tells
        tensor = torch_ops.from_array(np.ascontiguousarray(source)).to(device)
        weight = tensor.T if layout is Layout.IN_OUT else tensor
        return torch_ops.quantize(weight, scheme, amax=amax, global_scale=global_scale).to_numpy()

    return quantize
