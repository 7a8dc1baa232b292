"""Keys and values on their way into the cache: kept for a sequence too long to attend at once, rounded, looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from l4pack.quant.grid import E4M3
from l4pack.quant.torch_ops import nearest
from l4pack.stream.hidden import AttendedRows


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

    def __init__(self, entry: CacheEntry, lengths: Sequence[int], seen: int = 0) -> None:
        self._entry, self._lengths, self._seen = entry, lengths, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the sequences; asked for where all begin at one position."""
        del layer_idx
        return self._seen

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


class KeptCache:
    """A `CacheEntry` that keeps keys and values of one layer's sequences, for tokens that come in later walks.

    `chunk` is the layer's attention chunk, beyond which nothing is attended to nor kept (None: all is).
    """

    def __init__(self, chunk: int | None) -> None:
        self._chunk = chunk
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._entry: CacheEntry = unchanged
        self._coming: list[tuple[int, AttendedRows]] = []
        self._given = 0  # tokens of the piece that comes

    def expect(self, entry: CacheEntry, pieces: Iterable[tuple[int, AttendedRows]]) -> None:
        """What enters next, through `entry`: pieces of sequences, by their numbers, in the order they are attended."""
        self._entry, self._coming, self._given = entry, list(pieces), 0

    def __call__(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keep what enters. A token that goes on from kept ones comes alone, and gets theirs before its own."""
        keys, values = self._entry(keys, values, lengths)
        for row, length in enumerate(lengths):
            own = slice(row, row + 1)
            whole = self._keep(keys[own, :, :length], values[own, :, :length])
            if whole is not None:
                return whole
        return keys, values

    def _keep(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Take in a piece, or a block of it; returns all that its sequence attends to where some was kept before it."""
        number, piece = self._coming[0]
        goes_on = piece.position % (self._chunk or piece.position + 1) > 0
        if goes_on or self._given:
            self._kept[number] = _joined(self._kept[number], (keys, values))
        else:
            self._kept[number] = keys.clone(), values.clone()
        self._given += keys.shape[2]
        if self._given == piece.length:
            self._coming, self._given = self._coming[1:], 0
        return self._kept[number] if goes_on else None


def _joined(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values one after another, [1, kv_heads, length, head_dim] each."""
    keys, values = (torch.cat(pair, dim=2) for pair in zip(before, after, strict=True))
    return keys, values


def causal_mask(start: int, stop: int, device: torch.device) -> Tensor:
    """Which of the first `stop` tokens each token from `start` sees: bool [1, 1, stop - start, stop]."""
    queries = torch.arange(start, stop, device=device)[:, None]
    return (queries >= torch.arange(stop, device=device))[None, None]
