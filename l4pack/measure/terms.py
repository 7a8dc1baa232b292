"""What gradients say a change does, summed on the way: the two terms of `measure.slopes`, from a unit's exact difference.

Of every token the change d of a unit's outputs is multiplied with both gradients there, g of the answers and r of the
routers' margins; nothing else is kept of it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from l4pack.gradient.keep import LayerGradients, Place
from l4pack.work.state import Found


class Terms(Found):
    """Sums over clusters of tokens: of (g . d)^2 / 2, and of |r . d|."""

    smooth: list[float]
    rerouting: list[float]


@dataclass(frozen=True)
class Slopes:
    """Gradients of every layer on the measured tokens, and the cluster of every row, int64 [rows]."""

    gradients: LayerGradients
    cluster: Tensor


class LayerTerms:
    """The terms of single changes made in one layer, by their names."""

    def __init__(self, slopes: Slopes, layer: int) -> None:
        """Opens the layer's files."""
        self._slopes, self._stack = slopes, ExitStack()
        self._rows = {place: self._stack.enter_context(slopes.gradients.of(layer, place)) for place in Place}
        self._products: dict[str, Tensor] = {}

    def add(self, key: str, place: Place, rows: Tensor | slice, difference: Tensor) -> None:
        """Some rows of a change: what its unit gives more there, [rows, hidden]; several experts of a token add up."""
        gradients = self._rows[place]
        made = self._products.get(key)
        if made is None:
            made = self._products[key] = torch.zeros(len(gradients), len(self._slopes.cluster), dtype=torch.float64)
        for number, gradient in enumerate(gradients):
            slope = gradient.data[rows].to(difference.device, torch.float32)
            made[number, rows] += (slope * difference).sum(-1).cpu()
            gradient.release()

    def found(self) -> dict[str, Terms]:
        """Of every change."""
        return {key: self._terms(products) for key, products in self._products.items()}

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def _terms(self, products: Tensor) -> Terms:
        answers, *routers = products
        rerouting = sum((one.abs() for one in routers), torch.zeros_like(answers))
        return Terms(smooth=self._sums(answers.square() / 2), rerouting=self._sums(rerouting))

    def _sums(self, values: Tensor) -> list[float]:
        cluster = self._slopes.cluster
        sums = torch.zeros(int(cluster.max()) + 1, dtype=torch.float64)
        return sums.index_add_(0, cluster, values).tolist()


def row_clusters(scored: Tensor, cluster: Tensor, rows: int) -> Tensor:
    """The cluster of every row, int64 [rows]: of the first `scored` row from there on, whose cluster is known."""
    following = torch.searchsorted(scored, torch.arange(rows)).clamp(max=len(scored) - 1)
    return cluster[following]
