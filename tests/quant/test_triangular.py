"""Products with triangular matrices against dense ones, with tiles that do not divide the size."""

from __future__ import annotations

import pytest
import torch

from l4pack.quant import triangular

SIZE, ROWS = 97, 23


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triangular, "TILE", 20)
    monkeypatch.setattr(triangular, "INVERT_AT_ONCE", 10)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def upper() -> torch.Tensor:
    return random(SIZE, SIZE).triu() + 12 * torch.eye(SIZE)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (triangular.times_upper, lambda u: u),
        (triangular.times_upper_transposed, lambda u: u.T),
        (triangular.divide_by_upper_transposed, lambda u: torch.linalg.inv(u.T)),
    ],
)
def test_products_in_place_are_dense_products(function, factor, transposed):
    matrix = random(SIZE, ROWS, seed=1).T if transposed else random(ROWS, SIZE, seed=1)
    expected = matrix @ factor(upper())
    function(matrix, upper())
    torch.testing.assert_close(matrix, expected)


@pytest.mark.parametrize("in_rows", [True, False])
def test_a_lower_matrix_is_inverted_in_place(in_rows):
    lower = upper().T.contiguous() if in_rows else upper().T
    inverse = lower.clone(memory_format=torch.preserve_format)
    triangular.invert_lower(inverse)
    torch.testing.assert_close(inverse @ lower, torch.eye(SIZE, dtype=torch.float64))
    assert torch.equal(inverse, inverse.tril())


@pytest.mark.parametrize("size", [6, 97])
@pytest.mark.parametrize("in_rows", [True, False])
def test_rows_and_columns_are_turned_round_in_place(size, in_rows):
    square = random(size, size)
    turned = square.clone() if in_rows else square.T.clone().T
    triangular.reverse(turned)
    assert torch.equal(turned, square.flip(0, 1))


def test_a_quadratic_form_reads_the_upper_part_alone():
    rows, symmetric = random(ROWS, SIZE, seed=2), random(SIZE, SIZE, seed=3)
    symmetric = symmetric + symmetric.T
    expected = (rows @ symmetric * rows).sum(1)
    spoilt = symmetric.clone()
    for first in range(0, SIZE, triangular.TILE):
        spoilt[first + triangular.TILE :, first : first + triangular.TILE] = torch.nan
    torch.testing.assert_close(triangular.quadratic_form(rows, spoilt), expected)
