"""The largest magnitudes of keys and values as they enter the cache, for scales that are fixed beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l4pack.artifact.kv_cache import scale_shape
from l4pack.quant.floats import store_scale
from l4pack.quant.grid import E4M3
from l4pack.recipe import KVStrategy


@dataclass
class CacheRange:
    """Looks on as one layer's keys and values enter the cache; tokens that only fill up a batch don't count."""

    strategy: KVStrategy
    kv_heads: int

    def __post_init__(self) -> None:
        self._key, self._value = torch.zeros(self.kv_heads), torch.zeros(self.kv_heads)

    def __call__(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, kv_heads, length, head_dim], as they were."""
        for row, length in enumerate(lengths):
            self._key = torch.maximum(self._key, _by_head(keys[row, :, :length]))
            self._value = torch.maximum(self._value, _by_head(values[row, :, :length]))
        return keys, values

    def join(self, other: CacheRange) -> None:
        """Take in what another has seen."""
        self._key, self._value = torch.maximum(self._key, other._key), torch.maximum(self._value, other._value)

    def amax(self) -> tuple[list[float], list[float]]:
        """Largest magnitudes so far of keys and of values: one of all heads, or one a head."""
        both = (self._key, self._value)
        if self.strategy is KVStrategy.TENSOR:
            both = (self._key.amax()[None], self._value.amax()[None])
        key, value = (one.tolist() for one in both)
        return key, value

    def record(self) -> dict[str, list[float]]:
        """What is recorded of the layer, to six digits."""
        key, value = ([float(f"{one:.6g}") for one in both] for both in self.amax())
        return {"key_amax": key, "value_amax": value}

    def scales(self) -> list[NDArray[Any]]:
        """Scales of keys and of values, float32 [1] or [kv_heads, 1, 1], that map the largest magnitudes to the
        largest E4M3 value."""
        shape = scale_shape(self.strategy, self.kv_heads)
        return [_scale(np.array(amax, np.float32)).reshape(shape) for amax in self.amax()]


def _by_head(entering: Tensor) -> Tensor:
    return entering.abs().amax((1, 2)).float().cpu()


def _scale(amax: NDArray[np.float32]) -> NDArray[Any]:
    """Where all is zero nothing is known of what may come: the scale is 1, as runtimes take it without one."""
    return store_scale(np.where(amax > 0, amax / np.float32(E4M3.highest), np.float32(1)), "F32")
