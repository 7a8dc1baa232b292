"""The original's own streams: the text that is measured on, and the one that is calibrated on."""

from __future__ import annotations

from pathlib import Path

from l4pack.sensitivity.lanes import copy_rows
from l4pack.stream.embed import embed
from l4pack.stream.hidden import Buffer, Packed
from l4pack.stream.layer import Stream
from l4pack.stream.walk import Model


class Originals:
    """One stream a text; `kept` copies of a layer's inputs let a later walk begin in that layer."""

    def __init__(self, folder: Path, model: Model, measured: Packed, calibration: Packed | None) -> None:
        """Raises BudgetError when the disk is too full."""
        self._folder, self._model = folder, model
        width, dtype = model.skeleton.text.hidden_size, model.skeleton.dtype
        self.measured = Stream(folder, "original", measured.rows, width, dtype)
        self.calibration: Stream | None = None
        self._streams = [(self.measured, measured)]
        if calibration is not None:
            self.calibration = Stream(folder, "calibration", calibration.rows, width, dtype)
            self._streams.append((self.calibration, calibration))

    def embed(self) -> None:
        """Make every text's embeddings the current inputs."""
        for stream, packed in self._streams:
            embed(self._model.weights, self._model.skeleton, packed, stream.current)

    def keep(self) -> None:
        """Copy the current inputs to where the next layers don't overwrite them."""
        for stream, packed in self._streams:
            kept = self._kept(stream, packed)
            copy_rows(kept, stream.current)
            kept.flush()
            kept.close()

    def restore(self) -> None:
        """Take the kept inputs as the current ones."""
        for stream, packed in self._streams:
            kept = self._kept(stream, packed)
            copy_rows(stream.current, kept)
            kept.close()

    def set_side(self, side: int) -> None:
        """Say which file holds the next layer's inputs."""
        for stream, _ in self._streams:
            stream.side = side

    def flush(self) -> None:
        """Wait until a layer's outputs are on disk."""
        for stream, _ in self._streams:
            stream.following.flush()

    def close(self) -> None:
        """Close the files, which stay."""
        for stream, _ in self._streams:
            stream.close()

    def _kept(self, stream: Stream, packed: Packed) -> Buffer:
        path = self._folder / f"{stream.name}-kept.hidden"
        return Buffer(path, packed.rows, self._model.skeleton.text.hidden_size, self._model.skeleton.dtype)
