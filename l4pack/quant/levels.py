"""How solved levels are held: those that are no steps in the float dtype of their grid, and scales of blocks as each row's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from l4pack.quant.grid import E4M3, Grid
from l4pack.quant.scheme import Scheme


def level_dtype(grid: Grid) -> torch.dtype:
    """The dtype, a byte wide, that holds a grid's levels, see `Grid.unit`."""
    return torch.float8_e4m3fn if grid is E4M3 else torch.int8


def rearranged(levels: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    """Levels put elsewhere `by` an operation, which gets them as int8: few devices index and choose among FP8 numbers."""
    return by(levels.view(torch.int8)).view(levels.dtype)


def spread_scales(scale: Tensor, scheme: Scheme, out_features: int, in_features: int) -> Tensor:
    """[..., out, groups] of scales in the shape they are stored in. A block's are those of its rows; its last columns may be
    fewer, so groups are as wide as divides both."""
    if scheme.block_structure is None:
        return scale
    height, width = scheme.block_structure
    columns = math.gcd(width, in_features)
    rows = scale.repeat_interleave(height, -2)[..., :out_features, :]
    return rows.repeat_interleave(width // columns, -1)[..., : in_features // columns]


def stored_scales(scale: Tensor, scheme: Scheme, in_features: int) -> Tensor:
    """Scales in the shape they are stored in, of `spread_scales`."""
    if scheme.block_structure is None:
        return scale
    height, width = scheme.block_structure
    return scale[..., ::height, :: width // math.gcd(width, in_features)].contiguous()
