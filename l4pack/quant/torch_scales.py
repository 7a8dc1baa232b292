"""`scales` on torch tensors: the same codes and float32 values on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from l4pack.quant.grid import E2M1, E4M3, ScaleDtype
from l4pack.quant.scales import (
    EMPTY_CODE,
    GLOBAL_RANGE,
    HIGHEST_CODE,
    LARGEST_OVER,
    LOWEST_CODE,
    NEIGHBOURS,
    ROUNDS_UP,
    SMALLEST_OVER,
)

Over = Tensor | float
"""A global scale, or one for each row: [rows, 1]."""


def global_scale(amax: Tensor) -> Tensor:
    """See `scales.global_scale`, of each of some magnitudes, float32."""
    ratio = (GLOBAL_RANGE / amax).clamp(SMALLEST_OVER, LARGEST_OVER)
    powers = (ratio.view(torch.int32) >> 23 << 23).view(torch.float32)
    return torch.where(amax == 0, 1.0, powers)


def codes_of(amax: Tensor, kind: ScaleDtype, over: Over) -> Tensor:
    """Codes uint8 of the scales for groups of largest magnitude `amax`, float32, in its shape."""
    amax = amax.abs()  # zero may have a sign
    if kind is ScaleDtype.E8M0:
        exponent = (amax.view(torch.int32) + ROUNDS_UP) >> 23
        return (exponent - 2).clamp(0, HIGHEST_CODE[kind]).to(torch.uint8)
    codes = coded(amax / E2M1.highest, kind, over)
    return torch.where(codes == 0, EMPTY_CODE, codes)


def coded(scale: Tensor, kind: ScaleDtype, over: Over) -> Tensor:
    """The codes of float32 scales: of `values_of`, or the nearest E4M3 numbers."""
    if kind is ScaleDtype.E8M0:
        return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return (scale * over).clamp(max=E4M3.highest).to(torch.float8_e4m3fn).view(torch.uint8)


def values_of(codes: Tensor, kind: ScaleDtype, over: Over) -> Tensor:
    """The float32 scales that codes stand for, in their shape."""
    if kind is ScaleDtype.E8M0:
        bits = codes.to(torch.int32)
        return torch.where(bits == 0, 1 << 22, bits << 23).to(torch.int32).view(torch.float32)
    return codes.view(torch.float8_e4m3fn).float() / over


def neighbours(codes: Tensor, kind: ScaleDtype) -> Iterator[Tensor]:
    """What to try instead of `codes`, themselves first."""
    for offset in NEIGHBOURS[kind]:
        tried = codes.to(torch.int16) + offset
        yield tried.clamp(LOWEST_CODE[kind], HIGHEST_CODE[kind]).to(torch.uint8)
