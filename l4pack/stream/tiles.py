"""Products with matrices that stay as they are stored: a tile of their outputs at a time is float32, and used in cache.

Few rows go through an expert. To widen a whole matrix for them, into memory that is new every time, took more than half as
long as multiplying with it. Tiles are of one size and each is multiplied by one thread, so the number of threads changes no
bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from l4pack.quant import cpu
from l4pack.quant.dequantize import Dequantizer
from l4pack.stream.rows import TILE_OUTPUTS

_room = threading.local()


class Tiles(Protocol):
    """A matrix [out, in] that gives some of its rows when they are asked for."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        ...

    def tile(self, rows: slice, room: Tensor) -> Tensor:
        """float32 [rows, in], in the memory of `room`, float32 [rows * in]."""
        ...


@dataclass(frozen=True)
class StoredTiles:
    """A plain matrix [out, in] of any float dtype and layout."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.values.shape[0], self.values.shape[1]

    def tile(self, rows: slice, room: Tensor) -> Tensor:
        """float32 [rows, in], laid out as it is stored."""
        part = self.values[rows]
        tile = room.view(part.shape) if part.stride(1) == 1 else room.view(part.T.shape).T
        return tile.copy_(part)


@dataclass(frozen=True)
class QuantizedTiles:
    """A quantized matrix, and the dtype that runtimes round its weights to (None: they don't)."""

    weights: Dequantizer
    rounded: torch.dtype | None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.weights.shape

    def tile(self, rows: slice, room: Tensor) -> Tensor:
        """float32 [rows, in] of rounded weights."""
        tile = room.view(-1, self.shape[1])
        self.weights.rows(rows, tile.numpy())
        if self.rounded is torch.bfloat16:
            cpu.to_bfloat16(tile.numpy())
        elif self.rounded is not None:
            tile.copy_(tile.to(self.rounded))
        return tile


class TiledLinear(nn.Module):
    """`inputs @ weights.T` in float32."""

    def __init__(self, tiles: Tiles) -> None:
        super().__init__()
        self._tiles = tiles

    def forward(self, inputs: Tensor) -> Tensor:
        """float32 [..., out] of float32 [..., in]."""
        rows, (outputs, width) = inputs.reshape(-1, inputs.shape[-1]), self._tiles.shape
        products = torch.from_numpy(np.empty((len(rows), outputs), np.float32))

        @torch.inference_mode()
        def multiply(first: int) -> None:
            part = slice(first, min(first + TILE_OUTPUTS, outputs))
            tile = self._tiles.tile(part, _room_for((part.stop - part.start) * width))
            torch.mm(rows, tile.T, out=products[:, part])

        _each(multiply, range(0, outputs, TILE_OUTPUTS))
        return products.view(*inputs.shape[:-1], outputs)


def _room_for(numbers: int) -> Tensor:
    """Memory of this thread, which keeps the most it was asked for."""
    if getattr(_room, "numbers", np.empty(0)).size < numbers:
        _room.numbers = np.empty(numbers, np.float32)
    return torch.from_numpy(_room.numbers[:numbers])


def _each(work: Callable[[int], None], items: range) -> None:
    """Do all items, on as many threads as torch computes with."""
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        for item in items:
            work(item)
    else:
        for _ in _workers(threads).map(work, items):
            pass


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    """Threads that compute by themselves."""
    ready = threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that begin from here on
        ready.wait()

    workers = ThreadPoolExecutor(count, thread_name_prefix="tiles", initializer=begin)
    for _ in range(count):
        workers.submit(int)
    ready.wait()
    torch.set_num_threads(count)
    return workers
