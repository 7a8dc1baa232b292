"""Number grids and float dtypes: what they say is what torch, NumPy and the oracle have."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import _TYPES

from l4pack.quant import codes
from l4pack.quant.dtypes import FLOATS, NAMES
from l4pack.quant.floats import not_finite
from l4pack.quant.grid import E4M3, GRIDS, INT4, INT8, NumberType
from l4pack.quant.levels import level_dtype
from l4pack.quant.torch_ops import DTYPES, nearest


def test_e4m3_is_torchs():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(np.array(E4M3.values, np.float32), numbers)
    limits = torch.finfo(torch.float8_e4m3fn)
    assert (E4M3.lowest, E4M3.highest) == (limits.min, limits.max)
    assert E4M3.levels == (*(-value for value in reversed(oracle.E4M3[1:])), *oracle.E4M3)
    assert not E4M3.even


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: f"{grid.type}{grid.bits}")
def test_a_byte_keeps_every_level_and_none_is_nearer_than_said(grid):
    kind, levels = codes.KINDS[grid], [level / grid.unit for level in grid.levels]
    kept = [codes.kept_level(np.float32(level), kind) for level in levels]
    assert [codes.level_in(one, kind) for one in kept] == levels
    ours = torch.tensor(levels).to(level_dtype(grid))
    assert ours.view(torch.int8).tolist() == kept
    gaps = np.diff(levels)
    assert gaps.min() == codes.least_apart(kind)
    for level, below, above in zip(levels[1:-1], gaps[:-1], gaps[1:], strict=True):
        assert min(below, above) >= codes.apart(np.float32(level), kind)


@pytest.mark.parametrize(("grid", "bits"), [(INT4, 4), (INT8, 8)])
def test_integers_are_twos_complement(grid, bits):
    assert grid.levels == grid.values == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert grid.even
    assert GRIDS[NumberType.INT, bits] is grid


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: f"{grid.type}{grid.bits}")
@given(ratio=st.floats(-1000, 1000, width=32))
def test_nothing_is_nearer_than_the_nearest(grid, ratio):
    found = nearest(torch.tensor([ratio]), grid).item()
    assert found in grid.levels
    assert abs(found - ratio) == min(abs(level - ratio) for level in grid.levels)


@pytest.mark.parametrize("name", FLOATS)
def test_float_dtypes_are_torchs(name):
    known, theirs = FLOATS[name], torch.finfo(DTYPES[FLOATS[name].word])
    assert (known.smallest, known.largest) == (theirs.smallest_normal, theirs.max)
    assert DTYPES[known.word] is _TYPES[name]
    assert NAMES[known.word] == name


@pytest.mark.parametrize("name", FLOATS)
def test_only_infinities_and_nan_are_not_finite(name):
    values = torch.tensor(
        [0.0, -1.5, float("inf"), -float("inf"), float("nan"), 65000.0], dtype=DTYPES[FLOATS[name].word]
    )
    bits = values.view(torch.int32 if name == "F32" else torch.int16).numpy()
    assert not_finite(bits, name).tolist() == (~values.isfinite()).tolist()
