"""How much is computed at once, from the memory there is, and what a walk needs at least."""

from __future__ import annotations

import torch

from l4pack.errors import BudgetError
from l4pack.model.config import TextConfig
from l4pack.stream.layer import Blocks
from l4pack.units import MIB, human_bytes

# The interpreter with torch and transformers loaded, on a CPU build; a benchmark holds it against what is measured.
BASE_RAM = 700 * MIB
LEAST, MOST = 128, 8192
HEAD_BYTES = 400 * MIB  # a chunk of both heads and the float64 blocks of logits


def blocks_for(text: TextConfig, dtype: torch.dtype, max_bytes: int | None, *, base: int = BASE_RAM) -> Blocks:
    """Tokens to compute at once within `max_bytes` (None: what computes well). Raises BudgetError."""
    if max_bytes is None:
        return Blocks()
    left = max_bytes - peak_bytes(text, dtype, 0, base=base)
    rows = min(MOST, left // _row_bytes(text, dtype))
    if rows < LEAST:
        least = peak_bytes(text, dtype, LEAST, base=base)
        raise BudgetError(
            f"running this model layer by layer takes at least {human_bytes(least)}, {human_bytes(max_bytes)} are given",
            hint="one expert's matrices must fit, twice; raise --max-ram",
        )
    return Blocks(attention=rows, rows=rows)


def peak_bytes(text: TextConfig, dtype: torch.dtype, rows: int, *, base: int = BASE_RAM) -> int:
    """Predicted resident bytes with `rows` computed at once: base, the unit in use, the next one, and activations."""
    units = 3 * _largest_unit(text) * dtype.itemsize
    return base + max(units, HEAD_BYTES) + rows * _row_bytes(text, dtype)


def _largest_unit(text: TextConfig) -> int:
    """Weights of the largest unit: a dense MLP, an expert, or attention."""
    dense = text.intermediate_size_mlp if len(text.moe_layers) < text.num_hidden_layers else 0
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    return text.hidden_size * max(3 * max(dense, text.intermediate_size), heads)


def _row_bytes(text: TextConfig, dtype: torch.dtype) -> int:
    dense = text.intermediate_size_mlp if len(text.moe_layers) < text.num_hidden_layers else 0
    mlp = 4 * text.hidden_size + 3 * max(dense, text.intermediate_size)
    attention = 5 * text.hidden_size + 4 * (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    return max(mlp, attention) * dtype.itemsize
