"""Second moments of the inputs of several units at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.calibration.moments import COLUMNS


@dataclass(frozen=True)
class Block:
    """Some tokens of the units that have any left: inputs [units, rows, in], the original model's where there are any,
    their weights [units, rows], and whose original is kept [units, rows, 1], see `rows.UnitRows`."""

    inputs: Tensor
    original: Tensor | None
    weights: Tensor
    kept: Tensor | None


class Moments:
    """See `moments.Moments`: those of several units' inputs, float32 [units, in, in] each."""

    def __init__(self, units: int, width: int, *, cross: bool, device: torch.device) -> None:
        self.hessian = torch.zeros(units, width, width, device=device)
        self.cross = torch.zeros(units, width, width, device=device) if cross else None

    def add(self, block: Block) -> None:
        """Add tokens of the first units."""
        count, width = len(block.inputs), self.hessian.shape[-1]
        root = block.weights.sqrt()[..., None]
        inputs = block.inputs * root
        for first in range(0, width, COLUMNS):
            last = min(first + COLUMNS, width)
            self.hessian[:count, first:last, first:].baddbmm_(inputs[..., first:last].mT, inputs[..., first:])
        if self.cross is not None and block.original is not None:
            self.cross[:count].baddbmm_(((block.original - block.inputs) * root).mT, inputs)

    def finish(self, weights: Tensor) -> None:
        """Divide by the weights [units] of all tokens, and fill in the other half of what is symmetric."""
        scale = 1 / weights.clamp(min=1e-30)[:, None, None]
        width = self.hessian.shape[-1]
        for first in range(0, width, COLUMNS):
            last = min(first + COLUMNS, width)
            self.hessian[:, last:, first:last] = self.hessian[:, first:last, last:].mT
        self.hessian.mul_(scale)
        if self.cross is not None:
            self.cross.mul_(scale)
