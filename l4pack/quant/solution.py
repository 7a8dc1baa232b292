"""What a matrix was rounded to, and what is known of how well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from l4pack.quant import torch_superblocks


class SolvedBy(StrEnum):
    """How a matrix was rounded."""

    GPTQ = "gptq"
    RTN = "rtn"


class Kept(StrEnum):
    """Which of three solutions a two-sided solve ended with: its own, that of the inputs alone, or the nearest levels."""

    NESTED = "nested"
    GPTQ = "gptq"
    RTN = "rtn"


@dataclass(frozen=True)
class TwoSided:
    """Losses tr(H_O R H_I R^T), both damped, of a solve by both sides: `error` that of what was `kept`, `gptq_error` and
    `rtn_error` of the solve by the inputs alone and of rounding to nearest. `dampening` is H_O's, a fraction of its mean
    diagonal. Losses are NaN where nothing could be solved by both sides, for the `reason` said."""

    kept: Kept
    error: float
    gptq_error: float
    rtn_error: float
    dampening: float
    reason: str = ""


@dataclass(frozen=True)
class Solution:
    """A solved matrix, in the column order of its weights.

    `levels` [out, in] are told in the unit of the scheme's grid: int8 steps, or E4M3 numbers; `scale` [out, groups], that of a unit, in its stored dtype, or
    float32 where a code is stored; `zero_point` int8 [out, groups] or None; `global_scale` what codes are told over;
    `headers` the scales of super-blocks as they are stored, see `Rounded`.
    `error` is the loss trace((W - Q) H (W - Q)^T) with the Hessian undamped and W the asymmetric target if there is one;
    `rtn_error` the same for rounding to nearest (both NaN if the Hessian is not finite). `dampening` is what was used,
    as a fraction of the mean diagonal. `rtn_rows` counts output rows where rounding to nearest was better and was kept.
    `method` is RTN if all rows are, with the `reason`. `two_sided` is there where outputs were weighed too.
    """

    levels: Tensor
    scale: Tensor
    zero_point: Tensor | None
    error: float
    rtn_error: float
    dampening: float
    method: SolvedBy
    reason: str
    rtn_rows: int
    dead_columns: int
    global_scale: float | None = None
    headers: Tensor | None = None
    two_sided: TwoSided | None = None

    def rounded(self, rows: slice = slice(None)) -> Rounded:
        """Some output rows' levels and scales."""
        zero_point = torch.zeros_like(self.scale[rows], dtype=torch.float32)
        if self.zero_point is not None:
            zero_point = self.zero_point[rows].float()
        headers = None if self.headers is None else self.headers[rows]
        return Rounded(self.levels[rows], self.scale[rows], zero_point, headers)


@dataclass(frozen=True)
class Rounded:
    """Levels [out, in], told in the unit of a grid, with the scales of that and zero points [out, groups] (float32) that give them
    meaning; of super-blocks also their scales as they are stored, `headers` uint8 [out, in / 16]: from what levels mean, a
    group's minimum is taken off."""

    levels: Tensor
    scale: Tensor
    zero_point: Tensor
    headers: Tensor | None = None

    def values(self) -> Tensor:
        """float32 [out, in]."""
        values = self.levels.float().reshape(*self.scale.shape, -1)
        values.sub_(self.zero_point[..., None]).mul_(self.scale.float()[..., None])
        if self.headers is not None:
            values.sub_(torch_superblocks.values_of(self.headers)[1][..., None])
        return values.reshape(self.levels.shape)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Rounded:
        """The same with every tensor changed."""
        headers = None if self.headers is None else change(self.headers)
        return Rounded(change(self.levels), change(self.scale), change(self.zero_point), headers)

    def raised(self, target: Tensor) -> Tensor:
        """What levels alone must come near to for values to come near to `target` [out, in]: minima are added to it."""
        if self.headers is None:
            return target
        minimum = torch_superblocks.values_of(self.headers)[1]
        return (target.view(*minimum.shape, -1) + minimum[..., None]).view(target.shape)
