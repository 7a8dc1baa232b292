"""Second moments of gradients: one matrix a layer, in files that any process reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l4pack.errors import L4packError
from l4pack.gradient.layer import BackwardPass
from l4pack.gradient.routers import margin_weights
from l4pack.gradient.visitor import ANSWERS, GradientVisitor
from l4pack.work.files import write_atomic
from l4pack.work.seal import Span

_ROWS = 1024  # written at once


@dataclass(frozen=True)
class GradientMoments:
    """A folder of G, the sum of g g^T over tokens, of every layer: g [hidden] is the gradient of the end loss with
    respect to what the layer's MLPs add to the hidden states."""

    folder: Path
    hidden_size: int

    def of(self, layer: int) -> Tensor:
        """G of a layer, float32 [hidden, hidden]. Raises L4packError for a file that is not all there."""
        path = self.folder / self._file(layer)
        numbers = np.fromfile(path, np.float32) if path.is_file() else np.empty(0, np.float32)
        if numbers.size != self.hidden_size**2:
            raise L4packError(f"{path} is not whole", hint="add --restart to begin again")
        return torch.from_numpy(numbers).view(self.hidden_size, self.hidden_size)

    def write(self, layer: int, moments: Tensor) -> None:
        """Put a layer's there, float32 [hidden, hidden], whole or not at all."""
        rows = moments.cpu().numpy()
        parts = (rows[first : first + _ROWS].tobytes() for first in range(0, len(rows), _ROWS))
        write_atomic(self.folder / self._file(layer), parts)

    def span(self, layer: int) -> Span:
        """Where a layer's lie."""
        return Span(self._file(layer), 0, self.hidden_size**2 * torch.float32.itemsize)

    @staticmethod
    def _file(layer: int) -> str:
        return f"moments-{layer}.float32"


class MomentsKeeper(GradientVisitor):
    """Keeps the second moments of what arrives at each layer's outputs, what routers decide counted in."""

    def __init__(self, moments: GradientMoments, seed: int) -> None:
        self._moments, self._seed = moments, seed

    def spans(self, layer: int) -> list[Span]:
        """See `GradientVisitor`."""
        return [self._moments.span(layer)]

    def arrived(self, layer: int, passes: Mapping[str, BackwardPass]) -> None:
        """Sum them up."""
        self._moments.write(layer, passes[ANSWERS].moments())

    def at_middle(self, layer: int, passes: Mapping[str, BackwardPass]) -> None:
        """Add the layer's own decisions."""
        one = passes[ANSWERS]
        weights = None if one.routing is None else margin_weights(one.routing, self._seed + 1 + layer)
        if weights is not None:
            one.router_backward(weights)
