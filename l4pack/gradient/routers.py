"""What the gradient of the answers does not see: an error that sends a token to another expert.

Up to the point where a router decides otherwise, the loss at the model's end knows nothing of the other expert; behind it
another one has answered. So each layer's decision counts as an outcome of its own beside the answers: of the chosen expert
or the next one, by the logistic distribution of the margin between them, whose width is a share of the layer's mean margin.
Tokens that are nearly undecided count most. The gradient of such an outcome's surprise has zero mean over outcomes, as that
of the answers has, and so second moments of the sum are the sum of second moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l4pack.stream.layer import Routing

STRENGTH = 0.3  # of the routers' outcomes beside the answers'; chosen by KL on a small trained model
WIDTH = 0.2  # of the distribution, in mean margins; the same


def margins(logits: Tensor, chosen: int) -> Tensor:
    """By how much the last of the `chosen` experts is ahead of the next: [rows] of logits [rows, experts]."""
    ordered = logits.topk(chosen + 1, dim=1).values
    return ordered[:, chosen - 1] - ordered[:, chosen]


def decided_by(routing: Routing) -> Tensor | None:
    """The margins of all rows; None where all experts are chosen."""
    chosen = routing.experts.shape[1]
    return None if chosen >= routing.logits.shape[1] else margins(routing.logits, chosen)


def margin_weights(routing: Routing, seed: int) -> Tensor | None:
    """What the gradient of each row's margin is multiplied with, float32 [rows]; None where there is nothing to decide.

    The sign, drawn with `seed` for each row, stands for the outcome: both have the same second moment about zero.
    """
    found = decided_by(routing)
    if found is None:
        return None
    found = found.double()
    width = WIDTH * found.mean().clamp(min=1e-30)
    ahead = torch.sigmoid(found / width)
    sign = torch.randint(0, 2, (len(found),), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (STRENGTH * sign * torch.sqrt(ahead * (1 - ahead)) / width).float()
