"""Where solved matrices go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.writer import ShardWriter
from l4pack.plan.assign import Target
from l4pack.quant.quantized import Quantized


class MatrixWriter(Protocol):
    """Places a quantized slice of a matrix, whose first output row is `row`, in the artifact."""

    def write_quantized(self, target: Target, row: int, quantized: Quantized) -> None: ...


@dataclass(frozen=True)
class Output:
    """The shards being written, and the journal of what is finished."""

    journal: Journal
    writer: ShardWriter
    executor: MatrixWriter
