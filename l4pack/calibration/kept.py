"""The hidden states that a calibrated job goes on from, and whether they are still what its journal vouches for.

With each layer that is done the journal keeps seals (see `work.seal`) of the layer's outputs. Where the last layer's are
not as they were, the walk goes on from the last layer whose are, at worst from the embeddings; matrices that are solved
are read back on the way, so it comes to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from l4pack.calibration.written import layer_key
from l4pack.checkpoint.journal import Journal
from l4pack.errors import UsageError
from l4pack.stream.layer import side_span
from l4pack.work.seal import Seal, Span, seal, unbroken

_HIDDEN = "hidden"


@dataclass(frozen=True)
class KeptStates:
    """Of the streams called `names`, whose files [rows, width] lie in `folder`, in a model of so many `layers`."""

    journal: Journal
    folder: Path
    names: Sequence[str]
    rows: int
    width: int
    dtype: torch.dtype
    layers: int

    def done(self) -> int:
        """Layers that need not be walked again."""
        layers = range(self.layers)
        known = next((layer for layer in layers if layer_key(layer) not in self.journal.finished), self.layers)
        if known in (0, self.layers) or unbroken(self.folder, self._spans(known), self._seals(known)):
            return known
        there = self._there()
        return next((done for done in range(known - 1, 0, -1) if self._sealed_as(done, there)), 0)

    def seal(self, layer: int) -> list[Seal]:
        """Of a layer's outputs, once they are on disk."""
        return seal(self.folder, self._spans(layer + 1))

    def note(self, layer: int, seals: Sequence[Seal]) -> None:
        """Say in the journal that a layer is done, and what its outputs are."""
        key = layer_key(layer)
        self.journal.record(finished={key: ""}, results={key: {_HIDDEN: [one.model_dump() for one in seals]}})

    def _spans(self, done: int) -> list[Span]:
        """Where the outputs of the last of so many layers lie."""
        return [side_span(name, done % 2, self.rows, self.width, self.dtype) for name in self.names]

    def _seals(self, done: int) -> list[Seal]:
        try:
            found = self.journal.results.get(layer_key(done - 1), {}).get(_HIDDEN, [])
            return [Seal.model_validate(one) for one in found]
        except (ValidationError, TypeError):
            return []

    def _there(self) -> set[Seal]:
        """What the files of both sides are now, as far as they are there."""
        found: set[Seal] = set()
        for span in (*self._spans(0), *self._spans(1)):
            try:
                found.update(seal(self.folder, [span]))
            except (OSError, UsageError):
                continue
        return found

    def _sealed_as(self, done: int, there: set[Seal]) -> bool:
        seals = self._seals(done)
        sealed = {Span(one.file, one.start, one.nbytes) for one in seals}
        return sealed == set(self._spans(done)) and set(seals) <= there
