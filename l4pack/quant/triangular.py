"""Large square matrices in little memory; triangular and symmetric ones with half the work of dense products.

torch has no triangular product: here tiles of columns are dense products that leave out the zeros.
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
    """matrix <- matrix U, for `matrix` [rows, n] of any strides and upper triangular U [n, n]."""
    for tile in reversed(list(_tiles(len(upper)))):
        matrix[:, tile] = matrix[:, : tile.stop] @ upper[: tile.stop, tile]


def times_upper_transposed(matrix: Tensor, upper: Tensor) -> None:
    """matrix [m, n] <- matrix U^T, U [n, n] upper triangular."""
    for tile in _tiles(len(upper)):
        matrix[:, tile] = matrix[:, tile.start :] @ upper[tile, tile.start :].T


def divide_by_upper_transposed(matrix: Tensor, upper: Tensor) -> None:
    """matrix [m, n] <- matrix U^-T, U [n, n] upper triangular."""
    for tile in reversed(list(_tiles(len(upper)))):
        known = matrix[:, tile] - matrix[:, tile.stop :] @ upper[tile, tile.stop :].T
        matrix[:, tile] = torch.linalg.solve_triangular(upper[tile, tile].T, known, upper=False, left=False)


def invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix [n, n] in place, by halves: nearly all of it is products."""
    size = len(lower)
    if size <= INVERT_AT_ONCE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower(first)
    invert_lower(last)
    times_upper(below.T, last.T)
    times_upper_transposed(below, first.T)
    below.neg_()


def reverse(matrix: Tensor) -> None:
    """Turn the order of rows and columns of [n, n] round, in place: of memory without gaps, the order of its
    elements."""
    flat = (matrix if matrix.is_contiguous() else matrix.T).view(-1)
    half = len(flat) // 2
    for first in range(0, half, TILE * TILE):
        stop = min(first + TILE * TILE, half)
        front, back = flat[first:stop], flat[len(flat) - stop : len(flat) - first]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def quadratic_form(rows: Tensor, symmetric: Tensor) -> Tensor:
    """The diagonal of R S R^T, summed in float64: [rows]. Of S, only the columns' upper part is read."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for tile in _tiles(len(symmetric)):
        own = rows[:, tile].double()
        total += ((rows[:, tile] @ symmetric[tile, tile]).double() * own).sum(1)
        if tile.start:
            total += 2 * ((rows[:, : tile.start] @ symmetric[: tile.start, tile]).double() * own).sum(1)
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
