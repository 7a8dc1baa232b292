"""Adding a low-rank product to a matrix, with the same bits however the matrix is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from l4pack.quant.codes import kernel
from l4pack.quant.floats import Float32Array


@intrinsic  # type: ignore[untyped-decorator]
def _multiply_add(_: Any, factor: Any, other: Any, addend: Any) -> Any:
    """factor * other + addend in float32, rounded once; in software where the processor has no such instruction."""
    signature = types.float32(factor, other, addend)
    return signature, lambda _context, builder, _signature, arguments: builder.fma(*arguments)


def add_product(values: Float32Array, left: Float32Array, right: Float32Array, scale: float) -> None:
    """values += scale * (left @ right), in place: [rows, columns], [rows, rank], [rank, columns], all C-contiguous float32.

    Every number's sum runs over the rank from first to last, each step a multiplication and an addition rounded once; so
    it is a matter of its row and column alone. BLAS libraries do the same for ranks up to some 256.
    """
    _add_product(values, left, right, np.float32(scale))


@kernel
def _add_product(values: Any, left: Any, right: Any, scale: Any) -> None:
    rows, rank = left.shape
    columns = right.shape[1]
    sums = np.empty(columns, np.float32)
    for row in range(rows):
        sums[:] = np.float32(0)
        for k in range(rank):
            factor = left[row, k]
            for column in range(columns):
                sums[column] = _multiply_add(factor, right[k, column], sums[column])
        for column in range(columns):
            values[row, column] += sums[column] * scale
