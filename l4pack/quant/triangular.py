"""Large square matrices in little memory; triangular and symmetric ones with half the work of dense products.

torch has no triangular product: here tiles of columns are dense products that leave out the zeros. What takes [..., n]
takes one matrix, or as many as there are, stacked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 512  # columns of a dense product
INVERT_AT_ONCE = 256


def _tiles(size: int) -> Iterator[slice]:
    for first in range(0, size, TILE):
        yield slice(first, min(first + TILE, size))


def times_upper(matrix: Tensor, upper: Tensor) -> None:
    """matrix <- matrix U, for `matrix` [..., rows, n] of any strides and upper triangular U [..., n, n]."""
    for tile in reversed(list(_tiles(upper.shape[-1]))):
        matrix[..., tile] = matrix[..., : tile.stop] @ upper[..., : tile.stop, tile]


def times_upper_transposed(matrix: Tensor, upper: Tensor) -> None:
    """matrix [..., m, n] <- matrix U^T, U [..., n, n] upper triangular."""
    for tile in _tiles(upper.shape[-1]):
        matrix[..., tile] = matrix[..., tile.start :] @ upper[..., tile, tile.start :].mT


def divide_by_upper_transposed(matrix: Tensor, upper: Tensor) -> None:
    """matrix [..., m, n] <- matrix U^-T, U [..., n, n] upper triangular."""
    for tile in reversed(list(_tiles(upper.shape[-1]))):
        known = matrix[..., tile] - matrix[..., tile.stop :] @ upper[..., tile, tile.stop :].mT
        matrix[..., tile] = torch.linalg.solve_triangular(upper[..., tile, tile].mT, known, upper=False, left=False)


def divide_by_upper(matrix: Tensor, upper: Tensor) -> None:
    """matrix [..., m, n] <- matrix U^-1, U [..., n, n] upper triangular."""
    for tile in _tiles(upper.shape[-1]):
        known = matrix[..., tile] - matrix[..., : tile.start] @ upper[..., : tile.start, tile]
        matrix[..., tile] = torch.linalg.solve_triangular(upper[..., tile, tile], known, upper=True, left=False)


def invert_lower(lower: Tensor) -> None:
    """Invert lower triangular matrices [..., n, n] in place, by halves: nearly all of it is products."""
    size = lower.shape[-1]
    if size <= INVERT_AT_ONCE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, last, below = lower[..., :half, :half], lower[..., half:, half:], lower[..., half:, :half]
    invert_lower(first)
    invert_lower(last)
    times_upper(below.mT, last.mT)
    times_upper_transposed(below, first.mT)
    below.neg_()


def reverse(matrix: Tensor) -> None:
    """Turn the order of rows and columns of [..., n, n] round, in place: of memory without gaps, the order of each one's
    elements."""
    flat = (matrix if matrix.is_contiguous() else matrix.mT).flatten(-2)
    size = flat.shape[-1]
    half = size // 2
    for first in range(0, half, TILE * TILE):
        stop = min(first + TILE * TILE, half)
        front, back = flat[..., first:stop], flat[..., size - stop : size - first]
        kept = front.flip(-1)
        front.copy_(back.flip(-1))
        back.copy_(kept)


def quadratic_form(rows: Tensor, symmetric: Tensor) -> Tensor:
    """The diagonal of R S R^T, summed in float64: [..., rows] of R [..., rows, n]. Of S [..., n, n], only the columns'
    upper part is read."""
    total = torch.zeros(rows.shape[:-1], dtype=torch.float64, device=rows.device)
    for tile in _tiles(symmetric.shape[-1]):
        own = rows[..., tile].double()
        total += ((rows[..., tile] @ symmetric[..., tile, tile]).double() * own).sum(-1)
        if tile.start:
            above = symmetric[..., : tile.start, tile]
            total += 2 * ((rows[..., : tile.start] @ above).double() * own).sum(-1)
    return total


def row_parts(rows: Tensor) -> list[Tensor]:
    """Views [few, n] of [m, n], so that what is made of them takes little memory."""
    return [rows[first : first + TILE] for first in range(0, len(rows), TILE)]


def all_finite(matrix: Tensor) -> bool:
    """Whether every element of [m, n] is a number."""
    return all(bool(rows.isfinite().all()) for rows in row_parts(matrix))


def permute(matrix: Tensor, order: Tensor, into: Tensor) -> None:
    """Rows and columns of a square matrix [n, n] in another order [n], without a second copy on the way."""
    for rows, target in zip(row_parts(order), row_parts(into), strict=True):
        target.copy_(matrix[rows][:, order])
