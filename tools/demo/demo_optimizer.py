"""Muon for the matrices of the layers, AdamW for the rest: few steps on a CPU have to go far."""

import torch
import torch.distributed as distributed
from demo_model import Params
from torch import Tensor

MUON_RATE, MOMENTUM, DECAY = 0.02, 0.95, 0.05
ADAM_RATES = {"embed_tokens": 0.006, "lm_head": 0.004, "router": 0.002, "norm": 0.004}
QUINTIC = (3.4445, -4.7750, 2.0315)
ORTHOGONALIZING_STEPS = 5


class Optimizer:
    """One step over all parameters, the same in every rank; `scale` multiplies every learning rate."""

    def __init__(self, params: Params, compute: torch.dtype) -> None:
        """`compute` is the dtype that directions are orthogonalized in."""
        self.params, self.compute = params, compute
        self.matrices = {name: value for name, value in params.items() if "layers" in name and _is_matrix(name)}
        self.momenta = {name: torch.zeros_like(value) for name, value in self.matrices.items()}
        rest = [name for name in params if name not in self.matrices]
        groups = [{"params": [params[name]], "lr": _adam_rate(name), "rate": _adam_rate(name)} for name in rest]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update the parameters from the mean of the ranks' gradients, and clear these."""
        gradients = {name: value.grad for name, value in self.params.items() if value.grad is not None}
        summed(gradients)
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * scale
        self.adam.step()
        updates = {name: self._update(name, gradients[name], order) for order, name in enumerate(self.matrices)}
        summed(updates)
        for name, weight in self.matrices.items():
            weight.mul_(1 - MUON_RATE * scale * DECAY).sub_(updates[name], alpha=MUON_RATE * scale)
        for value in self.params.values():
            value.grad = None

    def _update(self, name: str, gradient: Tensor, order: int) -> Tensor:
        """The orthogonalized direction; zero where another rank computes it. Gate and up are separate matrices."""
        momentum = self.momenta[name].lerp_(gradient, 1 - MOMENTUM)
        if order % distributed.get_world_size() != distributed.get_rank():
            return torch.zeros_like(gradient)
        direction = gradient.lerp(momentum, MOMENTUM)
        halves = direction.chunk(2, dim=-1) if name.endswith("gate_up_proj") else (direction,)
        return torch.cat([orthogonal(half, self.compute) for half in halves], dim=-1)


def summed(tensors: Params) -> None:
    """Replace every tensor by its sum over the ranks."""
    flat = torch.cat([value.flatten() for value in tensors.values()])
    distributed.all_reduce(flat)
    for value, part in zip(tensors.values(), flat.split([value.numel() for value in tensors.values()]), strict=True):
        value.copy_(part.view_as(value))


def orthogonal(matrix: Tensor, compute: torch.dtype) -> Tensor:
    """The nearest orthogonal matrix of [..., rows, columns], roughly, by a quintic Newton-Schulz iteration.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    current = (matrix if wide else matrix.mT).to(compute)
    current = current / (current.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(compute)
    first, second, third = QUINTIC
    for _ in range(ORTHOGONALIZING_STEPS):
        gram = current @ current.mT
        current = first * current + (second * gram + third * gram @ gram) @ current
    return (current if wide else current.mT).float()


def _is_matrix(name: str) -> bool:
    return "proj" in name


def _adam_rate(name: str) -> float:
    return next(rate for part, rate in ADAM_RATES.items() if part in name)
