"""What goes into each layer, kept on the way up for the way down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from l4pack.stream.hidden import Buffer, Rows
from l4pack.stream.sides import Stream, copy_rows
from l4pack.stream.visitor import Visitor
from l4pack.work.seal import Seal, Span, seal, unbroken


@dataclass(frozen=True)
class LayerRows:
    """A file [rows, width] of each layer."""

    folder: Path
    name: str
    rows: int
    width: int
    dtype: torch.dtype

    def span(self, layer: int) -> Span:
        """Where a layer's lie."""
        return Span(f"{self.name}-{layer}.hidden", 0, self.rows * self.width * self.dtype.itemsize)

    def keep(self, layer: int, states: Rows) -> None:
        """Put a layer's on disk. Raises BudgetError when there is no room."""
        with self._open(layer, kept=False) as buffer:
            copy_rows(Rows(buffer), states)
            buffer.flush()

    @contextmanager
    def of(self, layer: int) -> Iterator[Rows]:
        """A layer's, while the block lasts."""
        with self._open(layer, kept=True) as buffer:
            yield Rows(buffer)

    def forget(self, layer: int) -> None:
        """Remove a layer's."""
        (self.folder / self.span(layer).file).unlink(missing_ok=True)

    @contextmanager
    def _open(self, layer: int, *, kept: bool) -> Iterator[Buffer]:
        buffer = Buffer(self.folder / self.span(layer).file, self.rows, self.width, self.dtype, kept=kept)
        try:
            yield buffer
        finally:
            buffer.close()


class InputKeeper(Visitor):
    """Keeps the inputs of every layer of a walk's one lane, and the last layer's outputs by the next number."""

    def __init__(self, inputs: LayerRows, layers: int) -> None:
        self._inputs, self._layers = inputs, layers

    def resume(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all that was kept is as it was."""
        seals = kept_seals(records)
        spans = [self._inputs.span(layer) for layer in range(len(seals))]
        return unbroken(self._inputs.folder, spans, seals)

    def leave(self, layer: int, streams: Mapping[str, Stream]) -> dict[str, Any]:
        """Keep what has entered the layer."""
        (stream,) = streams.values()
        kept = {layer: stream.current}
        if layer + 1 == self._layers:
            kept[layer + 1] = stream.following
        for number, states in kept.items():
            self._inputs.keep(number, states)
        seals = seal(self._inputs.folder, [self._inputs.span(number) for number in kept])
        return {"kept": [one.model_dump() for one in seals]}


def kept_seals(records: Sequence[Mapping[str, Any]]) -> list[Seal]:
    """Seals of what was kept in the layers done, by layer."""
    return [Seal(**one) for record in records for one in record["kept"]]
