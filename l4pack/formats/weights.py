"""The weights that a quantized matrix's tensors stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from l4pack.formats.format import Format
from l4pack.quant.dequantize import Dequantizer
from l4pack.quant.floats import Float32Array
from l4pack.quant.scheme import Scheme


def dequantizer(
    arrays: Mapping[str, NDArray[Any]],
    form: Format,
    scheme: Scheme,
    out_features: int,
    in_features: int,
    module: str,
) -> Dequantizer:
    """What gives rows of a module's weights, from its tensors by suffix. Raises L4packError on a wrong shape."""
    quantized = form.decode(arrays, scheme, out_features, in_features, module)
    return Dequantizer(quantized, scheme, out_features, in_features)


def weights_of(
    arrays: Mapping[str, NDArray[Any]],
    form: Format,
    scheme: Scheme,
    out_features: int,
    in_features: int,
    module: str,
) -> Float32Array:
    """float32 [out_features, in_features] of a module's tensors by suffix. Raises L4packError on a wrong shape."""
    return dequantizer(arrays, form, scheme, out_features, in_features, module).whole()
