"""The Triton kernels against the torch loops: on a CUDA device where there is one, else by Triton's interpreter."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import pytest
import torch

from l4pack.quant import gptq_columns
from l4pack.quant.grid import GRIDS, NumberType

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="it comes with torch for CUDA")
MATRICES, OUT = 2, 21


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return import_module("l4pack.quant.gptq_triton")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def qparams(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = 0.01 + 0.01 * random(MATRICES, OUT, 1, seed=5).abs()
    zero_point = random(MATRICES, OUT, 1, seed=6).mul(2).round()
    return scale.expand(-1, -1, columns), zero_point.expand(-1, -1, columns)


def agree(ours: torch.Tensor, theirs: torch.Tensor, levels: torch.Tensor, wanted: torch.Tensor) -> None:
    """Bit by bit where nothing is fused, or in the rows where that made no level another."""
    same = (levels == wanted).all(-1)
    assert same.float().mean() > (0.9 if DEVICE == "cuda" else 0.999)
    torch.testing.assert_close(ours[same], theirs[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("columns", "num_bits"), [(16, 4), (32, 8)])
def test_a_block_is_solved_as_by_the_loop(kernels, columns, num_bits):
    block = random(MATRICES, OUT, columns, seed=1) * 0.05
    upper = (random(MATRICES, columns, columns, seed=2) * 0.2).triu(1) + torch.eye(columns, device=DEVICE)
    given = (block, upper, *qparams(columns), num_bits)
    levels, errors = kernels.solve_block(*given)
    wanted, missed = gptq_columns.solve_block_torch(*given[:-1], GRIDS[NumberType.INT, num_bits])
    agree(errors, missed, levels, wanted)


@pytest.mark.parametrize(("columns", "num_bits"), [(16, 4), (32, 8)])
def test_a_block_descends_as_by_the_loop(kernels, columns, num_bits):
    x = random(MATRICES, 3 * columns, columns, seed=3)
    hessian = x.mT @ x / (3 * columns) + 0.01 * torch.eye(columns, device=DEVICE)
    levels = random(MATRICES, OUT, columns, seed=4).mul(2).round().clamp(-7, 7)
    pull = random(MATRICES, OUT, columns, seed=7) * 0.05
    given = (levels, pull, hessian, *qparams(columns), num_bits)
    new, changes, gain = kernels.descend_block(*given)
    wanted, moved, fell = gptq_columns.descend_block_torch(*given[:-1], GRIDS[NumberType.INT, num_bits])
    assert (wanted != levels).float().mean() > 0.1
    agree(changes, moved, new, wanted)
    same = (new == wanted).all(-1)
    torch.testing.assert_close(gain[same], fell[same], rtol=1e-4, atol=1e-9)
