"""Gradients of every layer on disk: what a change of a unit's outputs does to the answers, and to which experts tokens go to.

Two gradients are taken back. One is that of cross-entropy on the model's own answers. The other is that of

    sum over layers with a router and tokens of +-1 * margin / mean margin of the layer,

where the margin is by how much the router's logit of the last expert chosen exceeds that of the first one that is not. Its
product with a change of the hidden states is how near the change brings tokens to another expert; signs are drawn, so that
what it does in one layer is not cancelled by what it does in the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from l4pack.gradient.inputs import LayerRows
from l4pack.gradient.layer import BackwardPass
from l4pack.gradient.routers import decided_by
from l4pack.gradient.visitor import ANSWERS, GradientVisitor
from l4pack.model.config import Llama4Config
from l4pack.stream.hidden import Packed, Rows
from l4pack.stream.sides import Stream, copy_rows
from l4pack.work.seal import Span

ROUTERS = "routers"
KEPT = torch.bfloat16


class Place(StrEnum):
    """Where in a layer a gradient is taken: where its MLPs add to the hidden states, or where attention does."""

    OUTPUTS = "outputs"
    MIDDLE = "middle"


class LayerGradients:
    """Files of both gradients [rows, hidden] of every layer at both places; without routers of the one there is."""

    def __init__(self, folder: Path, config: Llama4Config, rows: int) -> None:
        text = config.text
        self.streams = streams_of(config)
        self._files = {
            (name, place): LayerRows(folder, f"{name}-{place.value}", rows, text.hidden_size, KEPT)
            for name in self.streams
            for place in Place
        }

    def spans(self, layer: int) -> list[Span]:
        """Where a layer's lie."""
        return [files.span(layer) for files in self._files.values()]

    def keep(self, layer: int, place: Place, found: Mapping[str, Rows]) -> None:
        """Put a layer's on disk, by stream. Raises BudgetError when there is no room."""
        for name, rows in found.items():
            self._files[name, place].keep(layer, rows)

    @contextmanager
    def of(self, layer: int, place: Place) -> Iterator[list[Rows]]:
        """A layer's, one of each stream, while the block lasts."""
        with ExitStack() as stack:
            yield [stack.enter_context(self._files[name, place].of(layer)) for name in self.streams]


def streams_of(config: Llama4Config) -> tuple[str, ...]:
    """The gradients that a model has."""
    return (ANSWERS, ROUTERS) if config.text.moe_layers else (ANSWERS,)


class GradientKeeper(GradientVisitor):
    """Keeps both gradients of tokens that are scored, on the way down."""

    def __init__(self, gradients: LayerGradients, packed: Packed, seed: int) -> None:
        self._gradients, self._packed, self._seed = gradients, packed, seed
        self.streams = gradients.streams

    def spans(self, layer: int) -> list[Span]:
        """See `GradientVisitor`."""
        return self._gradients.spans(layer)

    def begin(self, streams: Mapping[str, Stream]) -> None:
        """Answers that are not scored don't count, and no margin lies above the last layer."""
        unscored = torch.ones(self._packed.rows, dtype=torch.bool)
        unscored[self._packed.scored_rows()] = False
        answers = streams[ANSWERS].current
        for row in unscored.nonzero()[:, 0].tolist():
            answers.data[row] = 0
        for name in self.streams[1:]:
            copy_rows(streams[name].current, None)

    def arrived(self, layer: int, passes: Mapping[str, BackwardPass]) -> None:
        """Keep them."""
        self._gradients.keep(layer, Place.OUTPUTS, {name: one.arriving for name, one in passes.items()})

    def at_middle(self, layer: int, passes: Mapping[str, BackwardPass]) -> None:
        """Add the layer's own margins, and keep them."""
        weights = None if passes[ANSWERS].routing is None else self._weights(layer, passes[ROUTERS])
        if weights is not None:
            passes[ROUTERS].router_backward(weights)
        self._gradients.keep(layer, Place.MIDDLE, {name: one.found for name, one in passes.items()})

    def _weights(self, layer: int, one: BackwardPass) -> Tensor | None:
        """What each row's margin is multiplied with; None where all experts are chosen."""
        assert one.routing is not None
        found = decided_by(one.routing)
        if found is None:
            return None
        mean = found.mean()
        return self.signs(layer) / mean.clamp(min=torch.finfo(mean.dtype).tiny)

    def signs(self, layer: int) -> Tensor:
        """+-1 for every token, float32 [rows]; 0 where no token that is scored comes after."""
        draws = torch.rand(self._packed.rows, generator=torch.Generator().manual_seed(self._seed + 1 + layer))
        return torch.where(draws < 0.5, -1.0, 1.0) * _matters(self._packed)


def _matters(packed: Packed) -> Tensor:
    """1 for rows that a scored answer depends on, else 0, float32 [rows]."""
    found = torch.zeros(packed.rows)
    for start, sequence in zip(packed.starts, packed.sequences, strict=False):
        scored = sequence.scored()
        if len(scored):
            found[start : start + int(scored[-1])] = 1
    return found
