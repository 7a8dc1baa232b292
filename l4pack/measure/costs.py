"""What a measurement takes, said before it begins: streams, passes over the weights, disk, memory."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import BudgetError, UsageError
from l4pack.model.config import TextConfig
from l4pack.model.names import classify
from l4pack.model.tensors import QUANTIZABLE
from l4pack.plan.memory import FLOAT, STORED
from l4pack.timing.jobs import running
from l4pack.timing.work import Kind
from l4pack.units import human_bytes
from l4pack.work.device import CPU

BUFFERS = 3  # files of hidden states a stream has
DISK_SHARE = 0.5  # of what is free, at most, unless --streams says more
PASSES_BACK = 2  # over the weights: up and down
CHEAP_FLOP = 1e15  # of running altered streams: some hours of a CPU, seconds of an accelerator


@dataclass(frozen=True)
class Costs:
    """`streams` walk at once, in `waves` passes over the weights at least, on so many `workers`; bytes read and on disk, of
    all of them, and in memory, of one.

    A walk back comes before them where changes are predicted from gradients, and takes `walk_back_disk_bytes` at most.
    `flop` are the operations of running all streams once through the layers they walk; solving comes on top.
    """

    changes: int
    direct: int
    joint: int
    streams: int
    waves: int
    tokens: int
    calibration_tokens: int
    flop: float
    read_bytes: int
    disk_bytes: int
    peak_ram_bytes: int
    workers: int = 1
    walk_back_disk_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def layer_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the matrices of all layers."""
    return sum(entry.nbytes for name, entry in checkpoint.entries.items() if classify(name).role in QUANTIZABLE)


def stream_bytes(text: TextConfig, rows: int, dtype: torch.dtype) -> int:
    """Disk that one stream's hidden states take."""
    return BUFFERS * rows * text.hidden_size * dtype.itemsize


@dataclass(frozen=True)
class BackBytes:
    """Disk that a walk back takes at most, and what of it stays until the end."""

    most: int = 0
    kept: int = 0


def back_bytes(text: TextConfig, rows: int) -> BackBytes:
    """The walk back's inputs of all layers in BF16 on the way up, beside a stream; on the way down two gradients as
    streams, what enters attention, and both gradients in two places of every layer passed."""
    count, row = 2 if text.moe_layers else 1, rows * text.hidden_size
    layers, entering = text.num_hidden_layers, 2 * rows * text.num_key_value_heads * text.head_dim
    kept, working = layers * 2 * count * row * STORED, BUFFERS * row * FLOAT
    up = (layers + 1) * row * STORED + count * working
    down = kept + 2 * row * STORED + count * working + entering * FLOAT
    return BackBytes(max(up, down), kept)


def back_flop(text: TextConfig, tokens: int, length: int) -> float:
    """Operations of the walk back: up once, and down for each gradient, which is about two forward walks."""
    return (1 + 2 * (2 if text.moe_layers else 1)) * flop_of(text, text.num_hidden_layers, tokens, length)


def streams_at_once(
    text: TextConfig,
    rows: tuple[int, int],
    dtype: torch.dtype,
    asked: int | None,
    work: Path,
    workers: int = 1,
    kept: int = 0,
) -> int:
    """Altered streams that walk together, of measured and calibration `rows`, on each of so many workers, beside what is
    `kept` there.

    Raises UsageError (asked for none), BudgetError (no room for one).
    """
    if asked is not None and asked < 1:
        raise UsageError(f"--streams {asked} is no number of streams", hint="take at least 1")
    if asked is not None:
        return asked
    free = shutil.disk_usage(work.parent).free
    fixed = stream_bytes(text, 2 * rows[0] + rows[1], dtype)
    one = stream_bytes(text, rows[0], dtype)
    found = ((int(free * DISK_SHARE) - kept) // workers - fixed) // one
    if found < 1:
        raise BudgetError(
            f"{work.parent} has {human_bytes(free)} free; hidden states of one altered stream take "
            f"{human_bytes(kept + fixed + one)}, at most half of it is used",
            hint="free some space, take fewer samples, or put --out elsewhere",
        )
    return found


def flop_of(text: TextConfig, layers: int, tokens: int, length: int) -> float:
    """Of running `tokens`, in sequences of that length, through `layers` layers."""
    whole = running(text, tokens, length, Kind.PRODUCT, CPU)
    return whole.total(Kind.PRODUCT) * layers / text.num_hidden_layers
