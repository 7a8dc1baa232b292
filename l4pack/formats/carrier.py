"""How another runtime's file carries the numbers of a matrix: which tensors, of which size, and when no bit is lost.

Carriers take what was solved as it is, codes and scales, and round nothing but where they say so. They are read back
with the other runtime's own library (`export.prove`), which can't share a mistake of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from l4pack.quant.scheme import Scheme

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l4pack.quant.floats import Float32Array
    from l4pack.quant.quantized import Quantized


@dataclass(frozen=True)
class SolvedRows:
    """Some output rows of a quantized matrix; `columns` input features."""

    quantized: Quantized
    scheme: Scheme
    columns: int


@dataclass(frozen=True, slots=True)
class RowPart:
    """What one output row has in one tensor: the ending of the tensor's name, its type and the row's size."""

    suffix: str
    dtype: str
    elements: int
    nbytes: int


class Carrier(Protocol):
    """What carries codes with scales, and zero points or none."""

    @property
    def name(self) -> str:
        """What people call it: `Q4_0`."""
        ...

    def parts(self, columns: int) -> tuple[RowPart, ...]:
        """The tensors there are, and what a row of `columns` weights takes in each."""
        ...

    def encode(self, rows: SolvedRows) -> tuple[NDArray[Any], ...]:
        """The bytes of some rows, an array [rows, ...] for each of the `parts`."""
        ...

    def inexact(self, scale: Float32Array, zero_point: Float32Array | None) -> NDArray[Any]:
        """bool [rows, groups]: which groups with this scale and zero point (level) would not keep their values."""
        ...
