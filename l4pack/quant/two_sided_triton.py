"""The loops of `two_sided_waves` as one kernel each, in Triton, which comes with torch for CUDA.

A program has one tile. Every operation is that of the CPU's loop in `two_sided_tiles`, in its order, each rounded once:
products are not fused with sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l4pack.quant.codes import E2M1_KIND, INT_KIND, KINDS
from l4pack.quant.gptq_triton import nearest_level
from l4pack.quant.grid import Grid
from l4pack.quant.two_sided_tiles import SolvedTile

SOLVING_WARPS, DESCENDING_WARPS = 4, 1  # the latter asks all lanes again and again which row moves next
AT_ONCE = 8  # of the terms that are taken off one after the other, as many are loaded together

INTEGERS, E2M1 = tl.constexpr(INT_KIND), tl.constexpr(E2M1_KIND)


def _level_of(
    ratio: tl.tensor,
    zero_point: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    KIND: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The level of a float32 value / scale, as `codes.level_of` has it: of floats, a whole number of times that by which the
    grid's numbers lie apart there, half to even."""
    if KIND == INTEGERS:
        return nearest_level(ratio, zero_point, lowest, highest)
    magnitude = tl.minimum(tl.abs(ratio), highest)
    if KIND == E2M1:
        apart = tl.where(magnitude < 4.0, 1.0, tl.where(magnitude < 8.0, 2.0, 4.0))
    else:
        power = (magnitude.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        apart = tl.maximum(power * 0.125, 0.001953125)
    rounded = ((tl.div_rn(magnitude, apart) + 12582912.0) - 12582912.0) * apart
    return tl.where(ratio < 0.0, -rounded, rounded)


def _solve_tile(
    wanted: tl.tensor,
    across: tl.tensor,
    upper: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    levels: tl.tensor,
    errors: tl.tensor,
    left: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    LANES: tl.constexpr,  # noqa: N803
    TOGETHER: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
) -> None:
    """See `two_sided_waves.solve_tiles`: a row a lane, which all have another column; `left` is [tiles, n, m]."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, LANES)
    start, own_across, own_upper = tile * rows * columns, across + tile * rows * rows, upper + tile * columns * columns
    for step in range(rows + columns - 1):
        column = step - row
        live = (row < rows) & (column >= 0) & (column < columns)
        place = start + row * columns + column
        own = tl.load(wanted + place, mask=live, other=0.0)
        for begin in range(0, tl.minimum(step, columns), TOGETHER):
            for more in tl.static_range(TOGETHER):
                k = begin + more
                known = live & (k < column)
                factor = tl.load(own_upper + k * columns + column, mask=known, other=0.0)
                own -= tl.load(left + start + k * rows + row, mask=known, other=0.0) * factor
        aim = own
        for begin in range(0, tl.minimum(step, rows), TOGETHER):
            for more in tl.static_range(TOGETHER):
                r = begin + more
                known = live & (r < row)
                factor = tl.load(own_across + r * rows + row, mask=known, other=0.0)
                aim -= tl.load(errors + start + r * columns + column, mask=known, other=0.0) * factor
        s = tl.load(scale + place, mask=live, other=1.0)
        z = tl.load(zero_point + place, mask=live, other=0.0)
        level = level_of(tl.div_rn(aim, s), z, lowest, highest, KIND)
        value = (level - z) * s
        turn = tl.load(own_across + row * rows + row, mask=live, other=1.0)
        corner = tl.load(own_upper + column * columns + column, mask=live, other=1.0)
        tl.store(levels + place, level, mask=live)
        tl.store(errors + place, tl.div_rn(aim - value, turn), mask=live)
        tl.store(left + start + column * rows + row, tl.div_rn(own - value, corner), mask=live)
        tl.debug_barrier()  # the next diagonal reads what other lanes stored


def _descend_tile(
    levels: tl.tensor,
    levels_tile: tl.tensor,
    levels_row: tl.tensor,
    outputs: tl.tensor,
    outputs_tile: tl.tensor,
    outputs_row: tl.tensor,
    inputs: tl.tensor,
    inputs_tile: tl.tensor,
    inputs_row: tl.tensor,
    scale: tl.tensor,
    scale_tile: tl.tensor,
    scale_row: tl.tensor,
    zero_point: tl.tensor,
    zero_point_tile: tl.tensor,
    zero_point_row: tl.tensor,
    pull: tl.tensor,
    changes: tl.tensor,
    spread: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    LANES: tl.constexpr,  # noqa: N803
    TOGETHER: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
) -> None:
    """See `two_sided_waves.descend_tiles`; of each tensor how far its tiles and its rows lie apart. `spread`
    [tiles, n, m] takes H_O times how values changed."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, LANES)
    there, start = row < rows, tile * rows * columns
    own_levels, own_outputs = levels + tile * levels_tile + row * levels_row, outputs + tile * outputs_tile
    own_inputs = inputs + tile * inputs_tile
    scales, zeros = (
        scale + tile * scale_tile + row * scale_row,
        zero_point + tile * zero_point_tile + row * zero_point_row,
    )
    diagonal = tl.load(own_outputs + row * outputs_row + row, mask=there, other=1.0)
    for j in range(columns):
        turn = tl.load(own_inputs + j * inputs_row + j)
        own = tl.load(pull + start + row * columns + j, mask=there, other=0.0)
        for begin in range(0, j, TOGETHER):
            for more in tl.static_range(TOGETHER):
                k = begin + more + 0 * row
                known = there & (k < j)
                factor = tl.load(own_inputs + k * inputs_row + j, mask=known, other=0.0)
                own -= tl.load(spread + start + k * rows + row, mask=known, other=0.0) * factor
        old = tl.load(own_levels + j, mask=there, other=0).to(tl.float32)
        s = tl.load(scales + j, mask=there, other=1.0)
        z = tl.load(zeros + j, mask=there, other=0.0)
        value, curvature = (old - z) * s, diagonal * turn
        level = level_of(tl.div_rn(value + tl.div_rn(own, curvature), s), z, lowest, highest, KIND)
        first = tl.min(tl.where(there & (level != old), row, LANES), 0)
        total, moved, found = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), old
        while first < rows:
            at = row == first
            change = tl.sum(tl.where(at, (level - old) * s, 0.0), 0)
            moved, found = tl.where(at, change, moved), tl.where(at, level, found)
            line = change * tl.load(own_outputs + first * outputs_row + row, mask=there, other=0.0)
            total += line
            own -= line * turn
            level = level_of(tl.div_rn(value + tl.div_rn(own, curvature), s), z, lowest, highest, KIND)
            first = tl.min(tl.where(there & (row > first) & (level != old), row, LANES), 0)
        tl.store(own_levels + j, found, mask=there)
        tl.store(changes + start + row * columns + j, moved, mask=there)
        tl.store(spread + start + j * rows + row, total, mask=there)
        tl.debug_barrier()  # the columns after this one read it, perhaps by other lanes


level_of: Any = triton.jit(_level_of)
_solve: Any = triton.jit(_solve_tile)
_descend: Any = triton.jit(_descend_tile)


def solve_tiles(
    wanted: Tensor, across: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> SolvedTile:
    """See `two_sided_waves.solve_tiles`: float32 tiles [tiles, m, n]."""
    given = [part.contiguous() for part in (wanted, across, upper, scale, zero_point)]
    tiles, rows, columns = wanted.shape
    levels, errors = (torch.empty_like(given[0]) for _ in range(2))
    left = wanted.new_empty(tiles, columns, rows)
    _solve[(tiles,)](
        *given, levels, errors, left, rows, columns, grid.lowest / grid.unit, grid.highest / grid.unit,
        LANES=triton.next_power_of_2(rows), TOGETHER=AT_ONCE, KIND=KINDS[grid], num_warps=SOLVING_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    errors.div_(upper.diagonal(dim1=-2, dim2=-1)[:, None])
    return SolvedTile(levels, errors, left.mT)


def descend_tiles(
    levels: Tensor, pull: Tensor, outputs: Tensor, inputs: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> Tensor:
    """See `two_sided_waves.descend_tiles`: float32 tiles [tiles, m, n], each row of all without gaps."""
    pull, (tiles, rows, columns) = pull.contiguous(), pull.shape
    changes, spread = torch.empty_like(pull), pull.new_empty(tiles, columns, rows)
    moved = levels if levels.dtype is torch.int8 else levels.float()  # not every device stores FP8 from a kernel
    parts = [(part, *part.stride()[:2]) for part in (moved, outputs, inputs, scale, zero_point)]
    _descend[(tiles,)](
        *(one for part in parts for one in part), pull, changes, spread, rows, columns, grid.lowest / grid.unit, grid.highest / grid.unit,
        LANES=triton.next_power_of_2(rows), TOGETHER=AT_ONCE, KIND=KINDS[grid], num_warps=DESCENDING_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    if moved is not levels:
        levels.copy_(moved)
    return changes
