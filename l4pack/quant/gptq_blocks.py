"""The inner loops of GPTQ: the columns of one block in turn, on the CPU by Numba kernels over rows, else in torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l4pack.quant.codes import (
    E4M3_KIND,
    INT_KIND,
    KINDS,
    apart,
    e2m1_level,
    e4m3_value,
    kept_level,
    kernel,
    least_apart,
    level_in,
    level_of,
)
from l4pack.quant.grid import Grid
from l4pack.quant.levels import level_dtype
from l4pack.quant.torch_ops import levels_of

LANES = 64  # rows that go through a block together, as vectors; with fewer the compiler makes none
NEARLY_HALF = 0.499  # of a level, or of the finest where they lie apart differently: a weight pulled by less stays, whatever the last bits


@dataclass(frozen=True)
class SolvedBlock:
    """The columns of a block [out, n] once rounded: `levels` in the grid's `level_dtype`, the `values` they mean, and `errors`, what the values
    miss by when it is their turn, divided by the factor's diagonal."""

    levels: Tensor
    values: Tensor
    errors: Tensor


def solve_block(
    block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, grid: Grid
) -> SolvedBlock:
    """Round the columns of a block [out, n] in turn.

    `upper` [n, n] is the block's part of U; `scale` and `zero_point` are [out, groups], and `group` int64 [n] says which
    is each column's.
    """
    solve = _solve_block_cpu if block.device.type == "cpu" else solve_block_torch
    return solve(block, upper, scale, zero_point, group, grid)


def solve_block_torch(
    block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, grid: Grid
) -> SolvedBlock:
    """`solve_block` in torch operations, for any device: a block [out, columns], its factor [columns, columns]."""
    block = block.clone()
    scale, zero_point = (part.to(block.dtype)[:, group] for part in (scale, zero_point))
    levels, values, errors = (torch.empty_like(block) for _ in range(3))
    for i in range(block.shape[1]):
        w, s, z = block[:, i], scale[:, i], zero_point[:, i]
        level = levels_of(w / s, grid, z)
        values[:, i] = (level - z) * s
        error = (w - values[:, i]) / upper[i, i]
        levels[:, i], errors[:, i] = level, error
        block[:, i + 1 :].addr_(error, upper[i, i + 1 :], alpha=-1)
    return SolvedBlock(levels.to(level_dtype(grid)), values, errors)


@kernel
def _round_lanes(
    column: NDArray[Any],
    s: NDArray[Any],
    z: NDArray[Any],
    num_bits: int,
    kind: int,
    level: NDArray[Any],
    kept: NDArray[np.int8],
) -> None:
    """The nearest levels of a column's weights, one in each lane, and the bytes they are kept in."""
    number = column.dtype.type
    lowest, highest = number(-(1 << (num_bits - 1))), number((1 << (num_bits - 1)) - 1)
    if kind == INT_KIND:
        for r in range(LANES):
            level[r] = min(max(np.rint(column[r] / s[r]) + z[r], lowest), highest)
            kept[r] = np.int8(level[r])
    elif kind == E4M3_KIND:
        for r in range(LANES):
            level[r] = e4m3_value(np.float32(column[r] / s[r]))
            kept[r] = kept_level(level[r], E4M3_KIND)
    else:
        for r in range(LANES):
            level[r] = e2m1_level(column[r] / s[r])
            kept[r] = np.int8(level[r])


@kernel
def _solve_rows(
    block: NDArray[Any],
    upper: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    group: NDArray[np.int64],
    num_bits: int,
    kind: int,
    levels: NDArray[np.int8],
    values: NDArray[Any],
    errors: NDArray[Any],
) -> None:
    """`solve_block` for some rows, in the dtype of `block`: a tile of rows at a time, turned so that what one column
    does is the same for all lanes of a vector."""
    rows, columns = block.shape
    tile = np.zeros((columns, LANES), block.dtype)
    error, s, z = np.zeros(LANES, block.dtype), np.ones(LANES, block.dtype), np.zeros(LANES, block.dtype)
    level, value = np.zeros(LANES, block.dtype), np.zeros(LANES, block.dtype)
    kept = np.zeros(LANES, np.int8)
    for first in range(0, rows, LANES):
        width = min(LANES, rows - first)
        for r in range(width):
            for i in range(columns):
                tile[i, r] = block[first + r, i]
        for i in range(columns):
            for r in range(width):
                s[r] = scale[first + r, group[i]]
                z[r] = zero_point[first + r, group[i]]
            _round_lanes(tile[i], s, z, num_bits, kind, level, kept)
            for r in range(LANES):
                value[r] = (level[r] - z[r]) * s[r]
                error[r] = (tile[i, r] - value[r]) / upper[i, i]
            for k in range(i + 1, columns):
                factor = upper[i, k]
                for r in range(LANES):
                    tile[k, r] -= error[r] * factor
            for r in range(width):
                levels[first + r, i] = kept[r]
                values[first + r, i] = value[r]
                errors[first + r, i] = error[r]


def _solve_block_cpu(
    block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, grid: Grid
) -> SolvedBlock:
    """`solve_block` by the Numba kernel, rows shared between as many threads as torch uses."""
    arrays = [part.to(block.dtype).contiguous().numpy() for part in (block, scale, zero_point)]
    factor, groups = upper.contiguous().numpy(), group.numpy()
    made = [np.empty(block.shape, np.int8), *(np.empty_like(arrays[0]) for _ in range(2))]

    def rows(part: slice) -> None:
        weights, scales, zeros = (array[part] for array in arrays)
        _solve_rows(weights, factor, scales, zeros, groups, grid.bits, KINDS[grid], *(array[part] for array in made))

    _share_rows(rows, len(block))
    levels, values, errors = map(torch.from_numpy, made)
    return SolvedBlock(levels.view(level_dtype(grid)), values, errors)


def descend(
    levels: Tensor,
    pull: Tensor,
    hessian: Tensor,
    added: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    *,
    block_size: int,
    sweeps: int,
) -> Tensor:
    """Move `levels` [out, in] in place; returns by how much each row's damped loss fell, float64 [out].

    `pull` [out, in] is R H of the damped Hessian and is used up; `added` [in] is the damping that `hessian` lacks; `scale`
    and `zero_point` are [out, groups]. Every column takes its best level in turn, `sweeps` times.
    """
    apply = _descend_cpu if pull.device.type == "cpu" else descend_torch
    return apply(levels, pull, hessian, added, scale, zero_point, grid, block_size, sweeps)


def descend_torch(
    levels: Tensor,
    pull: Tensor,
    hessian: Tensor,
    added: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    block_size: int,
    sweeps: int,
) -> Tensor:
    """`descend` in torch operations, for any device: a block's moves are multiplied into all of `pull` [out, in]
    after it."""
    width = pull.shape[1]
    group = torch.arange(width, device=pull.device) // (width // scale.shape[1])
    gain = torch.zeros(len(pull), dtype=torch.float64, device=pull.device)
    for _ in range(sweeps):
        for first in range(0, width, block_size):
            block = slice(first, min(first + block_size, width))
            part = hessian[block, block] + torch.diag(added[block])
            scales, zeros = scale[:, group[block]], zero_point[:, group[block]]
            own = pull[:, block].clone()
            change = _descend_block(levels[:, block], own, part, scales, zeros, grid, gain)
            pull[:, block].addcmul_(change, added[block], value=-1)
            pull.addmm_(change, hessian[block], alpha=-1)
    return gain


def _descend_block(
    levels: Tensor, pull: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, gain: Tensor
) -> Tensor:
    """One turn of a block's columns, everything given for them alone; returns how the values changed [out, n]."""
    change = torch.empty_like(pull)
    for i in range(pull.shape[1]):
        s, z, old = scale[:, i], zero_point[:, i], levels[:, i].to(pull.dtype)
        wanted = (old - z) * s + pull[:, i] / hessian[i, i]
        level = levels_of(wanted / s, grid, z)
        moved = (level - old) * s
        gain += moved.double() * (2 * pull[:, i].double() - moved.double() * hessian[i, i].double())
        change[:, i] = moved
        pull.addr_(moved, hessian[i], alpha=-1)
        levels[:, i] = level.to(levels.dtype)
    return change


@kernel
def _take_off(own: NDArray[Any], lines: NDArray[Any], moved: NDArray[np.int32], by: NDArray[Any], first: int) -> None:
    """Take moves `by` of the columns `moved` off `own`, a row's pull from column `first` on; four at a time, so that `own` is
    read and written once for them while their lines of the Hessian come from memory."""
    count = moved.size // 4 * 4
    last = first + own.size
    for k in range(0, count, 4):
        a, b, c, d = by[k], by[k + 1], by[k + 2], by[k + 3]
        of_a, of_b = lines[moved[k]][first:last], lines[moved[k + 1]][first:last]
        of_c, of_d = lines[moved[k + 2]][first:last], lines[moved[k + 3]][first:last]
        for i in range(own.size):
            own[i] = own[i] - a * of_a[i] - b * of_b[i] - c * of_c[i] - d * of_d[i]
    for k in range(count, moved.size):
        a, of_a = by[k], lines[moved[k]][first:last]
        for i in range(own.size):
            own[i] -= a * of_a[i]


@kernel
def _catch_up(
    own: NDArray[Any],
    block: int,
    moved: NDArray[np.int32],
    by: NDArray[Any],
    counts: NDArray[np.int32],
    hessian: NDArray[Any],
    block_size: int,
    columns: NDArray[np.int32],
    changes: NDArray[Any],
) -> None:
    """Take what the columns outside a block moved by since its last turn off `own`, the block's part of a row's pull.

    `columns` and `changes`, as long as a row, take those moves in one list.
    """
    count = 0
    for other in range(counts.size):
        if other != block:
            for k in range(other * block_size, other * block_size + counts[other]):
                columns[count] = moved[k]
                changes[count] = by[k]
                count += 1
    _take_off(own, hessian, columns[:count], changes[:count], block * block_size)


@kernel
def _any_pulled(own: NDArray[Any], curvature: NDArray[Any], least: Any) -> bool:
    """Whether any of some columns is pulled by more than `least`, so that it may leave its level."""
    found = np.int32(0)
    for i in range(own.size):
        found = np.int32(found | np.int32(abs(own[i]) > least * curvature[i]))
    return bool(found > 0)


@kernel
def _take_turn(
    levels: NDArray[np.int8],
    own: NDArray[Any],
    hessian: NDArray[Any],
    added: NDArray[Any],
    curvature: NDArray[Any],
    s: Any,
    z: Any,
    num_bits: int,
    kind: int,
    first: int,
    columns: tuple[int, int],
    moved: NDArray[np.int32],
    by: NDArray[Any],
    gain: NDArray[np.float64],
) -> int:
    """Let some columns of the block that starts at `first`, all of one group, move in one row; how many did.

    `levels`, `own`, `added` and `curvature` are the whole block's; `moved` and `by` take which columns of the row moved,
    and by how much. Few do: only those are looked at that are pulled by nearly half a level.
    """
    count = 0
    number = own.dtype.type
    half = s * number(NEARLY_HALF)
    least = half * number(least_apart(kind))
    if not _any_pulled(own[columns[0] : columns[1]], curvature[columns[0] : columns[1]], least):
        return count
    for i in range(columns[0], columns[1]):
        if abs(own[i]) <= least * curvature[i]:
            continue
        old = number(level_in(levels[i], kind))
        if kind == E4M3_KIND and abs(own[i]) <= half * number(apart(old, kind)) * curvature[i]:
            continue
        level = level_of(((old - z) * s + own[i] / curvature[i]) / s, z, num_bits, kind)
        if level != old:
            levels[i] = kept_level(level, kind)
            change = (level - old) * s
            gain[0] += np.float64(change) * (2 * np.float64(own[i]) - np.float64(change) * np.float64(curvature[i]))
            factors = hessian[first + i][first : first + own.size]
            for k in range(own.size):
                own[k] -= change * factors[k]
            own[i] -= change * added[i]
            moved[count] = first + i
            by[count] = change
            count += 1
    return count


@kernel
def _descend_rows(
    levels: NDArray[np.int8],
    pull: NDArray[Any],
    hessian: NDArray[Any],
    added: NDArray[Any],
    curvature: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    num_bits: int,
    kind: int,
    block_size: int,
    sweeps: int,
    gain: NDArray[np.float64],
) -> None:
    """`descend` for some rows, in the dtype of `pull`; `curvature` [in] is the damped Hessian's diagonal.

    Few levels move, so moves are not multiplied into all of `pull`: at its turn, a block looks up which columns moved
    since its last one. What that reads of the Hessian, the columns of the block, stays in cache for all rows.
    """
    rows, columns = pull.shape
    group = columns // scale.shape[1]
    counts = np.zeros((rows, (columns + block_size - 1) // block_size), np.int32)
    moved = np.empty((rows, columns), np.int32)
    by = np.empty((rows, columns), pull.dtype)
    others, changes = np.empty(columns, np.int32), np.empty(columns, pull.dtype)
    for sweep in range(sweeps):
        for first in range(0, columns, block_size):
            last = min(first + block_size, columns)
            block = first // block_size
            for o in range(rows):
                if sweep > 0 and not counts[o].any():  # no block moved in its last turn: none ever will
                    continue
                own = pull[o][first:last]
                _catch_up(own, block, moved[o], by[o], counts[o], hessian, block_size, others, changes)
                count = 0
                start = first
                while start < last:
                    g = start // group
                    stop = min((g + 1) * group, last)
                    count += _take_turn(
                        levels[o][first:last],
                        own,
                        hessian,
                        added[first:last],
                        curvature[first:last],
                        scale[o, g],
                        zero_point[o, g],
                        num_bits,
                        kind,
                        first,
                        (start - first, stop - first),
                        moved[o][first + count : last],
                        by[o][first + count : last],
                        gain[o : o + 1],
                    )
                    start = stop
                counts[o, block] = count


def _descend_cpu(
    levels: Tensor,
    pull: Tensor,
    hessian: Tensor,
    added: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    block_size: int,
    sweeps: int,
) -> Tensor:
    """`descend` by the Numba kernel, rows shared between threads."""
    arrays = [tensor.numpy() for tensor in (levels.view(torch.int8), pull, scale, zero_point)]
    products, damping, curvature = hessian.contiguous().numpy(), added.numpy(), (hessian.diagonal() + added).numpy()
    gain = np.zeros(len(pull))

    options = (grid.bits, KINDS[grid], block_size, sweeps)

    def rows(part: slice) -> None:
        moved, pulls, scales, zeros = (array[part] for array in arrays)
        _descend_rows(moved, pulls, products, damping, curvature, scales, zeros, *options, gain[part])

    _share_rows(rows, len(pull))
    return torch.from_numpy(gain)


def _share_rows(work: Callable[[slice], None], count: int) -> None:
    """Give rows to as many threads as torch uses."""
    threads = torch.get_num_threads()
    bounds = np.linspace(0, count, threads + 1).astype(int)
    parts = [slice(first, last) for first, last in itertools.pairwise(bounds)]
    if threads == 1:
        work(parts[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, parts))
