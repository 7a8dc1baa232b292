"""Tensors whose numbers lie in pieces of one or several files, each read where it lies and put in its place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l4pack.checkpoint.header import Box, Numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor that lies in one file, under a name of its own there.

    Its first number is the tensor's number `at`, and is at byte `start` of the file; along each axis of `shape`,
    neighbours are `strides` numbers apart.
    """

    name: str
    file: str
    start: int
    at: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The derivation of a tensor whose pieces fill it, none over another; a number takes `itemsize` bytes."""

    pieces: tuple[Piece, ...]
    itemsize: int

    @property
    def stored(self) -> Mapping[str, int]:
        """Bytes of the pieces in each file."""
        sizes: Counter[str] = Counter()
        for piece in self.pieces:
            sizes[piece.file] += math.prod(piece.shape) * self.itemsize
        return sizes

    def read(self, reader: Numbers, box: Box, out: NDArray[Any]) -> None:
        """Each piece's share of the box. Raises SourceError."""
        for piece in self.pieces:
            ends = [
                (max(start, at), min(stop, at + size))
                for (start, stop), at, size in zip(box, piece.at, piece.shape, strict=True)
            ]
            if all(start < stop for start, stop in ends):
                inside = [start - at for (start, _), at in zip(ends, piece.at, strict=True)]
                first = sum(map(math.prod, zip(inside, piece.strides, strict=True)))
                there = tuple(
                    slice(start - begin, stop - begin) for (start, stop), (begin, _) in zip(ends, box, strict=True)
                )
                place = piece.start + first * self.itemsize
                reader.strided(piece.file, place, piece.strides, out[there], piece.name)
