"""What calibrating takes, from shapes alone: the memory of its largest unit, and the disk of its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l4pack.checkpoint.source import Checkpoint
from l4pack.units import MIB

if TYPE_CHECKING:
    from l4pack.assign import Target
    from l4pack.recipe import Recipe

# The interpreter with torch, transformers' Llama 4 and the compiled kernels.
BASE_RAM = 900 * MIB
BLOCK_ROWS = 2048  # tokens computed at once
SOLVE_ROWS = 2048  # output rows solved at once
DEFAULT_LENGTH = 2048
FLOAT = 4
BUFFERS = 3  # files of hidden states a stream has: a layer's inputs, its outputs, and what lies between


@dataclass(frozen=True)
class Needs:
    """Resident memory at the peak, disk beside the artifact, and what decides the time."""

    ram_bytes: int
    disk_bytes: int
    tokens: int
    streams: int

    def for_tokens(self, tokens: int) -> Needs:
        """The same with the tokens that a text really has."""
        return replace(self, tokens=tokens, disk_bytes=self.disk_bytes * tokens // self.tokens)


def calibration_needs(checkpoint: Checkpoint, recipe: Recipe, targets: Sequence[Target]) -> Needs:
    """The needs of calibrating `targets`; tokens are the most the recipe asks for."""
    assert recipe.calibration is not None
    text = checkpoint.config.text
    length = recipe.calibration.sequence_length or min(DEFAULT_LENGTH, text.max_position_embeddings)
    tokens = recipe.calibration.samples * length
    streams = 2 if asymmetric(recipe, targets) else 1
    disk = streams * BUFFERS * tokens * text.hidden_size * FLOAT
    widest = max(max(target.linear.in_features, target.linear.out_features) for target in targets)
    unit = max(_unit_bytes(text.hidden_size, widest, streams), _attention_bytes(checkpoint, length))
    return Needs(BASE_RAM + unit, disk, tokens, streams)


def asymmetric(recipe: Recipe, targets: Sequence[Target]) -> bool:
    """Whether any matrix aims at the original layer's outputs, so that the original must run too."""
    options = [recipe.schemes[name].gptq for name in {target.scheme for target in targets}]
    return any(option is not None and option.asymmetric > 0 for option in options)


def _unit_bytes(hidden: int, inner: int, streams: int) -> int:
    """One MLP: its weights now, as solved, and the next one's; moments and factor of the widest; rows on their way."""
    weights = 3 * hidden * inner * FLOAT
    widest = max(hidden, inner)
    moments = (streams + 5) * widest * widest * FLOAT
    rows = (BLOCK_ROWS * (4 * hidden + 4 * inner) + 8 * SOLVE_ROWS * widest) * FLOAT
    return 4 * weights + moments + rows


def _attention_bytes(checkpoint: Checkpoint, length: int) -> int:
    """Attention's projections, now and the next unit's, and the scores of a block of queries."""
    text = checkpoint.config.text
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    weights = 2 * text.hidden_size * (queries + keys) * FLOAT
    block = min(BLOCK_ROWS, length)
    return 2 * weights + block * (min(length, 8192) * text.num_attention_heads + 8 * text.hidden_size) * FLOAT
