"""How the model's end weighs what the matrices of several MLPs of a layer put out: `carried.Ends` of all at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from l4pack.calibration.batch_units import Batch, Block, Moments
from l4pack.calibration.carried import STEP
from l4pack.model.parts import DOWN, UP
from l4pack.quant.precision import whole_factors


@dataclass(frozen=True)
class Ends:
    """G of a layer, `end` [hidden, hidden] float32, and the MLPs that it is carried back through."""

    end: Tensor
    batch: Batch

    def moments(self, name: str, inner: Tensor | None = None) -> Tensor:
        """H_O of a matrix' outputs, float32 of no particular scale: [units, out, out], or [1, out, out] of the down projection,
        which all share; `inner` is `before_down`, and is needed for gate and up."""
        if name == DOWN:
            return self.end[None].clone()
        assert inner is not None
        found = Moments(len(inner), inner.shape[-1], cross=False, device=inner.device)
        for block in self.batch.inputs():
            found.add(Block(self._slopes(name, block.inputs), None, block.weights, None))
        found.finish(self.batch.weights)
        return found.hessian.mul_(inner)

    @whole_factors()
    def before_down(self) -> Tensor:
        """W_down^T G W_down, [units, inner, inner]."""
        down = self.batch.matrices.down
        return down.mT @ (self.end @ down)

    def _slopes(self, name: str, inputs: Tensor) -> Tensor:
        """By how much what goes into the down projection grows with each output: [units, tokens, inner], of the first units."""
        pair, activation = self.batch.matrices.pair[: len(inputs)], self.batch.activation
        half = pair.shape[1] // 2
        gate = inputs @ pair[:, :half].mT
        if name == UP:
            return activation(gate)
        slope = (activation(gate + STEP) - activation(gate - STEP)) / (2 * STEP)
        return slope.mul_(inputs @ pair[:, half:].mT)
