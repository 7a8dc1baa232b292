"""Several MLPs of equal shape: their matrices stacked, their tokens side by side, and second moments of those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.calibration.moments import COLUMNS
from l4pack.model.parts import DOWN, GATE, UP

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """Some tokens of the units that have any left: inputs [units, rows, in], the original model's where there are any,
    their weights [units, rows], and whose original is kept [units, rows, 1], see `rows.UnitRows`."""

    inputs: Tensor
    original: Tensor | None
    weights: Tensor
    kept: Tensor | None


@dataclass(frozen=True)
class Stacked:
    """Gate over up [units, 2 inner, hidden] and down [units, hidden, inner] of several MLPs, float32."""

    pair: Tensor
    down: Tensor

    @classmethod
    def of(cls, matrices: Sequence[Mapping[str, Tensor]]) -> Stacked:
        """Copies of the MLPs' matrices [out, in], by their names."""
        pairs = torch.stack([one[name] for one in matrices for name in (GATE, UP)])
        return cls(pairs.view(len(matrices), -1, pairs.shape[-1]), torch.stack([one[DOWN] for one in matrices]))

    def weights(self) -> list[dict[str, Tensor]]:
        """Views of each MLP's matrices."""
        return [
            {GATE: pair[: len(pair) // 2], UP: pair[len(pair) // 2 :], DOWN: down}
            for pair, down in zip(self.pair, self.down, strict=True)
        ]


@dataclass(frozen=True)
class Batch:
    """MLPs to solve together: their matrices, how often `inputs` gives their tokens anew, what all weigh [units]. With `end`
    they are solved by both sides, see `mlp.solve_mlp`."""

    matrices: Stacked
    inputs: Callable[[], Iterable[Block]]
    weights: Tensor
    activation: Activation
    model_dtype: torch.dtype
    end: Tensor | None = None

    def inner(self, pair: Tensor, inputs: Tensor) -> Tensor:
        """What gate over up [units, 2 inner, hidden] make of the first units' inputs: [units, tokens, inner]."""
        gate, up = (inputs @ pair[: len(inputs)].mT).chunk(2, -1)
        return self.activation(gate) * up


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
