"""How the model's end weighs what the matrices of an MLP put out, from how it weighs what its layer adds to hidden states.

All MLPs of a layer add to the same hidden states, so one matrix G [hidden, hidden], second moments of the end loss' gradients
there, serves them all, however few tokens an expert has. Of the down projection it is H_O itself. To the other two it is
carried back through the MLP, its tokens and slopes taken as independent: with slopes a of what goes into the down projection
by a matrix' outputs, silu(gate) for up and silu'(gate) up for gate,

    H_O = (W_down^T G W_down) o E[a a^T],

over the tokens that the matrix is solved for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from l4pack.calibration.moments import Moments
from l4pack.calibration.rows import Block
from l4pack.model.parts import DOWN, GATE, UP
from l4pack.quant.precision import whole_factors

STEP = 2**-7  # of the difference that an activation's slope is taken from: right to four digits, for any activation


@dataclass(frozen=True)
class Ends:
    """G of a layer, `end` [hidden, hidden] float32, and the original MLP that it is carried back through: its matrices
    [out, in] by name and its activation; `inputs` gives the unit's tokens anew each time."""

    end: Tensor
    weights: Mapping[str, Tensor]
    activation: Callable[[Tensor], Tensor]
    inputs: Callable[[], Iterable[Block]]

    def moments(self, name: str, inner: Tensor | None = None) -> Tensor:
        """H_O of a matrix' outputs, [out, out] float32 of no particular scale; `inner` is `before_down`, and is needed for
        gate and up."""
        if name == DOWN:
            return self.end.clone()
        assert inner is not None
        found = Moments(len(inner), cross=False, device=inner.device, thin=False)
        for block in self.inputs():
            found.add(self._slopes(name, block.inputs), weight=block.weights)
        return found.finish().hessian.mul_(inner)

    @whole_factors()
    def before_down(self) -> Tensor:
        """W_down^T G W_down, [inner, inner]."""
        down = self.weights[DOWN]
        return down.T @ (self.end @ down)

    def _slopes(self, name: str, inputs: Tensor) -> Tensor:
        """By how much what goes into the down projection grows with each output: [tokens, inner]."""
        gate = inputs @ self.weights[GATE].T
        if name == UP:
            return self.activation(gate)
        slope = (self.activation(gate + STEP) - self.activation(gate - STEP)) / (2 * STEP)
        return slope * (inputs @ self.weights[UP].T)
