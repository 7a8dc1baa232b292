"""GPTQ for fewer inputs than columns: through the inputs X [n, in] themselves, never through products of in x in.

H = X^T X + D, with D the dampening. What the columns visited so far left over, their R = W - Q, enters through S = R X^T
[out, n] alone. With K = (I + X D^-1 X^T)^-1 over the columns that come after a block, the rest of which is still free,

    G = D_b + X_b^T K X_b       is the block's Hessian,
    W_b + S (K X_b G^-1)        are its best values, and
    K - K X_b G^-1 X_b^T K      is K for the block before it.

So the blocks are factored from the last to the first in products of n x n; over all columns K gives what the asymmetric
target needs, X H^-1 = K X D^-1. An output row costs 12 n in operations, where going through H costs 5 to 7 in^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.quant import gptq_blocks
from l4pack.quant.dampening import added_to, fractions, visits
from l4pack.quant.grid import Grid
from l4pack.quant.levels import level_dtype, rearranged
from l4pack.quant.triangular import row_parts

BLOCK = 128


@dataclass(frozen=True)
class ThinFactor:
    """A damped Hessian factored by its inputs [n, in], whose columns are in the `order` of their visits.

    `carry` [in, n] turns S into the correction of a block's columns; `uppers` are the blocks' factors, as `solve_block`
    takes them; `inverse` [n, in] is X H^-1 in the columns' own order. `added` [in] is what dampening added to H's diagonal.
    """

    inputs: Tensor
    carry: Tensor
    uppers: list[Tensor]
    inverse: Tensor | None
    order: Tensor
    added: Tensor
    dampening: float


def factorize_thin(
    inputs: Tensor, diagonal: Tensor, *, act_order: bool, dampening: float, invert: bool
) -> ThinFactor | None:
    """Factor X^T X, X = `inputs` [n, in], whose columns are put into the order of visits in place.

    `diagonal` is that of X^T X; `inverse` is found if asked to `invert`. None if no dampening of the ladder is enough.
    """
    order = visits(diagonal, act_order)
    for rows in row_parts(inputs):
        rows.copy_(rows[:, order])
    for fraction in fractions(dampening):
        added = added_to(diagonal, fraction)
        carry = inputs.new_empty(inputs.shape[1], inputs.shape[0])
        uppers: list[Tensor] = []
        kernel = _eliminate(inputs, added[order], carry, uppers)
        if kernel is not None:
            inverse = _inverse(kernel, inputs, order, added) if invert else None
            return ThinFactor(inputs, carry, uppers[::-1], inverse, order, added, fraction)
    return None


def _eliminate(inputs: Tensor, added: Tensor, carry: Tensor, uppers: list[Tensor]) -> Tensor | None:
    """Factor the blocks from the last to the first into `carry` and `uppers`; K over all columns, or None.

    K shrinks by subtraction, from 1 to what dampening leaves of the loudest direction: in float64, or that would be
    lost.
    """
    failures = []
    kernel = torch.eye(len(inputs), dtype=torch.float64, device=inputs.device)
    for first in reversed(range(0, inputs.shape[1], BLOCK)):
        block = slice(first, first + BLOCK)
        own = inputs[:, block].double()
        weighed = own.T @ kernel
        own_hessian = (weighed @ own).add_(torch.diag(added[block].double()))
        lower, failed = torch.linalg.cholesky_ex(own_hessian.flip(0, 1))
        failures.append(failed)
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        half = upper @ weighed
        kernel.addmm_(half.T, half, alpha=-1)
        carry[block] = upper.T @ half
        uppers.append(upper.to(inputs.dtype))
    return None if bool(torch.stack(failures).any()) else kernel


def _inverse(kernel: Tensor, inputs: Tensor, order: Tensor, added: Tensor) -> Tensor:
    """X H^-1 [n, in] from K over all columns."""
    inverse = torch.empty_like(inputs)
    for first in range(0, inputs.shape[1], BLOCK):
        columns = order[first : first + BLOCK]
        inverse[:, columns] = (kernel @ inputs[:, first : first + BLOCK].double() / added[columns]).to(inputs.dtype)
    return inverse


def thin_target(weight: Tensor, difference: Tensor, factor: ThinFactor) -> Tensor:
    """W + W (X' - X)^T X H^-1 [out, in], for `difference` X' - X [n, in]."""
    assert factor.inverse is not None
    return torch.addmm(weight, weight @ difference.T, factor.inverse)


def solve_thin_columns(
    target: Tensor, factor: ThinFactor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ's blocked loop over `target` [out, in], `scale` and `zero_point` [out, groups]: levels [out, in], S
    [out, n] of all columns, and each row's loss under the damped Hessian, float64 [out]."""
    left = target.new_zeros(len(target), len(factor.inputs))
    remaining = target.index_select(1, factor.order)
    levels = torch.empty(target.shape, dtype=level_dtype(grid), device=target.device)
    loss = torch.zeros(len(target), dtype=torch.float64, device=target.device)
    group = factor.order // (target.shape[1] // scale.shape[1])
    for number, upper in enumerate(factor.uppers):
        visited = slice(number * BLOCK, (number + 1) * BLOCK)
        wanted = torch.addmm(remaining[:, visited], left, factor.carry[visited].T)
        solved = gptq_blocks.solve_block(wanted, upper, scale, zero_point, group[visited], grid)
        levels[:, visited] = solved.levels
        loss += solved.errors.square_().sum(1, dtype=torch.float64)
        left.addmm_(remaining[:, visited] - solved.values, factor.inputs[:, visited].T)
    return rearranged(levels, lambda kept: kept.index_select(1, torch.argsort(factor.order))), left, loss


def thin_pull(left: Tensor, residual: Tensor, factor: ThinFactor) -> Tensor:
    """R H of the damped Hessian [out, in] in the columns' own order, from S and R = `residual` [out, in]."""
    pull = (left @ factor.inputs).index_select(1, torch.argsort(factor.order))
    return pull.addcmul_(residual, factor.added)


def thin_loss(residual: Tensor, factor: ThinFactor) -> Tensor:
    """The diagonal of R X^T X R^T, float64 [out]."""
    return (residual.index_select(1, factor.order) @ factor.inputs.T).square_().sum(1, dtype=torch.float64)
