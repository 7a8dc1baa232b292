"""What calibrating takes, from shapes alone: the memory of its largest unit, and the disk of its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from l4pack.checkpoint.source import Checkpoint
from l4pack.model.config import TextConfig
from l4pack.model.tensors import Role
from l4pack.recipe import KEEP
from l4pack.stream.rows import rows_at_once
from l4pack.units import MIB

if TYPE_CHECKING:
    from l4pack.plan.assign import Target
    from l4pack.recipe import Recipe

# The interpreter with torch, transformers' Llama 4 and the compiled kernels.
BASE_RAM = 900 * MIB
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


def calibration_needs(checkpoint: Checkpoint, recipe: Recipe, targets: Sequence[Target], device: str = "cpu") -> Needs:
    """The needs of calibrating `targets` on a kind of device; tokens are the most the recipe asks for."""
    assert recipe.calibration is not None
    text = checkpoint.config.text
    length = recipe.calibration.sequence_length or min(DEFAULT_LENGTH, text.max_position_embeddings)
    tokens = recipe.calibration.samples * length
    streams = 2 if asymmetric(recipe, targets) else 1
    disk = streams * BUFFERS * tokens * text.hidden_size * FLOAT
    routing = (streams + 2) * tokens * text.num_local_experts * FLOAT  # logits, and copies to choose borrowed rows from
    rows = rows_at_once(device, text.hidden_size)
    unit = max(_solving_bytes(text, recipe, targets, rows), _attention_bytes(text, length, rows))
    return Needs(BASE_RAM + _held_bytes(text, recipe) + routing + unit, disk, tokens, streams)


def asymmetric(recipe: Recipe, targets: Sequence[Target]) -> bool:
    """Whether any matrix aims at the original layer's outputs, so that the original must run too."""
    options = [recipe.schemes[name].gptq for name in {target.scheme for target in targets}]
    return any(option is not None and option.asymmetric > 0 for option in options)


def _held_bytes(text: TextConfig, recipe: Recipe) -> int:
    """What is there throughout a layer: its attention, as written too if that differs, and the next unit, half of one
    matrix of it still as it is stored."""
    quantized = any(Role.ATTENTION in rule.roles for rule in recipe.rules if rule.scheme != KEEP)
    return (2 if quantized else 1) * _attention_weights(text) + (3 * FLOAT + 2) * text.hidden_size * widest_mlp(text)


def widest_mlp(text: TextConfig) -> int:
    """The inner width of the largest MLP."""
    dense = text.intermediate_size_mlp if len(text.moe_layers) < text.num_hidden_layers else 0
    return max(dense, text.intermediate_size)


def _solving_bytes(text: TextConfig, recipe: Recipe, targets: Sequence[Target], rows: int) -> int:
    """The most of one unit over its phases: its weights, and what is made of them."""
    hidden, widest = text.hidden_size, widest_mlp(text)
    running = (
        3 * hidden * widest + hidden * widest // 2 + rows * (4 * widest + 3 * hidden)
    )  # as written, and its inputs
    most = (3 * hidden * widest + running) * FLOAT
    for options, inner in _solved(recipe, targets):
        sums = 2 if options else 1  # the Hessian, and the cross moments
        levels = 3 * hidden * inner // 2  # int8, some twice while they are put together
        first = (sums + 1) * hidden * hidden + 7 * rows * hidden
        between = 3 * hidden * inner + sums * inner * inner + rows * (7 * inner + 5 * hidden)
        last = (sums + 1) * inner * inner + 7 * rows * inner
        most = max(most, (3 * hidden * inner + levels + max(first, between, last)) * FLOAT)
    return most


def _solved(recipe: Recipe, targets: Sequence[Target]) -> set[tuple[bool, int]]:
    """Kinds of MLPs to solve: whether asymmetrically, and their inner width (or the hidden one, if that is more)."""
    kinds = set()
    for target in targets:
        options = recipe.schemes[target.scheme].gptq
        if options is not None:
            kinds.add((options.asymmetric > 0, max(target.linear.in_features, target.linear.out_features)))
    return kinds


def _attention_weights(text: TextConfig) -> int:
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    return 2 * text.hidden_size * (queries + keys) * FLOAT


def _attention_bytes(text: TextConfig, length: int, rows: int) -> int:
    """The scores of a block of queries, and what goes in and out."""
    block = min(rows, length)
    return block * (min(length, 8192) * text.num_attention_heads + 8 * text.hidden_size) * FLOAT
