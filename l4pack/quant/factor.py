"""The factor of a damped Hessian that GPTQ goes by, and products with its inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.quant.dampening import added_to, fractions, visits
from l4pack.quant.triangular import (
    all_finite,
    divide_by_upper_transposed,
    invert_lower,
    permute,
    reverse,
    times_upper,
    times_upper_transposed,
)


@dataclass(frozen=True)
class Factor:
    """U of the damped Hessian, visiting columns in `order`; `added` [in] is what dampening added to its diagonal."""

    upper: Tensor
    order: Tensor
    added: Tensor
    dampening: float


def factorize(hessian: Tensor, *, act_order: bool, dampening: float) -> Factor | None:
    """The upper factor of the inverse of the damped Hessian [in, in], or None if no dampening of the ladder is enough."""
    diagonal = hessian.diagonal()
    order = visits(diagonal, act_order)
    backwards = order.flip(0)
    damped = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for fraction in fractions(dampening):
        added = added_to(diagonal, fraction)
        permute(hessian, backwards, damped)
        damped.diagonal().add_(added[backwards])
        lower = damped.T  # the same numbers in the order of memory that LAPACK works in without a copy
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if int(failed) == 0:
            invert_lower(lower)
            if all_finite(lower):
                reverse(lower)
                return Factor(lower, order, added, fraction)
    return None


def times_inverse(rows: Tensor, factor: Factor) -> None:
    """rows <- rows H^-1 of the damped Hessian, in the original column order."""
    permuted = rows[:, factor.order]
    times_upper_transposed(permuted, factor.upper)
    times_upper(permuted, factor.upper)
    rows[:, factor.order] = permuted


def pull_of(errors: Tensor, factor: Factor) -> Tensor:
    """R H of the damped Hessian, [out, in] in the original column order, from the errors of `solve_columns`, used up
    here."""
    divide_by_upper_transposed(errors, factor.upper)
    return errors.index_select(1, torch.argsort(factor.order))
