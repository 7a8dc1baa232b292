"""Carrying one matrix into its tensors, some rows at a time."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from l4pack.checkpoint.writer import ShardWriter
from l4pack.export.artifact import Rows, Source
from l4pack.export.target import Carried
from l4pack.formats.carrier import SolvedRows
from l4pack.quant.floats import widen
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import quantize_block


def carry(carried: Carried, number: int, rows: Rows, writer: ShardWriter) -> None:
    """Write source `number` of `carried` where it belongs. Raises SourceError."""
    if carried.constant is not None:
        writer.write(carried.name, 0, carried.constant)
        return
    source = carried.sources[number]
    for step in source.steps():
        for tensor, array in zip(carried.tensors, encoded(carried, source, step, rows), strict=True):
            writer.write(tensor.name, (number * source.rows + step.start) * tensor.row_bytes, array)


def encoded(carried: Carried, source: Source, step: slice, rows: Rows) -> tuple[NDArray[Any], ...]:
    """The arrays of some rows, one for each tensor."""
    if carried.carrier is None:
        return (_floats(carried, source, step, rows),)
    if carried.rounded_to is None:
        return carried.carrier.encode(rows.solved(source, step))
    values = rows.values(source, step)
    made = quantize_block(values, Layout.OUT_IN, "F32", carried.rounded_to)
    return carried.carrier.encode(SolvedRows(made, carried.rounded_to, source.columns))


def _floats(carried: Carried, source: Source, step: slice, rows: Rows) -> NDArray[Any]:
    stored = rows.floats(source, step)
    return widen(stored) if carried.tensors[0].dtype == "F32" else stored
