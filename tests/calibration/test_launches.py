"""How many operations solving experts together takes, and that the host waits once for all of them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from launches import Launches
from pretend_device import pretend_device

from l4pack.calibration import batch, batch_units
from l4pack.calibration.rows import UnitRows
from l4pack.quant import two_sided, two_sided_waves
from l4pack.recipe import RecipeScheme, load_recipe

# Of a column of gate and up together, and one of down: rounding it, and one sweep.
OPERATIONS_A_COLUMN, OTHER_OPERATIONS = 20, 3000
HIDDEN, INNER, TOKENS = 32, 64, 80


class Given:
    """Stands for a pass: inputs of the tokens, on a device."""

    def __init__(self, seed: int, device: str) -> None:
        self.device = torch.device(device)
        self._inputs = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(device)

    def normed(self, rows: torch.Tensor) -> torch.Tensor:
        return self._inputs[rows.to(self.device)]

    def let_go(self) -> None:
        pass


def scheme(name: str = "int4", **options: object) -> RecipeScheme:
    found = load_recipe("fp8-gptq" if name == "fp8" else name).schemes[name]
    own = {} if name == "fp8" else {"group_size": 32}
    return found.model_copy(update={**own, "gptq": found.gptq.model_copy(update=options)})


def taken(number: int) -> UnitRows:
    """Tokens of one expert, some of them borrowed."""
    rows, kept = torch.arange(50) + number % 8, torch.arange(50) % 7 > 0
    weights = torch.where(torch.arange(50) < 40, 1.0, 0.25)
    return UnitRows(50, rows, torch.full((50, 1), 0.7), weights, kept & (weights == 1), torch.full((50, 1), 0.6), 10)


def given(units: int, device: str = "cpu", end: torch.Tensor | None = None) -> batch_units.Batch:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(units, 3, INNER, HIDDEN, generator=generator) * 0.02
    stacked = batch_units.Stacked(weights[:, :2].flatten(1, 2).to(device), weights[:, 2].mT.contiguous().to(device))
    inputs = partial(batch.blocks, [taken(number) for number in range(units)], Given(0, device), Given(1, device))
    weights = torch.full((units,), 42.5).to(device)
    return batch_units.Batch(stacked, inputs, weights, torch.nn.functional.silu, torch.bfloat16, end)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(batch, "ROWS", 32)


def solved(units: int, name: str, end: torch.Tensor | None = None, **options: object) -> Launches:
    """What solving a batch starts on a device."""
    with pretend_device(), torch.inference_mode():
        one = given(units, "cuda", None if end is None else end.to("cuda"))
        with Launches() as counted:
            batch.solve(one, scheme(name, **options), "BF16")
    return counted


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_operations_do_not_grow_with_the_experts_and_the_host_waits_once(name):
    one, two, eight = (solved(units, name, sweeps=1) for units in (1, 2, 8))
    assert two.started == eight.started
    assert 0.98 * eight.total < one.total <= eight.total  # turning a single matrix round copies nothing
    assert one.waits == two.waits == eight.waits == {"_to_copy": 1}
    assert eight.total < OPERATIONS_A_COLUMN * (HIDDEN + INNER) + OTHER_OPERATIONS


def test_by_both_sides_they_do_not_either(monkeypatch):
    """Tiles take whatever they take: on a GPU, a kernel for all that stand side by side."""
    monkeypatch.setattr(two_sided, "TILE", 32)
    tiles: Counter[str] = Counter()
    for name in ("solve_tiles", "descend_tiles"):
        monkeypatch.setattr(two_sided_waves, name, partial(counted_tiles, tiles, name))
    end = torch.randn(HIDDEN, 3 * HIDDEN, generator=torch.Generator().manual_seed(2))
    two, eight = (solved(units, "int4", end @ end.mT, sweeps=2, two_sided=True) for units in (2, 8))
    assert two.started == eight.started
    assert two.waits == eight.waits == {"_to_copy": 1}
    # Gate and up are two tiles high, down is two wide: diagonals of each, and tiles of each in a sweep.
    assert tiles == {"solve_tiles": 2 * (2 + 2 + 2), "descend_tiles": 2 * 2 * (2 + 2 + 2)}


def counted_tiles(tiles: Counter[str], name: str, *given: Any) -> Any:
    """Neither solved nor moved."""
    tiles[name] += 1
    own = given[0] if name == "solve_tiles" else given[1]
    return two_sided_waves.SolvedTile(own * 0, own * 0, own * 0) if name == "solve_tiles" else own * 0
