"""Sequences packed row after row, and their hidden states in files.

A file's pages stay in memory while there is some and go to disk when there is not; the same file is what a run goes on
from after a kill.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from l4pack.errors import BudgetError
from l4pack.units import human_bytes
from l4pack.work.files import open_own


class Images(Protocol):
    """The images of a sequence, whose pixels are there when they are asked for."""

    @property
    def tiles(self) -> int:
        """Pieces that the vision tower sees."""
        ...

    @property
    def pixels(self) -> int:
        """Of the largest image as its file has it."""
        ...

    def pixel_values(self) -> Tensor:
        """Float [tiles, channels, height, width]."""
        ...


@dataclass(frozen=True)
class TokenSequence:
    """One sequence to run: token ids, the first that is scored, and images for its image tokens.

    `unscored` tokens are not scored wherever they stand. `position` is that of the first token where keys and values of
    those before it are kept (`kv.KeptCache`).
    """

    tokens: tuple[int, ...]
    score_from: int = 1
    position: int = 0
    unscored: frozenset[int] = frozenset()
    images: Images | None = field(default=None, compare=False)

    def scored(self) -> Tensor:
        """Positions of tokens that are scored, int64."""
        positions = torch.arange(self.score_from, len(self.tokens))
        if not self.unscored:
            return positions
        return positions[[self.tokens[position] not in self.unscored for position in positions.tolist()]]


@dataclass(frozen=True, slots=True)
class AttendedRows:
    """Consecutive rows that attend to one another only, and the position of the first in its sequence."""

    start: int
    length: int
    position: int


class Packed:
    """Where every sequence's rows lie; sequences keep their order."""

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self.sequences = tuple(sequences)
        self.starts = tuple(itertools.accumulate((len(item.tokens) for item in sequences), initial=0))

    @property
    def rows(self) -> int:
        """Rows of all sequences."""
        return self.starts[-1]

    def pieces(self, chunk: int | None) -> list[AttendedRows]:
        """Whole sequences, or with `chunk` their non-overlapping chunks of that many tokens."""
        pieces = []
        for start, item in zip(self.starts, self.sequences, strict=False):
            step = chunk or len(item.tokens)
            firsts = range(0, len(item.tokens), step)
            pieces += [
                AttendedRows(start + first, min(step, len(item.tokens) - first), item.position + first)
                for first in firsts
            ]
        return pieces

    def scored_rows(self) -> Tensor:
        """Rows whose NEXT token is scored, int64, in order."""
        spans = [start + item.scored() - 1 for start, item in zip(self.starts, self.sequences, strict=False)]
        return torch.cat(spans)

    def targets(self) -> Tensor:
        """The token that follows each of `scored_rows`, int64."""
        spans = [torch.tensor(item.tokens, dtype=torch.long)[item.scored()] for item in self.sequences]
        return torch.cat(spans)

    def scored_lengths(self) -> list[int]:
        """How many tokens of each sequence are scored."""
        return [len(item.scored()) for item in self.sequences]


def batches(pieces: Sequence[AttendedRows], most: int) -> Iterator[list[AttendedRows]]:
    """Neighbouring pieces that, padded to the longest, hold at most `most` tokens (a longer piece comes alone)."""
    waiting: list[AttendedRows] = []
    for piece in pieces:
        longest = max([piece.length, *(other.length for other in waiting)])
        if waiting and longest * (len(waiting) + 1) > most:
            yield waiting
            waiting = []
        waiting.append(piece)
    if waiting:
        yield waiting


class Buffer:
    """A file-backed matrix [rows, width]."""

    def __init__(self, path: Path, rows: int, width: int, dtype: torch.dtype, *, kept: bool = False) -> None:
        """Make the file with its space reserved, or open one that was `kept` and is to be read.

        Whatever else lies under the name is removed: what nobody vouches for is never read. Raises BudgetError when
        the disk is too full.
        """
        nbytes = max(1, rows * width * dtype.itemsize)
        if not kept:
            path.unlink(missing_ok=True)
        self._file = open_own(path, os.O_RDWR | (0 if kept else os.O_CREAT | os.O_EXCL), 0o600)
        try:
            os.posix_fallocate(self._file, 0, nbytes)
        except OSError as error:
            os.close(self._file)
            if not kept:
                path.unlink()  # what it did take must not stay on a full disk
            raise BudgetError(
                f"{path.parent} has no room for {human_bytes(nbytes)} of hidden states",
                hint="free some space, take fewer samples, or keep the work on another disk",
            ) from error
        self._map = mmap.mmap(self._file, nbytes)
        self.data: Tensor = torch.frombuffer(self._map, dtype=dtype, count=rows * width).view(rows, width)

    def flush(self) -> None:
        """Wait until the file's bytes are on disk."""
        self._map.flush()
        os.fsync(self._file)

    def release(self) -> None:
        """Let the pages go from this process; their bytes stay in the file."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the file; `data` must not be used any more."""
        del self.data
        os.close(self._file)


class Rows:
    """Some rows [rows, width] of a buffer."""

    def __init__(self, buffer: Buffer, part: slice = slice(None)) -> None:
        self._buffer = buffer
        self.data = buffer.data[part]

    def release(self) -> None:
        """Let the pages of the whole buffer go."""
        self._buffer.release()


class DeviceRows(Rows):
    """Rows [rows, width] that stay on a device, where there is nothing to let go of."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def release(self) -> None:
        """They stay."""


class Elsewhere(Rows):
    """Rows that other processes have open, and this one has not."""

    def __init__(self) -> None:
        """There is nothing to look at."""

    def release(self) -> None:
        """Nothing is held here."""
