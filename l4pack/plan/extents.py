"""Which bytes of an artifact a task writes."""

from __future__ import annotations

from collections.abc import Iterator

from l4pack.checkpoint.writer import Extent
from l4pack.formats.known import load_format
from l4pack.plan.assign import PlannedTensor, Target, Task
from l4pack.quant.suffixes import INPUT_SCALES
from l4pack.recipe import KEEP, Recipe, RecipeScheme


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


def made_by_rows(target: Target, scheme: RecipeScheme) -> Iterator[tuple[PlannedTensor, int]]:
    """Tensors of a quantized matrix, and how many of its rows share a row of each: 0 for all.

    A scale of its inputs that calibration finds is not among them: it is written when that is known.
    """
    rows_in_one = load_format(scheme.format).rows_in_one(scheme)
    for tensor in target.tensors:
        suffix = target.suffix(tensor)
        if not scheme.observed or suffix not in INPUT_SCALES:
            yield tensor, rows_in_one[suffix]
