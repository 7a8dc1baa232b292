"""Keys and values of one layer, for a sequence too long to attend at once."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockCache:
    """What transformers' attention asks of a cache, for one layer and one sequence of known length."""

    def __init__(self, length: int) -> None:
        self._length = length
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
