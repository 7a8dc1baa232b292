"""The inner loops of GPTQ: the columns of one block in turn, on the CPU by Numba kernels over rows, else in torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l4pack.quant.cpu import kernel


def solve_block(
    block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int
) -> tuple[Tensor, Tensor]:
    """Round the columns of a block [out, n] in turn: int8 levels, and errors divided by the factor's diagonal.

    `upper` [n, n] is the block's part of U; `scale` and `zero_point` are given for every weight [out, n].
    """
    if block.device.type == "cpu":
        return _solve_block_cpu(block, upper, scale, zero_point, num_bits)
    return solve_block_torch(block, upper, scale, zero_point, num_bits)


def solve_block_torch(
    block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int
) -> tuple[Tensor, Tensor]:
    """`solve_block` in torch operations, for any device."""
    lowest, highest = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    block = block.clone()
    levels, errors = torch.empty_like(block), torch.empty_like(block)
    for i in range(block.shape[1]):
        w, s, z = block[:, i], scale[:, i], zero_point[:, i]
        level = ((w / s).round() + z).clamp(lowest, highest)
        error = (w - (level - z) * s) / upper[i, i]
        levels[:, i], errors[:, i] = level, error
        block[:, i + 1 :].addr_(error, upper[i, i + 1 :], alpha=-1)
    return levels.to(torch.int8), errors


@kernel
def _solve_rows(
    block: NDArray[Any],
    upper: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    num_bits: int,
    levels: NDArray[np.int8],
    errors: NDArray[Any],
) -> None:
    """`solve_block` for some rows, in the dtype of `block`, which is overwritten; the factor stays in cache."""
    lowest = block.dtype.type(-(1 << (num_bits - 1)))
    highest = block.dtype.type((1 << (num_bits - 1)) - 1)
    columns = block.shape[1]
    for o in range(block.shape[0]):
        row = block[o]
        for i in range(columns):
            w = row[i]
            s = scale[o, i]
            z = zero_point[o, i]
            level = min(max(np.rint(w / s) + z, lowest), highest)
            error = (w - (level - z) * s) / upper[i, i]
            levels[o, i] = np.int8(level)
            errors[o, i] = error
            rest = row[i + 1 :]
            factors = upper[i, i + 1 :]
            for k in range(rest.size):
                rest[k] -= error * factors[k]


def _solve_block_cpu(
    block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int
) -> tuple[Tensor, Tensor]:
    """`solve_block` by the Numba kernel, rows shared between as many threads as torch uses."""
    arrays = [tensor.contiguous().numpy() for tensor in (block, scale, zero_point)]
    factor = upper.numpy()
    levels, errors = np.empty(block.shape, np.int8), np.empty_like(arrays[0])

    def rows(part: slice) -> None:
        weights, scales, zeros = (array[part] for array in arrays)
        _solve_rows(weights, factor, scales, zeros, num_bits, levels[part], errors[part])

    _share_rows(rows, len(block))
    return torch.from_numpy(levels), torch.from_numpy(errors)


def descend_block(
    levels: Tensor, pull: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int
) -> Tensor:
    """Move the columns of a block [out, n] in turn, `levels` in place; returns how the values changed [out, n].

    `pull` is R H of the block, `hessian` [n, n] its part of the damped H.
    """
    if pull.device.type == "cpu":
        return _descend_block_cpu(levels, pull, hessian, scale, zero_point, num_bits)
    return descend_block_torch(levels, pull, hessian, scale, zero_point, num_bits)


def descend_block_torch(
    levels: Tensor, pull: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int
) -> Tensor:
    """`descend_block` in torch operations, for any device."""
    lowest, highest = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    change = torch.empty_like(pull)
    for i in range(pull.shape[1]):
        s, z, old = scale[:, i], zero_point[:, i], levels[:, i].to(pull.dtype)
        wanted = (old - z) * s + pull[:, i] / hessian[i, i]
        level = ((wanted / s).round() + z).clamp(lowest, highest)
        change[:, i] = (level - old) * s
        pull.addr_(change[:, i], hessian[i], alpha=-1)
        levels[:, i] = level.to(torch.int8)
    return change


@kernel
def _descend_rows(
    levels: NDArray[np.int8],
    pull: NDArray[Any],
    hessian: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    num_bits: int,
    change: NDArray[Any],
) -> None:
    """`descend_block` for some rows, in the dtype of `pull`, which is overwritten."""
    lowest = pull.dtype.type(-(1 << (num_bits - 1)))
    highest = pull.dtype.type((1 << (num_bits - 1)) - 1)
    for o in range(pull.shape[0]):
        row = pull[o]
        for i in range(pull.shape[1]):
            s = scale[o, i]
            z = zero_point[o, i]
            old = pull.dtype.type(levels[o, i])
            wanted = (old - z) * s + row[i] / hessian[i, i]
            level = min(max(np.rint(wanted / s) + z, lowest), highest)
            moved = (level - old) * s
            change[o, i] = moved
            if moved != 0:
                levels[o, i] = np.int8(level)
                factors = hessian[i]
                for k in range(row.size):
                    row[k] -= moved * factors[k]


def _descend_block_cpu(
    levels: Tensor, pull: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int
) -> Tensor:
    """`descend_block` by the Numba kernel."""
    arrays = [tensor.contiguous().numpy() for tensor in (pull, scale, zero_point)]
    moved, factor, change = levels.numpy(), hessian.contiguous().numpy(), np.empty_like(arrays[0])

    def rows(part: slice) -> None:
        pulls, scales, zeros = (array[part] for array in arrays)
        _descend_rows(moved[part], pulls, factor, scales, zeros, num_bits, change[part])

    _share_rows(rows, len(pull))
    return torch.from_numpy(change)


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
