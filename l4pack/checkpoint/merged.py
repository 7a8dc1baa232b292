"""Tensors that an adapter changes, made while they are read: W + scale * B A in float32, rounded once.

Source: peft `tuners/lora/layer.py`, `Linear.merge`, `Embedding.merge` and `ParamWrapper.merge`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from l4pack.checkpoint.header import DTYPE_BITS, Box, Numbers, TensorEntry
from l4pack.errors import SourceError
from l4pack.quant.dtypes import FloatName

if TYPE_CHECKING:
    from numpy.typing import NDArray

STRIP = 1 << 20  # numbers of a tensor that are merged at once
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class Factor:
    """One of the two matrices that make up a low-rank change: a vector of `rank` numbers for each index of one axis.

    Stored [experts * rank, indices] with `rank_first`, expert by expert, else [indices, rank * experts], the expert's
    number running fastest. The changed matrix has its indices from `offset` on, up to `last` (0: all).
    """

    entry: TensorEntry
    rank: int
    rank_first: bool
    experts: int = 1
    offset: int = 0
    last: int = 0

    @property
    def count(self) -> int:
        """Where its indices end."""
        return self.last or self.entry.shape[1 if self.rank_first else 0]

    def vectors(self, reader: Numbers, ends: tuple[int, int], expert: int) -> NDArray[Any]:
        """float32 [indices, rank] of a range of indices. Raises SourceError for a number that is not finite."""
        import numpy as np

        start, stop = (end + self.offset for end in ends)
        expert = expert if self.experts > 1 else 0
        if self.rank_first:
            part = reader.part(self.entry, ((expert * self.rank, (expert + 1) * self.rank), (start, stop)))
            return self._finite(part).T
        result = np.empty((stop - start, self.rank), np.float32)
        step = max(1, STRIP // self.entry.shape[1])
        for begin in range(start, stop, step):
            end = min(stop, begin + step)
            part = reader.part(self.entry, ((begin, end), (0, self.entry.shape[1])))
            result[begin - start : end - start] = self._finite(part[:, expert :: self.experts])
        return result

    def _finite(self, stored: NDArray[Any]) -> NDArray[Any]:
        import numpy as np

        from l4pack.quant.floats import widen

        values = widen(stored)
        if not np.isfinite(values).all():
            raise SourceError(
                f"{self.entry.name} of the adapter holds an infinite or NaN number",
                hint="its training went wrong, or the file is damaged: merge another checkpoint of it",
            )
        return values


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a part of a tensor: scale * (rows' vectors) (columns' vectors)^T.

    The part is columns `first_column` to `first_column + columns` of all rows, of one expert of a tensor of all of them
    or (None) of each. `expert` is also the one that factors of all experts are asked for where the tensor has one.
    """

    row: Factor
    column: Factor
    scale: float
    expert: int | None
    first_column: int
    columns: int

    def over(self, columns: tuple[int, int]) -> tuple[int, int]:
        """Which of a range of columns it changes; none where the first is not before the last."""
        return max(columns[0], self.first_column), min(columns[1], self.first_column + self.columns)

    def right(self, reader: Numbers, columns: tuple[int, int], expert: int) -> NDArray[Any]:
        """float32 [rank, columns], of those it changes. Raises SourceError."""
        import numpy as np

        start, stop = (end - self.first_column for end in self.over(columns))
        return np.ascontiguousarray(self.column.vectors(reader, (start, max(start, stop)), expert).T)

    def left(self, reader: Numbers, rows: tuple[int, int], expert: int) -> NDArray[Any]:
        """float32 [rows, rank]. Raises SourceError."""
        import numpy as np

        return np.ascontiguousarray(self.row.vectors(reader, rows, expert))

    @property
    def entries(self) -> tuple[TensorEntry, TensorEntry]:
        """The adapter's tensors."""
        return self.row.entry, self.column.entry


@dataclass(frozen=True, slots=True)
class Merged:
    """The derivation of a tensor [rows, columns] or [experts, rows, columns] that low-rank changes are added to in turn.

    A stored tensor of another dtype than `dtype`, which the numbers are made in, is rounded to it with the sum.
    """

    base: TensorEntry
    changes: tuple[LowRank, ...]
    dtype: FloatName

    @property
    def stored(self) -> Mapping[str, int]:
        """The files of what is changed; adapters are on this machine whole, and are not let go of."""
        return self.base.stored

    @property
    def scratch(self) -> int:
        """Most bytes that are taken beside the result while a part of any size is made."""
        width = max(self.base.shape[-1], 1)
        strip = max(STRIP, width) * (_FLOAT * 3 + DTYPE_BITS[self.base.dtype] // 8 * 2)
        factors = [
            factor.rank * (2 * width + max(STRIP // width, 1)) + 2 * max(STRIP, factor.entry.shape[1])
            for change in self.changes
            for factor in (change.row, change.column)
        ]
        return strip + max(factors, default=0) * _FLOAT

    def read(self, reader: Numbers, box: Box, out: NDArray[Any]) -> None:
        """Matrix by matrix, a strip of rows at a time. Raises SourceError where a sum is too large for the dtype."""
        if len(box) < 3:
            self._matrix(reader, box, out, None)
            return
        for expert in range(*box[0]):
            self._matrix(reader, ((expert, expert + 1), *box[1:]), out[expert - box[0][0]], expert)

    def _matrix(self, reader: Numbers, box: Box, out: NDArray[Any], expert: int | None) -> None:
        """The part of one matrix; `expert` is its number in a tensor of all of them."""
        changes = [one for one in self.changes if expert is None or one.expert in (None, expert)]
        # A factor of all experts is asked for the tensor's, or for the one that the tensor is of.
        numbers = [(one.expert if expert is None else expert) or 0 for one in changes]
        rights = [one.right(reader, box[-1], number) for one, number in zip(changes, numbers, strict=True)]
        for rows in _strips(box):
            strip = box if len(box) == 1 else (*box[:-2], rows, box[-1])
            stored = reader.part(self.base, strip)
            place = out if len(box) == 1 else out[rows[0] - box[-2][0] : rows[1] - box[-2][0]]
            values = _wide(stored, place.shape)
            for change, right, number in zip(changes, rights, numbers, strict=True):
                start, stop = (end - box[-1][0] for end in change.over(box[-1]))
                if start < stop:
                    add_to(values[:, start:stop], change.left(reader, rows, number), right, change.scale)
            place[...] = self._narrow(values, stored).reshape(place.shape)

    def _narrow(self, values: NDArray[Any], stored: NDArray[Any]) -> NDArray[Any]:
        """The numbers rounded to what the tensor is made in."""
        from l4pack.quant.floats import narrowed, not_finite

        made = values if self.dtype == "F32" else narrowed(values, self.dtype)
        if not_finite(made, self.dtype).any() and not not_finite(stored, cast("FloatName", self.base.dtype)).any():
            raise SourceError(
                f"{self.base.name} with the adapter merged holds a number too large for {self.dtype}",
                hint="was the adapter trained on this model? Its scale (lora_alpha) may be wrong",
            )
        return made


def merging_bytes(entry: TensorEntry) -> int:
    """Most bytes that are taken beside any part of a tensor while it is read; 0 where nothing is merged into it."""
    return entry.derived.scratch if isinstance(entry.derived, Merged) else 0


def add_to(values: NDArray[Any], left: NDArray[Any], right: NDArray[Any], scale: float) -> None:
    """values += scale * left right in place, [rows, columns], [rows, rank] and [rank, columns], float32."""
    import numpy as np

    from l4pack.quant.low_rank import add_product

    part = np.ascontiguousarray(values)
    add_product(part, left, right, scale)
    if part is not values:
        values[...] = part


def _wide(stored: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A copy of a strip in float32."""
    import numpy as np

    from l4pack.quant.floats import widen

    return np.array(widen(stored), np.float32, order="C").reshape(shape)


def _strips(box: Box) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are made at once."""
    if len(box) == 1:
        yield 0, 1
        return
    (first, last), (start, stop) = box[-2:]
    step = max(1, STRIP // max(1, stop - start))
    for row in range(first, last, step):
        yield row, min(last, row + step)
