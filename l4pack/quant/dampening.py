"""What is added to a Hessian's diagonal so that it can be factored, and the order in which columns are visited."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPENING_LADDER = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Fractions of the mean diagonal tried in turn, from the one asked for, until H can be factored."""


def fractions(dampening: float) -> tuple[float, ...]:
    """What is tried: `dampening`, then the steps of the ladder above it."""
    return (dampening, *(step for step in DAMPENING_LADDER if step > dampening))


def added_to(diagonal: Tensor, fraction: float) -> Tensor:
    """What `fraction` of the mean adds to a diagonal [in].

    A dead column (zero diagonal: its input was never seen) gets the mean diagonal, which rounds it to nearest and
    touches no other column.
    """
    alive = diagonal > 0
    mean = diagonal[alive].mean() if bool(alive.any()) else diagonal.new_tensor(1.0)
    return torch.where(alive, fraction * mean, mean - diagonal)


def visits(diagonal: Tensor, act_order: bool) -> Tensor:
    """Columns in the order of their visits [..., in]: their own, or the largest diagonal first."""
    if act_order:
        return torch.argsort(diagonal, descending=True, stable=True)
    return torch.arange(diagonal.shape[-1], device=diagonal.device).expand(diagonal.shape)
