"""Carrying one matrix into its tensors, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from l4pack.checkpoint.writer import ShardWriter
from l4pack.export.artifact import Piece, Rows
from l4pack.export.target import Carried
from l4pack.formats.carrier import SolvedRows
from l4pack.quant.floats import widen
from l4pack.quant.layout import Layout
from l4pack.quant.quantize import quantize_block


def carry(carried: Carried, number: int, rows: Rows, writer: ShardWriter) -> Iterator[Piece]:
    """Write source `number` of `carried` where it belongs; hands on each piece of it that is written. Raises SourceError."""
    source = carried.sources[number]
    for piece in rows.pieces(source):
        for tensor, array in zip(carried.tensors, encoded(carried, piece), strict=True):
            writer.write(tensor.name, (number * source.rows + piece.rows.start) * tensor.row_bytes, array)
        yield piece


def encoded(carried: Carried, piece: Piece) -> tuple[NDArray[Any], ...]:
    """The arrays of some rows, one for each tensor."""
    if carried.carrier is None:
        assert piece.floats is not None
        return (widen(piece.floats) if carried.tensors[0].dtype == "F32" else piece.floats,)
    if carried.rounded_to is None:
        assert piece.solved is not None
        return carried.carrier.encode(piece.solved)
    made = quantize_block(piece.values, Layout.OUT_IN, "F32", carried.rounded_to)
    return carried.carrier.encode(SolvedRows(made, carried.rounded_to, piece.source.columns))
