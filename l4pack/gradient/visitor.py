"""What is kept of the gradients that a walk back meets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from l4pack.stream.sides import Stream
from l4pack.work.seal import Span

if TYPE_CHECKING:
    from l4pack.gradient.layer import BackwardPass

ANSWERS = "answers"  # the gradient of cross-entropy on the model's own answers


class GradientVisitor:
    """Called by a walk back: `begin` once, the others in this order in every layer, the last layer first."""

    streams: tuple[str, ...] = (ANSWERS,)
    """Names of the gradients that are taken back."""

    def spans(self, layer: int) -> list[Span]:
        """Where lies what is kept of a layer, of which nothing changes once the layer is passed."""
        raise NotImplementedError

    def begin(self, streams: Mapping[str, Stream]) -> None:
        """The gradient of the answers is there, `current` of its stream; that of other streams must be put there."""

    def arrived(self, layer: int, passes: Mapping[str, BackwardPass]) -> None:
        """Gradients at a layer's outputs are there."""

    def at_middle(self, layer: int, passes: Mapping[str, BackwardPass]) -> None:
        """Gradients have come to what lies between attention and MLPs."""
