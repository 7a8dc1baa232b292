"""Which bytes of an artifact a task writes."""

from __future__ import annotations

from collections.abc import Iterator

from l4pack.checkpoint.writer import Extent
from l4pack.plan.assign import PlannedTensor, Target, Task
from l4pack.quant.scheme import Scheme
from l4pack.recipe import KEEP, Recipe

INPUT_SCALE = "input_scale"


def task_extents(task: Task, recipe: Recipe) -> list[Extent]:
    """What a task writes, in the order it does."""
    if task.copied is not None:
        return [Extent(task.copied.name, 0, task.copied.nbytes)]
    return [extent for target in task.targets for extent in target_extents(target, recipe, task.rows)]


def target_extents(target: Target, recipe: Recipe, rows: tuple[int, int] | None = None) -> Iterator[Extent]:
    """What is written of a matrix, or of its output rows from `rows[0]` to `rows[1]`, in the order it is."""
    start, stop = rows or (0, target.linear.out_features)
    scheme = None if target.scheme == KEEP else recipe.schemes[target.scheme]
    for tensor, in_one in [(target.tensors[0], 1)] if scheme is None else made_by_rows(target, scheme):
        row_bytes = tensor.nbytes // tensor.shape[0]
        first = start // in_one * row_bytes if in_one else 0
        end = -(-stop // in_one) * row_bytes if in_one else tensor.nbytes
        yield Extent(tensor.name, first, min(end, tensor.nbytes) - first)


def made_by_rows(target: Target, scheme: Scheme) -> Iterator[tuple[PlannedTensor, int]]:
    """Tensors of a quantized matrix, and how many of its rows share a row of each: 0 for all.

    The scale of its inputs is not among them: calibration writes it.
    """
    rows_in_one = {
        "weight_packed": 1,
        "weight": 1,
        "weight_scale": scheme.block_structure[0] if scheme.block_structure else 1,
        "weight_zero_point": scheme.pack_factor,
        "weight_shape": 0,
    }
    for tensor in target.tensors:
        suffix = tensor.name.removeprefix(f"{target.module}.")
        if suffix != INPUT_SCALE:
            yield tensor, rows_in_one[suffix]
