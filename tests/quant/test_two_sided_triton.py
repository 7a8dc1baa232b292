"""Tiles of two-sided rounding: the CPU's loop, a weight after the other, against torch operations for many tiles at once, and
against the Triton kernels: on a CUDA device where there is one, else by Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module, util

import pytest
import torch

from l4pack.quant import two_sided_tiles, two_sided_waves
from l4pack.quant.grid import GRIDS, Grid, NumberType
from l4pack.quant.levels import level_dtype
from l4pack.quant.two_sided_tiles import SolvedTile, TileScales

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
WAYS = ("torch", pytest.param("triton", marks=pytest.mark.skipif(not util.find_spec("triton"), reason="not for CPUs")))
TILES, INT4, FP4, FP8 = 3, GRIDS[NumberType.INT, 4], GRIDS[NumberType.FLOAT, 4], GRIDS[NumberType.FLOAT, 8]
CASES = [(24, 16, INT4), (9, 20, INT4), (17, 16, FP4), (17, 16, FP8)]


def way_of(name: str) -> tuple[Callable[..., SolvedTile], Callable[..., torch.Tensor]]:
    """Both loops."""
    if name == "torch":
        return two_sided_waves.solve_tiles_torch, two_sided_waves.descend_tiles_torch
    kernels = import_module("l4pack.quant.two_sided_triton")
    return kernels.solve_tiles, kernels.descend_tiles


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qparams(rows: int, columns: int, grid: Grid = INT4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales and zero points of three groups, and each column's group."""
    scale = 0.01 + 0.01 * random(TILES, rows, 3, seed=5).abs()
    return scale, random(TILES, rows, 3, seed=6).mul(2 * grid.even).round(), torch.arange(columns) % 3


def factor(size: int, seed: int) -> torch.Tensor:
    return (random(TILES, size, size, seed=seed) * 0.2).triu(1) + torch.eye(size)


def definite(size: int, seed: int) -> torch.Tensor:
    x = random(TILES, 3 * size, size, seed=seed)
    return x.mT @ x / (3 * size) + 0.01 * torch.eye(size)


def there(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "columns", "grid"), CASES)
def test_tiles_are_solved_as_a_weight_after_the_other(way, rows, columns, grid):
    solve, _ = way_of(way)
    wanted = random(TILES, rows, columns, seed=1) * 0.05
    across, upper = factor(rows, seed=2), factor(columns, seed=3)
    scale, zero, group = qparams(rows, columns, grid)
    found = solve(*there(wanted, across, upper, scale[..., group], zero[..., group]), grid)
    for number in range(TILES):
        scales = TileScales(scale[number], zero[number], group)
        expected = two_sided_tiles.solve_tile(wanted[number], across[number], upper[number], scales, grid)
        assert torch.equal(found.levels[number].cpu(), expected.levels.float())
        agree(found.errors[number], expected.errors)
        agree(found.left[number], expected.left)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "columns", "grid"), CASES)
def test_tiles_descend_as_a_weight_after_the_other(way, rows, columns, grid):
    _, descend = way_of(way)
    outputs, inputs = definite(rows, seed=2), definite(columns, seed=3)
    levels = random(TILES, rows, columns, seed=4).mul(2).round().clamp(-6, 6)
    levels = levels.where((levels.abs() != 5) | grid.even, 4).to(level_dtype(grid))
    pull, (scale, zero, group) = (
        random(TILES, rows, columns, seed=7) * 0.01,
        qparams(rows, columns, grid),
    )
    new, more = there(levels.clone(), pull, outputs, inputs, scale[..., group], zero[..., group]), []
    changes = descend(*new, grid)
    for number in range(TILES):
        own = levels[number].clone()
        scales = TileScales(scale[number], zero[number], group)
        expected = two_sided_tiles.descend_tile(own, pull[number], outputs[number], inputs[number], scales, grid)
        assert torch.equal(new[0][number].cpu().float(), own.float())
        agree(changes[number], expected)
        more.append((own.float() != levels[number].float()).float().mean())
    assert min(more) > 0.05
