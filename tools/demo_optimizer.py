"""Muon for the matrices of the layers, AdamW for the rest: few steps on a CPU have to go far."""

import torch
from demo_model import Params
from torch import Tensor

MUON_RATE, MOMENTUM, DECAY = 0.02, 0.95, 0.05
ADAM_RATES = {"embed_tokens": 0.006, "lm_head": 0.004, "router": 0.002, "norm": 0.004}
QUINTIC = (3.4445, -4.7750, 2.0315)
ORTHOGONALIZING_STEPS = 5


class Optimizer:
    """One step over all parameters; `scale` multiplies every learning rate."""

    def __init__(self, params: Params) -> None:
        self.matrices = {name: value for name, value in params.items() if "layers" in name and _is_matrix(name)}
        self.momenta = {name: torch.zeros_like(value) for name, value in self.matrices.items()}
        rest = [name for name in params if name not in self.matrices]
        groups = [{"params": [params[name]], "lr": _adam_rate(name), "rate": _adam_rate(name)} for name in rest]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update the parameters from their gradients and clear these."""
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * scale
        self.adam.step()
        self.adam.zero_grad()
        for name, weight in self.matrices.items():
            self._muon(name, weight, MUON_RATE * scale)

    def _muon(self, name: str, weight: Tensor, rate: float) -> None:
        gradient, momentum = weight.grad, self.momenta[name]
        if gradient is None:
            return
        momentum.lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(momentum, MOMENTUM)
        halves = direction.chunk(2, dim=-1) if name.endswith("gate_up_proj") else (direction,)
        update = torch.cat([orthogonal(half) for half in halves], dim=-1)
        weight.mul_(1 - rate * DECAY).sub_(update, alpha=rate)
        weight.grad = None


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix of [..., rows, columns], roughly, by a quintic Newton-Schulz iteration in BF16.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    current = (matrix if wide else matrix.mT).bfloat16()
    current = current / (current.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    first, second, third = QUINTIC
    for _ in range(ORTHOGONALIZING_STEPS):
        gram = current @ current.mT
        current = first * current + (second * gram + third * gram @ gram) @ current
    return (current if wide else current.mT).float()


def _is_matrix(name: str) -> bool:
    return "proj" in name


def _adam_rate(name: str) -> float:
    return next(rate for part, rate in ADAM_RATES.items() if part in name)
