"""The column loops of GPTQ for several matrices at once, in torch operations: as many, however many matrices there are.

Where Triton is there to compile it, a CUDA device carries out a block's loop as one kernel, see `gptq_triton`; for
integers, not for floats.

Columns lie outermost, so that what one column does is one operation on memory without gaps. A product of a column's error
with the rest of a row of U is taken element by element: its bits don't depend on how many matrices stand beside it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from l4pack.quant.grid import Grid
from l4pack.quant.torch_ops import levels_of


def solve_block(block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round the columns of blocks [matrices, out, n] in turn: levels, and errors as `gptq_blocks.SolvedBlock` has them,
    both in the dtype of `block` and [matrices, out, n].

    `upper` [matrices, n, n] is the blocks' part of U; `scale` and `zero_point` [matrices, out, n] are each weight's own.
    """
    if _as_a_kernel(block, grid):
        from l4pack.quant import gptq_triton

        return gptq_triton.solve_block(block, upper, scale, zero_point, grid.bits)
    return solve_block_torch(block, upper, scale, zero_point, grid)


def solve_block_torch(
    block: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """`solve_block` in torch operations, for any device and dtype."""
    columns, scales, zeros = (_outermost(part) for part in (block, scale, zero_point))
    factor = upper.permute(1, 2, 0).contiguous()
    levels, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i in range(len(columns)):
        torch.div(columns[i], scales[i], out=levels[i])
        _round_(levels[i], grid, zeros[i])
        torch.sub(zeros[i], levels[i], out=errors[i])
        errors[i].mul_(scales[i]).add_(columns[i]).div_(factor[i, i, :, None])
        columns[i + 1 :].addcmul_(factor[i, i + 1 :, :, None], errors[i], value=-1)
    return _innermost(levels), _innermost(errors)


def descend_block(
    levels: Tensor, pull: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """One turn of the columns of blocks [matrices, out, n], as `gptq_blocks.descend` takes it: new levels, how the values
    changed, and by how much each row's damped loss fell, float64 [matrices, out].

    `hessian` [matrices, n, n] is the blocks' part of the damped one, all else is given for them alone.
    """
    if _as_a_kernel(pull, grid):
        from l4pack.quant import gptq_triton

        return gptq_triton.descend_block(levels, pull, hessian, scale, zero_point, grid.bits)
    return descend_block_torch(levels, pull, hessian, scale, zero_point, grid)


def descend_block_torch(
    levels: Tensor, pull: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """`descend_block` in torch operations, for any device and dtype."""
    old, own, scales, zeros = (_outermost(part) for part in (levels, pull, scale, zero_point))
    curvature = hessian.permute(1, 2, 0).contiguous()
    values = (old - zeros).mul_(scales)
    new, changes, pulls = (torch.empty_like(old) for _ in range(3))
    for i in range(len(old)):
        pulls[i] = own[i]
        torch.div(own[i], curvature[i, i, :, None], out=new[i])
        _round_(new[i].add_(values[i]).div_(scales[i]), grid, zeros[i])
        torch.sub(new[i], old[i], out=changes[i])
        changes[i].mul_(scales[i])
        own.addcmul_(curvature[i, :, :, None], changes[i], value=-1)
    here = curvature.diagonal().mT[..., None].double()
    gain = (changes.double() * (2 * pulls.double() - changes.double() * here)).sum(0)
    return _innermost(new), _innermost(changes), gain


def _round_(ratio: Tensor, grid: Grid, zero_point: Tensor) -> None:
    """See `torch_ops.levels_of`, in place."""
    if grid.even:
        ratio.round_().add_(zero_point).clamp_(grid.lowest, grid.highest)
    else:
        ratio.copy_(levels_of(ratio, grid))


def _outermost(matrices: Tensor) -> Tensor:
    """[matrices, out, n] as [n, matrices, out], copied."""
    return matrices.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def _innermost(columns: Tensor) -> Tensor:
    """[n, matrices, out] as [matrices, out, n]."""
    return columns.permute(1, 2, 0).contiguous()


def _as_a_kernel(block: Tensor, grid: Grid) -> bool:
    """Whether a real CUDA device has the block, in a shape, dtype and for a grid that the kernels are for: integers."""
    columns = block.shape[-1]
    fits = block.dtype is torch.float32 and columns >= 16 and columns & (columns - 1) == 0
    return grid.even and fits and compiles(block)


def compiles(there: Tensor) -> bool:
    """Whether a real CUDA device has a tensor, and Triton is there to compile for it."""
    return type(there) is Tensor and there.is_cuda and _has_compiler()


@cache
def _has_compiler() -> bool:
    return torch.version.cuda is not None and find_spec("triton") is not None
