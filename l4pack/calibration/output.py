"""Where solved matrices go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4pack.checkpoint.journal import Journal
from l4pack.checkpoint.writer import ShardWriter

if TYPE_CHECKING:
    from l4pack.execute import Executor


@dataclass(frozen=True)
class Output:
    """The shards being written, and the journal of what is finished."""

    journal: Journal
    writer: ShardWriter
    executor: Executor
