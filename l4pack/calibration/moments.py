"""Second moments of a matrix' inputs: the Hessian of its squared output error, and how original inputs differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 1024  # the Hessian is symmetric: only tiles of this width on and above its diagonal are computed
THIN = 0.4  # tokens a column, up to which solving goes through the tokens: about where it is as much work


@dataclass(frozen=True)
class Gathered:
    """Means over tokens: of x x^T, and where asked for of (x' - x) x^T, float32 [in, in] each.

    Where tokens are few, there are instead of the latter `inputs` x and `difference` x' - x themselves, float32
    [tokens, in], scaled so that sums of their products are the means.
    """

    hessian: Tensor
    cross: Tensor | None = None
    inputs: Tensor | None = None
    difference: Tensor | None = None


class Moments:
    """Weighted sums over tokens of x x^T, and with `cross` of (x' - x) x^T: float32 [in, in], divided at the end.

    Tokens are kept until they are too many to be `THIN`, and summed from then on; where as many are `expected`, at once, as
    where none are to be kept, not `thin`.

    Sums are kept in float32: against float64, no entry is off by more than 2.2e-6 of the mean diagonal after 524,288
    tokens in 256 blocks (measured; dampening adds 10,000 times as much).
    """

    def __init__(self, width: int, *, cross: bool, device: torch.device, expected: int = 0, thin: bool = True) -> None:
        self._width, self._device, self._cross = width, device, cross
        most = int(THIN * width) if thin else 0
        self._kept: list[Tensor] | None = self._zeros(2 if cross else 1, most if expected <= most else 0)
        self._sums: list[Tensor] = []
        self.tokens, self.weight = 0, 0.0

    def add(self, inputs: Tensor, original: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add tokens [tokens, in] with each one's weight [tokens]; `original` are the unquantized model's inputs."""
        self.weight += float(len(inputs) if weight is None else weight.sum())
        parts = [inputs] if not self._cross or original is None else [inputs, original - inputs]
        if weight is not None:
            parts = [part * weight.sqrt()[:, None] for part in parts]
        start, self.tokens = self.tokens, self.tokens + len(inputs)
        if self._kept is not None and self.tokens <= len(self._kept[0]):
            for kept, part in zip(self._kept, parts, strict=False):
                kept[start : self.tokens] = part
            return
        self._sum_kept(start)
        self._sum(*parts)

    def finish(self) -> Gathered:
        """What was found; the sums are used up."""
        scale = 1 / max(self.weight, 1e-30)
        if self._kept is not None:
            kept = [part[: self.tokens].mul_(scale**0.5) for part in self._kept]
            self._sums = self._zeros(1, self._width)
            self._sum(kept[0])
            return Gathered(self._hessian(1), None, *kept)
        cross = self._sums[1].mul_(scale) if self._cross else None
        return Gathered(self._hessian(scale), cross)

    def _zeros(self, count: int, rows: int) -> list[Tensor]:
        return [torch.zeros(rows, self._width, device=self._device) for _ in range(count)]

    def _sum_kept(self, tokens: int) -> None:
        """There are too many to be kept: sum those that were."""
        if self._kept is not None:
            kept, self._kept = [part[:tokens] for part in self._kept], None
            self._sums = self._zeros(len(kept), self._width)
            self._sum(*kept)

    def _sum(self, inputs: Tensor, difference: Tensor | None = None) -> None:
        hessian = self._sums[0]
        for first in range(0, self._width, COLUMNS):
            last = min(first + COLUMNS, self._width)
            hessian[first:last, first:].addmm_(inputs[:, first:last].T, inputs[:, first:])
        if difference is not None:
            self._sums[1].addmm_(difference.T, inputs)

    def _hessian(self, scale: float) -> Tensor:
        """The whole of the symmetric sum, times `scale`."""
        hessian = self._sums[0]
        for first in range(0, self._width, COLUMNS):
            last = min(first + COLUMNS, self._width)
            hessian[last:, first:last] = hessian[first:last, last:].T
        return hessian.mul_(scale)
