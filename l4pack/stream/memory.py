"""What a walk needs of memory, and whether that is there."""

from __future__ import annotations

import torch

from l4pack.errors import BudgetError
from l4pack.model.config import TextConfig
from l4pack.stream.compute import Compute
from l4pack.stream.rows import rows_at_once
from l4pack.units import MIB, human_bytes
from l4pack.work.machine import Room

# The interpreter with torch and transformers loaded, on a CPU build; a benchmark holds it against what is measured.
BASE_RAM = 700 * MIB
HEAD_BYTES = 400 * MIB  # a chunk of both heads and the float64 blocks of logits


def check_memory(text: TextConfig, compute: Compute, room: Room, *, beside: int = 0) -> int:
    """Predicted resident bytes of a walk with `beside` more. Raises BudgetError when there is less room."""
    needed = peak_bytes(text, compute.dtype, rows_at_once(compute.device.type, text.hidden_size)) + beside
    if needed > room.nbytes:
        raise BudgetError(
            f"running this model layer by layer takes at least {human_bytes(needed)}, "
            f"{human_bytes(room.nbytes)} are there ({room.limit})",
            hint=f"one expert's matrices must fit, twice; {room.remedy}",
        )
    return needed


def peak_bytes(text: TextConfig, dtype: torch.dtype, rows: int) -> int:
    """Predicted resident bytes with `rows` computed at once: base, the unit in use, the next one, and activations."""
    units = 3 * _largest_unit(text) * dtype.itemsize
    return BASE_RAM + max(units, HEAD_BYTES) + rows * _row_bytes(text, dtype)


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
