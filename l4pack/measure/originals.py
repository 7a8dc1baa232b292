"""The original's own streams: the text that is measured on, and the one that is calibrated on."""

from __future__ import annotations

from pathlib import Path

from l4pack.measure.lanes import copy_rows
from l4pack.stream.embed import embed
from l4pack.stream.hidden import Buffer, Packed, buffer_bytes
from l4pack.stream.layer import Stream
from l4pack.stream.walk import Model
from l4pack.work.seal import Span

KEPT_ENDING = "-kept.hidden"


class Originals:
    """One stream a text; `kept` copies of a layer's inputs let a later walk begin in that layer."""

    def __init__(
        self,
        folder: Path,
        model: Model,
        measured: Packed,
        calibration: Packed | None,
        kept: tuple[int | None, int | None] = (None, None),
    ) -> None:
        """`kept` are the sides of each text's files that are gone on from. Raises BudgetError when the disk is too full."""
        self._folder, self._model = folder, model
        width, dtype = model.skeleton.text.hidden_size, model.skeleton.dtype
        self.measured = Stream(folder, "original", measured.rows, width, dtype, kept[0])
        self.calibration: Stream | None = None
        self._streams = [(self.measured, measured)]
        if calibration is not None:
            self.calibration = Stream(folder, "calibration", calibration.rows, width, dtype, kept[1])
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
            kept = self._kept(stream, packed, made=True)
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

    def kept_spans(self) -> list[Span]:
        """Where the copies lie."""
        return [Span(f"{stream.name}{KEPT_ENDING}", 0, self._nbytes(packed)) for stream, packed in self._streams]

    def _kept(self, stream: Stream, packed: Packed, *, made: bool = False) -> Buffer:
        path = self._folder / f"{stream.name}{KEPT_ENDING}"
        skeleton = self._model.skeleton
        return Buffer(path, packed.rows, skeleton.text.hidden_size, skeleton.dtype, kept=made)

    def _nbytes(self, packed: Packed) -> int:
        skeleton = self._model.skeleton
        return buffer_bytes(packed.rows, skeleton.text.hidden_size, skeleton.dtype)
