"""The numbers of weight matrices, asked for by matrix and output rows, whatever file they lie in.

A source says where a matrix begins, what reading it costs, and which matrices one read gets together: gate and up of a
fused expert lie side by side in the file. Numbers stay as they are stored: kernels take both layouts and every dtype,
so nothing is turned or widened on the way.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol, cast

from l4pack.checkpoint.header import DTYPE_BITS
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError
from l4pack.model.tensors import Linear
from l4pack.quant.dtypes import FloatName
from l4pack.quant.layout import Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l4pack.checkpoint.reader import Reader


@dataclass(frozen=True)
class MatrixBlock:
    """Output rows of one matrix: `values` are [out, in] or [in, out], as `layout` says; BF16 as bit patterns."""

    values: NDArray[Any]
    layout: Layout
    dtype: FloatName

    @property
    def out_in(self) -> NDArray[Any]:
        """The values as [out, in], not copied."""
        return self.values if self.layout is Layout.OUT_IN else self.values.T


@dataclass(frozen=True)
class Slab:
    """What one read gives: the same output rows of matrices that lie side by side.

    `values` are [out, in] one below the other, or [in, out] side by side, as `layout` says; `heights` are their output
    rows. What takes a whole slab (a device) need not take its matrices one by one.
    """

    values: NDArray[Any]
    layout: Layout
    dtype: FloatName
    heights: tuple[int, ...]

    def split(self, values: Any) -> list[Any]:
        """The part of each matrix in `values`, or in a tensor of the same shape that was made of them; not copied."""
        places = [slice(*ends) for ends in pairwise((0, *accumulate(self.heights)))]
        return [values[place] if self.layout is Layout.OUT_IN else values[:, place] for place in places]

    def blocks(self) -> list[MatrixBlock]:
        """One block a matrix; they share the slab's memory."""
        return [MatrixBlock(part, self.layout, self.dtype) for part in self.split(self.values)]


class MatrixSource(Protocol):
    """Where matrices are read from; safe to use from several threads at once."""

    def together(self, linear: Linear) -> Hashable:
        """The same for matrices that one read gets together."""
        ...

    def begins(self, linear: Linear) -> tuple[str, int]:
        """The file, and the byte in it, where reading a matrix begins: the order in which to ask for them."""
        ...

    def files(self, linear: Linear) -> Collection[str]:
        """Every file that is read for a matrix."""
        ...

    def nbytes(self, linear: Linear, rows: int | None = None) -> int:
        """Bytes of a block of some output rows of a matrix, of all of them if not said otherwise."""
        ...

    def slab(self, linears: Sequence[Linear], rows: slice = slice(None)) -> Slab:
        """Output rows of matrices that are read together, in the order asked for. Raises SourceError."""
        ...


def matrices_of(checkpoint: Checkpoint, reader: Reader | None = None) -> MatrixSource:
    """The matrices of a checkpoint, by the files it lies in.

    Without a `reader` for planning: what reading costs comes from headers, or from a bare configuration.
    """
    return _StoredMatrices(checkpoint, reader)


class _StoredMatrices:
    """The matrices of tensors named and shaped as transformers does: one each, or an expert's columns of a fused one."""

    def __init__(self, checkpoint: Checkpoint, reader: Reader | None) -> None:
        self._checkpoint, self._reader = checkpoint, reader

    def together(self, linear: Linear) -> tuple[str, int | None]:
        """The tensor, and the expert of a fused one."""
        return linear.tensor, linear.expert

    def begins(self, linear: Linear) -> tuple[str, int]:
        """Where the tensor begins, or its expert's slice of it."""
        entry = self._checkpoint.entries[linear.tensor]
        fused = linear.layout is Layout.IN_OUT
        return entry.file, entry.start + (linear.expert or 0) * (entry.nbytes // entry.shape[0]) * fused

    def files(self, linear: Linear) -> Collection[str]:
        """The tensor's."""
        return self._checkpoint.entries[linear.tensor].stored.keys()

    def nbytes(self, linear: Linear, rows: int | None = None) -> int:
        """Bytes of the rows' numbers, in the tensor's dtype."""
        item = DTYPE_BITS[self._checkpoint.dtype_of(linear.tensor)] // 8
        return (linear.out_features if rows is None else rows) * linear.in_features * item

    def slab(self, linears: Sequence[Linear], rows: slice = slice(None)) -> Slab:
        """Read in one piece where the matrices fill the expert's slice, else input by input."""
        assert self._reader is not None
        first = linears[0]
        entry = self._checkpoint.entries.get(first.tensor)
        if entry is None:
            raise SourceError(
                f"{first.tensor} is missing from {self._checkpoint.name}", hint="is the checkpoint complete?"
            )
        places = [rows.indices(linear.out_features)[:2] for linear in linears]
        columns = [slice(x.column + start, x.column + stop) for x, (start, stop) in zip(linears, places, strict=True)]
        if first.layout is Layout.OUT_IN:
            values = self._reader.matrix(first.tensor, None, rows)
        elif _fill(columns, entry.shape[-1]):
            values = self._reader.matrix(first.tensor, first.expert)
        else:
            values = self._reader.columns(first.tensor, first.expert, columns)
        dtype = cast("FloatName", entry.dtype)  # what the layout's check has left, or an artifact's
        return Slab(values, first.layout, dtype, tuple(stop - start for start, stop in places))


def _fill(columns: Sequence[slice], width: int) -> bool:
    """Whether ranges make up all columns, in order."""
    starts = [piece.start for piece in columns]
    stops = [piece.stop for piece in columns]
    return [*starts, width] == [0, *stops]
