"""The hidden states of many altered streams, in three files whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from l4pack.stream.hidden import Buffer
from l4pack.stream.layer import Stream
from l4pack.work.seal import Span

SCRATCH = "scratch"
ROWS_AT_ONCE = 2048


def copy_rows(target: Buffer, source: Buffer | None) -> None:
    """Copy all rows (None: zeros), letting pages go on the way, so that no stream need be resident as a whole."""
    for start in range(0, len(target.data), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        target.data[rows] = 0 if source is None else source.data[rows]
        target.release()
        if source is not None:
            source.release()


class _Rows(Buffer):
    """Some rows of a buffer, as a buffer of their own."""

    def __init__(self, whole: Buffer, rows: slice) -> None:
        self._whole = whole
        self.data = whole.data[rows]

    def flush(self) -> None:
        """Wait until the whole file is on disk."""
        self._whole.flush()

    def release(self) -> None:
        """Let the whole file's pages go."""
        self._whole.release()

    def close(self) -> None:
        """Let go of the data; the file belongs to all lanes."""
        del self.data


class Lane(Stream):
    """One altered stream."""

    def __init__(self, name: str, sides: Sequence[Buffer], middle: Buffer, rows: slice) -> None:
        self.name = name
        self._sides = [_Rows(side, rows) for side in sides]
        self.middle = _Rows(middle, rows)
        self.side = 0


def _file(end: int | str) -> str:
    return f"altered-{end}.hidden"


def lane_span(number: int, side: int, lane_bytes: int) -> Span:
    """Where one side of the lane of that number lies."""
    return Span(_file(side), number * lane_bytes, lane_bytes)


class Lanes:
    """A lane for each of `names`, and one to try things in, of `rows` rows each."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        rows: int,
        width: int,
        dtype: torch.dtype,
        kept: int | None = None,
    ) -> None:
        """`kept` is the side of files that are gone on from. Raises BudgetError when the disk is too full."""
        count = len(names) + 1
        ends = (0, 1, "middle")
        self._paths = [folder / _file(end) for end in ends]
        self._buffers = [
            Buffer(path, count * rows, width, dtype, kept=end == kept)
            for path, end in zip(self._paths, ends, strict=True)
        ]
        spans = [slice(number * rows, (number + 1) * rows) for number in range(count)]
        sides, middle = self._buffers[:2], self._buffers[2]
        self._lanes = {
            name: Lane(name, sides, middle, span) for name, span in zip((*names, SCRATCH), spans, strict=True)
        }

    def __getitem__(self, name: str) -> Lane:
        return self._lanes[name]

    def get(self, name: str) -> Lane | None:
        """A lane, if there is one of that name."""
        return self._lanes.get(name)

    def set_side(self, side: int) -> None:
        """Say which file holds the next layer's inputs."""
        for lane in self._lanes.values():
            lane.side = side

    def flush(self, side: int) -> None:
        """Wait until one file is on disk."""
        self._buffers[side].flush()

    def close(self) -> None:
        """Close the files."""
        for lane in self._lanes.values():
            lane.close()
        for buffer in self._buffers:
            buffer.close()

    def remove(self) -> None:
        """Delete the closed files."""
        for path in self._paths:
            path.unlink()
