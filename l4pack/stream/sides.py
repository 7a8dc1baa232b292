"""Hidden states of streams on their way through the layers: a layer's inputs, its outputs, and what lies between.

Inputs and outputs change places from layer to layer, so that a layer's inputs are there until it is complete. Streams of
as many rows may share their files, for hundreds of them would take more open files than a process may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from l4pack.stream.hidden import Buffer, DeviceRows, Rows
from l4pack.stream.transfer import beside
from l4pack.work.seal import Span

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS_AT_ONCE = 2048
_SIDES = (0, 1)
_MIDDLE = "middle"


class Stream:
    """The hidden states [rows, width] of one stream."""

    def __init__(self, name: str, sides: Sequence[Rows], middle: Rows, side: int) -> None:
        self.name, self.middle, self.side = name, middle, side
        self._sides = tuple(sides)

    @property
    def current(self) -> Rows:
        """Inputs of the layer."""
        return self._sides[self.side]

    @property
    def following(self) -> Rows:
        """Outputs of the layer."""
        return self._sides[1 - self.side]

    def side_of(self, step: int) -> Rows:
        """Inputs of a step's layer, which are the outputs of the step before it."""
        return self._sides[step % 2]

    def release(self) -> None:
        """Let all pages go."""
        for rows in (*self._sides, self.middle):
            rows.release()


class StreamFiles:
    """Three files `NAME-0.hidden`, `NAME-1.hidden` and `NAME-middle.hidden`, in which streams lie one after another.

    With a `device`, streams stay there, and the files are written when a side is to be on disk.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        streams: Sequence[str],
        shape: tuple[int, int, torch.dtype],
        device: torch.device | None = None,
    ) -> None:
        """`shape` is a stream's rows, width and dtype. Nothing is made or opened yet."""
        rows, width, dtype = shape
        self._folder, self._name, self.names, self._device = folder, name, tuple(streams), device
        self._rows, self._width, self._dtype = rows, width, dtype
        self._buffers: dict[int | str, Buffer] = {}
        self._there: dict[int | str, Tensor] = {}

    def open(self, side: int = 0, *, kept: bool = False) -> dict[str, Stream]:
        """The streams by name; `side` holds a layer's inputs, with `kept` those of an earlier run that is gone on from.

        Raises BudgetError when the disk is too full, UsageError when a kept file is not the job's own.
        """
        count = self._rows * len(self.names)
        for end in (*_SIDES, _MIDDLE):
            path = self._folder / self._file(end)
            known = kept and end == side
            self._buffers[end] = Buffer(path, count, self._width, self._dtype, kept=known)
            if self._device is not None:
                data = self._buffers[end].data
                self._there[end] = data.to(self._device) if known else _like(data, self._device)
        return {name: self._stream(number, side) for number, name in enumerate(self.names)}

    def _stream(self, number: int, side: int) -> Stream:
        part = slice(number * self._rows, (number + 1) * self._rows)
        first, second, middle = (self._rows_of(end, part) for end in (*_SIDES, _MIDDLE))
        return Stream(self.names[number], (first, second), middle, side)

    def _rows_of(self, end: int | str, part: slice) -> Rows:
        return DeviceRows(self._there[end][part]) if end in self._there else Rows(self._buffers[end], part)

    def _file(self, end: int | str) -> str:
        return side_file(self._name, end)

    def span(self, stream: str, side: int) -> Span:
        """Where one side of a stream lies."""
        nbytes = self._rows * self._width * self._dtype.itemsize
        return Span(self._file(side), self.names.index(stream) * nbytes, nbytes)

    def flush(self, side: int) -> None:
        """Wait until one side of all streams is on disk."""
        if side in self._there:
            with beside(self._there[side].device, after=True):
                self._buffers[side].data.copy_(self._there[side])
        self._buffers[side].flush()

    def release(self) -> None:
        """Let all pages go."""
        for buffer in self._buffers.values():
            buffer.release()

    def close(self) -> None:
        """Close the files, which stay; the streams must not be used any more."""
        self._there.clear()
        while self._buffers:
            self._buffers.popitem()[1].close()


def side_file(name: str, end: int | str) -> str:
    """The file of one side, or of what lies between."""
    return f"{name}-{end}.hidden"


def _like(data: Tensor, device: torch.device) -> Tensor:
    return data.new_empty(data.shape, device=device)


def copy_rows(target: Rows, source: Rows | None) -> None:
    """Copy all rows (None: zeros), letting pages go on the way, so that no stream need be resident as a whole."""
    for start in range(0, len(target.data), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        target.data[rows] = 0 if source is None else source.data[rows]
        target.release()
        if source is not None:
            source.release()
