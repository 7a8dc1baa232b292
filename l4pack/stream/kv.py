"""Keys and values on their way into the cache: kept for a sequence too long to attend at once, rounded, looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from l4pack.quant.grid import E4M3
from l4pack.quant.torch_ops import nearest


class CacheEntry(Protocol):
    """What is done to keys and values [batch, kv_heads, length, head_dim] that enter the cache.

    The first `lengths[i]` tokens of row `i` are a text's, those after them fill up the batch.
    """

    def __call__(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class RoundedCache:
    """Rounds keys and values to FP8 (E4M3) with fixed scales, float32 [1] or [kv_heads, 1, 1], in their own dtype.

    As vLLM's `reshape_and_cache_flash` stores them; every token attends to what is stored, itself included. Queries stay
    as they are.
    """

    key_scale: Tensor
    value_scale: Tensor

    def __call__(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The values that the cache gives back."""
        del lengths
        return _rounded(keys, self.key_scale), _rounded(values, self.value_scale)


def _rounded(entering: Tensor, scale: Tensor) -> Tensor:
    return (nearest(entering.float() / scale, E4M3) * scale).to(entering.dtype)


def unchanged(keys: Tensor, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values as they come."""
    del lengths
    return keys, values


class PassingCache:
    """What transformers' attention asks of a cache, for sequences that are attended at once: nothing is kept."""

    def __init__(self, entry: CacheEntry, lengths: Sequence[int]) -> None:
        self._entry, self._lengths = entry, lengths

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the sequences."""
        del layer_idx
        return 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """What is attended to."""
        del layer_idx
        return self._entry(keys, values, self._lengths)


class BlockCache:
    """What transformers' attention asks of a cache, for one layer and one sequence of known length."""

    def __init__(self, length: int, entry: CacheEntry = unchanged) -> None:
        self._length, self._entry = length, entry
        self._seen = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the current block."""
        del layer_idx
        return self._seen

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add a block's keys and values [1, heads, block, head_dim]; returns those of all tokens so far."""
        del layer_idx
        keys, values = self._entry(keys, values, [keys.shape[2]])
        if self._keys is None or self._values is None:
            shape = (*keys.shape[:2], self._length, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        stop = self._seen + keys.shape[2]
        self._keys[:, :, self._seen : stop] = keys
        self._values[:, :, self._seen : stop] = values
        self._seen = stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]


def causal_mask(start: int, stop: int, device: torch.device) -> Tensor:
    """Which of the first `stop` tokens each token from `start` sees: bool [1, 1, stop - start, stop]."""
    queries = torch.arange(start, stop, device=device)[:, None]
    return (queries >= torch.arange(stop, device=device))[None, None]
